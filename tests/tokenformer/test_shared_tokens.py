"""Pattention whose tokens are divided among processes: outputs, all gradients, and what is sent."""

import pytest
import torch
from torch import multiprocessing
from torch.distributed import ReduceOp, destroy_process_group, init_process_group  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lit_modules.strategies.sharding import divide_tokens
from tokenformer import LMConfig, Pattention, TokenFormerLM
from tokenformer.growth import append_tokens, grow
from tokenformer.operator import attend

SIZE = 2
IDS = torch.arange(24).view(2, 12)


def layer_and_input():
    """A layer with a shared norm, a norm of its own and trained taus; an input with a row of zeros."""
    torch.manual_seed(0)
    layer = Pattention(6, 4, num_tokens=8, scale="learned").double()
    append_tokens(layer, 4, "random")
    append_tokens(layer, 8, "segment_norm")
    append_tokens(layer, 4, "anchored")
    torch.nn.init.normal_(layer.segments[2].values)
    torch.nn.init.normal_(layer.segments[3].values)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    x[0, 0] = 0
    return layer, x.requires_grad_()


def results(layer, x):
    """Output, and the gradients of a loss that is not linear in it."""
    out = layer(x)
    out.square().sum().backward()
    gradients = {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}


def language_model():
    """Of an even number of tokens in each layer, with a second norm."""
    torch.manual_seed(0)
    sizes = {"depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 16, "proj_tokens": 20, "ffn_tokens": 50}
    model = TokenFormerLM(LMConfig(vocab_size=64, init="scaled", **sizes))
    grow(model, qkv=20, ffn=60, init="pairs")
    return model


def share(rank, folder):
    """One of the processes."""
    init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    mesh = init_device_mesh("cpu", (SIZE,))
    layer, x = layer_and_input()
    for segment in layer.segments:
        for part in ("keys", "values"):
            whole = getattr(segment, part).detach()
            setattr(segment, part, torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
    with CommDebugMode() as sent:
        found = results(layer, x)
    counts = {str(op): count for op, count in sent.get_comm_counts().items()}
    model = language_model()
    divide_tokens(model, mesh)
    held = model.backbone.blocks[0].ffn.segments[0].keys.to_local().shape[0]
    with torch.no_grad():
        language = {"logits": model(IDS), "held": held}
    torch.save({"results": found, "sent": counts, "language": language}, f"{folder}/{rank}.pt")
    destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    multiprocessing.spawn(share, (str(folder),), nprocs=SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]


def test_equals_one_process(shared):
    expected = results(*layer_and_input())
    assert expected["tau_gain"].abs() > 1e-3
    assert expected["segments.2.tau_gain"].abs() > 1e-3
    for one in shared:
        assert one["results"].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(one["results"][name], tensor, rtol=1e-12, atol=1e-12, msg=name)


def test_what_is_sent(shared):
    """For each norm its square, and r; for the layer its output, and the input's gradient."""
    assert all(one["sent"]["c10d.allreduce_"] == 2 * 2 + 2 for one in shared)


def test_a_model_on_device_and_in_the_cloud_is_that_of_one_process(shared):
    """The sum that examples/device_cloud.py is."""
    expected = language_model()(IDS).detach()
    assert expected.std() > 1e-2
    for one in shared:
        assert one["language"]["held"] == 25
        torch.testing.assert_close(one["language"]["logits"], expected, rtol=0, atol=1e-6)


def test_processes_hold_the_same_bits(shared):
    """What is not divided is computed in each of them, and must not drift apart."""
    first, second = (one["results"] for one in shared)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_norms_are_refused():
    layer, x = layer_and_input()
    with pytest.raises(ValueError, match="'softmax': only l2_norm_gelu divides"):
        attend(x, [layer.segments[0].keys], [layer.segments[0].values], 1.0, "softmax", object())
