"""One token at a time: layers of the same input as one, against each of them."""

from itertools import chain

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from studies.pretraining import l1_norm_gelu
from tokenformer import LMConfig, Pattention, TokenFormerLM, generate, grow
from tokenformer.decoding import _Joined, each, join
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
    joined = join(*found)
    assert isinstance(joined, _Joined)
    together = torch.stack(joined(x))
    error = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    torch.testing.assert_close(together, torch.stack(each(x, *found)), rtol=error, atol=error, equal_nan=True)
    assert not together[:, 1].any()
    assert together[:, 2].isnan().all()


def test_tokens_are_not_copied():
    found = layers(3, "random", "anchored")
    joined = join(*found)
    keys = [segment.keys for layer in found for segment in layer.segments]
    assert all(one is other for one, other in zip(joined.keys, keys, strict=True))
    values = [segment.values for layer in found for segment in layer.segments]
    assert all(one is other for one, other in zip(chain.from_iterable(joined.values), values, strict=True))


def build(**changes):
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(**SIZES | TOKENS | changes)).eval()


def what_is_joined(model):
    """How many layers each joined operator has, once the model has read some tokens; they change no logits."""
    cache, plain = model.new_cache(joins=True), model.new_cache()
    for ids in ([1, 2, 3], [], [4], [5]):
        assert not cache.joined or len(ids) == 1
        logits, expected = (model(torch.tensor([ids], dtype=torch.long), cache) for cache in (cache, plain))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert not plain.joined
    return sorted(len(layers) for layers, joined in cache.joined.items() if isinstance(joined, _Joined))


def test_the_projections_of_a_block_are_one():
    assert what_is_joined(build()) == [1, 1, 1, 1, 3, 3]


@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        ({"init": "anchored", "qkv": 30, "ffn": 80}, [1, 1, 1, 1, 3, 3]),
        ({"init": "anchored", "qkv": 30, "layers": "query"}, [1, 1, 1, 1]),  # of another size than key and value
        ({"init": "segment_norm", "ffn": 80}, [1, 1, 3, 3]),
    ],
    ids=["anchored", "query alone", "norms of their own"],
)
def test_grown_layers(changes, joined):
    model = build()
    grow(model, **changes)
    assert what_is_joined(model) == joined


@pytest.mark.parametrize("changes", [{"baseline": "width"}, {"score_norm": "softmax"}], ids=str)
def test_other_layers_are_called(changes):
    assert what_is_joined(build(**changes)) == []


def test_what_watches_a_layer_sees_it():
    model = build()
    first, second = model.backbone.blocks
    with silenced([first.attention.query, first.ffn]):
        assert what_is_joined(model) == [1, 1, 1, 3]
    second.ffn.top_k = 2
    assert what_is_joined(model) == [1, 1, 1, 3, 3]
    first.attention.out.forward = lambda x, layer=first.attention.out: l1_norm_gelu(layer, x)
    assert what_is_joined(model) == [1, 1, 3, 3]


def test_under_autocast_each_layer_chooses_its_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert what_is_joined(build()) == []


def test_generation_joins(monkeypatch):
    seen = []
    monkeypatch.setattr("tokenformer.cache.join", lambda *layers: seen.append(len(layers)) or join(*layers))
    generate(build(), torch.tensor([[1, 2, 3]]), 4)
    assert sorted(seen) == [1, 1, 1, 1, 3, 3]


def test_what_is_sharded_is_not_joined(eight_processes):
    """Whole weights are there only as long as a block of FSDP2 runs."""
    model = build()
    for block in model.backbone.blocks:
        fully_shard(block, mesh=eight_processes)
    fully_shard(model, mesh=eight_processes)
    assert not model.new_cache(joins=True).joins
    assert generate(model, torch.tensor([[1, 2]]), 3).shape == (1, 5)
