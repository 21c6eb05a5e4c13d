"""One token at a time: layers of the same input as one, against each of them."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from tokenformer import LMConfig, Pattention, TokenFormerLM, generate, grow
from tokenformer.decoding import JoinedLayers, each
from tokenformer.growth import append_tokens
from tokenformer.inspection import silenced

SIZES = {"vocab_size": 50, "max_seq_len": 32, "depth": 2, "dim": 32, "num_heads": 4, "init": "scaled"}
TOKENS = {"qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 64}


def layers(num, *inits):
    torch.manual_seed(0)
    found = [Pattention(16, 12, 20, scale="learned", key_std=1.0) for _ in range(num)]
    for i, layer in enumerate(found):
        nn.init.constant_(layer.tau_gain, 0.01 * (i + 1))  # a tau of its own
        for init in inits:
            append_tokens(layer, 8, init, torch.Generator().manual_seed(i))
        for segment in layer.segments:
            nn.init.normal_(segment.keys)
            nn.init.normal_(segment.values)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inits", [(), ("random",), ("anchored",), ("anchored", "anchored")], ids="+".join)
@pytest.mark.parametrize("num", [1, 3])
@torch.no_grad()
def test_equals_each_layer(num, inits, dtype):
    found = [layer.to(dtype) for layer in layers(num, *inits)]
    x = torch.randn(5, 1, 16, dtype=dtype)
    x[1] = 0  # a row without a norm
    x[2] = torch.finfo(dtype).max  # and one whose norm is infinite
    together = JoinedLayers.of(found)(x)
    error = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    torch.testing.assert_close(together, torch.stack(each(x, *found)), rtol=error, atol=error, equal_nan=True)
    assert not together[:, 1].any()
    assert together[:, 2].isnan().all()


def test_tokens_of_one_layer_are_not_copied():
    (layer,) = layers(1)
    (segment,) = layer.segments
    joined = JoinedLayers.of([layer])
    assert joined.keys.data_ptr() == segment.keys.data_ptr()
    assert joined.values.data_ptr() == segment.values.data_ptr()


def build(**changes):
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(**SIZES | TOKENS | changes)).eval()


def what_is_joined(model):
    """How many layers of a block each of its joined ones has."""
    cache = model.new_cache()
    model(torch.tensor([[1, 2, 3]]), cache)
    assert not cache.joined  # only where there is one token
    model(torch.tensor([[4]]), cache)
    model(torch.tensor([[5]]), cache)
    return sorted(len(layers) for layers, as_one in cache.joined.items() if as_one is not None)


def test_the_projections_of_a_block_are_one():
    assert what_is_joined(build()) == [1, 1, 1, 1, 3, 3]


@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        ({"init": "anchored", "qkv": 30, "ffn": 80}, [1, 1, 1, 1, 3, 3]),
        ({"init": "anchored", "qkv": 30, "layers": "query"}, [1] * 10),  # of other sizes than key and value
        ({"init": "segment_norm", "ffn": 80}, [1, 1, 3, 3]),
    ],
    ids=["anchored", "query alone", "norms of their own"],
)
def test_grown_layers(changes, joined):
    model = build()
    grow(model, **changes)
    assert what_is_joined(model) == joined


@pytest.mark.parametrize("changes", [{"baseline": "width"}, {"score_norm": "softmax"}], ids=str)
def test_other_layers_are_left_alone(changes):
    assert what_is_joined(build(**changes)) == []


def test_what_watches_a_layer_sees_it():
    model = build()
    block = model.backbone.blocks[0]
    with silenced([block.attention.query, block.ffn]):
        assert what_is_joined(model) == [1, 1, 1, 1, 1, 3]  # key and value of that block are alone
    block.ffn.top_k = 2
    assert what_is_joined(model) == [1, 1, 1, 3, 3]


def test_under_autocast_each_layer_chooses_its_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert what_is_joined(build()) == []


def test_what_is_sharded_is_not_joined(eight_processes):
    """Whole weights are there only as long as a block of FSDP2 runs."""
    model = build()
    for block in model.backbone.blocks:
        fully_shard(block, mesh=eight_processes)
    fully_shard(model, mesh=eight_processes)
    assert what_is_joined(model) == []
    assert generate(model, torch.tensor([[1, 2]]), 3).shape == (1, 5)
