"""The operator and the layer against the released implementation, and at their edges."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.conftest import ASSETS
from tokenformer import Pattention, pattention
from tokenformer.operator import attend

KINDS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
L2_KINDS = KINDS[:2]


@pytest.fixture(scope="module")
def golden():
    return load_file(ASSETS / "golden_pattention.safetensors")


def random_inputs(dtype=torch.float32, T=10, D_in=16, N=24, D_out=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, D_in), (N, D_in), (N, D_out))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def transcription(x, keys, values, tau):
    scores = x @ keys.T
    return F.gelu(scores / scores.norm(dim=-1, keepdim=True) * tau) @ values


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_released_implementation(golden, kind):
    x, keys, values = (golden[name].double().requires_grad_() for name in ("x", "K", "V"))
    out = pattention(x, keys, values, score_norm=kind)
    (out * golden["upstream_grad"]).sum().backward()
    for mine, theirs in ((out, "out"), (x.grad, "grad_x"), (keys.grad, "grad_K"), (values.grad, "grad_V")):
        torch.testing.assert_close(mine, golden[f"{kind}.{theirs}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_the_released_implementation(golden, kind):
    out = pattention(*(golden[name] for name in ("x", "K", "V")), score_norm=kind)
    torch.testing.assert_close(out, golden[f"{kind}.out_f32"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 0)])
def test_gradcheck(kind, needs):
    x, keys, values = random_inputs(torch.float64, T=3, D_in=4, N=6, D_out=5)
    tau = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    inputs = [t.detach().requires_grad_(bool(need)) for t, need in zip((x, keys, values, tau), needs, strict=True)]
    assert torch.autograd.gradcheck(lambda *args: pattention(*args, score_norm=kind), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", L2_KINDS)
def test_zero_scores_give_zeros_and_finite_gradients(kind, dtype):
    x, keys, values = random_inputs(dtype)
    x = x.detach().clone()
    x[3] = 0
    x.requires_grad_()
    tau = torch.tensor([2.0], requires_grad=True)
    out = pattention(x, keys, values, tau, score_norm=kind)
    out.float().sum().backward()
    assert (out[3] == 0).all()
    assert (out[2] != 0).any()
    for tensor in (x, keys, values, tau):
        assert tensor.grad.isfinite().all()
        assert (tensor.grad != 0).any()


@pytest.mark.parametrize("kind", L2_KINDS)
def test_all_keys_zero(kind):
    x, keys, values = random_inputs()
    keys = torch.zeros_like(keys).requires_grad_()
    out = pattention(x, keys, values, score_norm=kind)
    out.sum().backward()
    assert (out == 0).all()
    assert all(tensor.grad.isfinite().all() for tensor in (x, keys, values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softmax_never_overflows(dtype):
    x, keys, values = random_inputs(dtype)
    out = pattention(100 * x, 10 * keys, values, score_norm="softmax")
    out.float().sum().backward()
    assert out.isfinite().all()
    assert keys.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiny_scores_stay_finite_in_half_precision(dtype):
    x, keys, values = random_inputs(dtype)
    out = pattention(x * 1e-4, keys * 1e-2, values)
    out.float().sum().backward()
    assert out.isfinite().all()
    assert keys.grad.isfinite().all()


def test_output_ignores_the_magnitude_of_keys_and_inputs():
    x, keys, values = random_inputs(torch.float64)
    torch.testing.assert_close(pattention(10 * x, 3 * keys, values), pattention(x, keys, values), rtol=0, atol=1e-12)


def test_leading_dimensions_are_kept():
    x, keys, values = random_inputs()
    batched = x.view(2, 5, 1, 16)
    assert torch.equal(pattention(batched, keys, values), pattention(x, keys, values).view(2, 5, 1, 12))
    assert pattention(batched[:0], keys, values).shape == (0, 5, 1, 12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [(), ("keys0", "values0"), ("keys1",), ("values0", "values1", "values2")])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_in_segments_are_tokens_in_one(kind, frozen, autocast):
    """Outputs and all gradients, whichever are wanted, as if the segments were joined."""
    dtype = torch.float32 if autocast else torch.float64
    x, keys, values = (t.detach() for t in random_inputs(dtype))
    tau = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    parts = {f"keys{i}": part.clone() for i, part in enumerate(keys.split((7, 16, 1)))}
    parts |= {f"values{i}": part.clone() for i, part in enumerate(values.split((7, 16, 1)))}
    for name, part in parts.items():
        part.requires_grad_(name not in frozen)
    segments = list(parts.values())
    inputs = {"x": x.requires_grad_(), "tau": tau} | {n: part for n, part in parts.items() if n not in frozen}
    with torch.autocast("cpu", enabled=autocast):
        apart = attend(x, segments[:3], segments[3:], tau, kind)
        joined = pattention(x, torch.cat(segments[:3]), torch.cat(segments[3:]), tau, kind)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(apart, joined, **tolerance)
    weight = torch.randn_like(apart)
    for name, a, b in zip(
        inputs,
        torch.autograd.grad((apart * weight).sum(), list(inputs.values())),
        torch.autograd.grad((joined * weight).sum(), list(inputs.values())),
        strict=True,
    ):
        assert a.dtype == inputs[name].dtype, name
        torch.testing.assert_close(a, b, **tolerance, msg=name)


def test_a_norm_of_a_part_of_the_tokens():
    """Outputs and gradients are those of the formula; recomputed and compiled ones too."""
    x, keys, values = random_inputs(torch.float64)
    x.data[0] = 0
    tau = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)

    def fused(recompute=False):
        parts = [part for tokens in (keys, values) for part in tokens.split((7, 16, 1))]
        return attend(x, parts[:3], parts[3:], tau, "l2_norm_gelu", None, recompute, 7)

    scores = x @ keys.T
    norm = scores[:, :7].norm(dim=1, keepdim=True)
    formula = F.gelu(scores * torch.where(norm > 0, tau / norm.clamp_min(1e-30), 0)) @ values
    weight = torch.randn_like(formula)
    right = torch.autograd.grad((formula * weight).sum(), (x, keys, values, tau))
    right[0][0] = 0
    for out in (fused(), fused(recompute=True), torch.compile(fused, fullgraph=True, backend="aot_eager")()):
        torch.testing.assert_close(out, formula, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad((out * weight).sum(), (x, keys, values, tau))
        for mine, expected in zip(found, right, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="'softmax': only l2_norm_gelu has a norm of a part"):
        attend(x, [keys], [values], 1.0, "softmax", norm_tokens=7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_in_its_precision_and_gives_wide_gradients(dtype):
    inputs = random_inputs(T=64, D_in=32, N=96, D_out=32)
    exact = pattention(*inputs)
    with torch.autocast("cpu", dtype=dtype):
        out = pattention(*inputs)
        out.float().sum().backward()
    assert out.dtype == dtype
    assert (out - exact).norm() / exact.norm() < 1e-2
    grads = torch.autograd.grad(exact.sum(), inputs)
    for tensor, grad in zip(inputs, grads, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert (tensor.grad - grad).norm() / grad.norm() < 2e-2


def kept_bytes(function, inputs):
    """The output, and what autograd keeps besides the inputs."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*inputs)
    return out, sum(size for pointer, size in saved.items() if pointer not in {t.data_ptr() for t in inputs})


def in_segments(x, *tokens, recompute):
    half = len(tokens) // 2
    return attend(x, list(tokens[:half]), list(tokens[half:]), 2.0, "l2_norm_gelu", recompute=recompute)


recomputing, keeping = (partial(in_segments, recompute=recompute) for recompute in (True, False))


def test_keeps_one_buffer_for_the_backward_pass():
    out, kept = kept_bytes(pattention, random_inputs(T=200, D_in=8, N=300, D_out=8))
    one_buffer = 200 * 300 * 4
    assert one_buffer <= kept <= one_buffer + 200 * 4 + 64
    assert out.requires_grad


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_recomputed_scores_are_not_kept_and_give_the_same_bits(dtype, segments):
    x, *tokens = random_inputs(dtype, T=200, D_in=64, N=300, D_out=64)
    tokens = [part.detach().requires_grad_() for t in tokens for part in t.tensor_split(segments)]
    out, kept = kept_bytes(recomputing, (x, *tokens))
    assert kept <= 200 * dtype.itemsize + 64  # a factor for each row, and tau
    expected = keeping(x, *tokens)
    assert torch.equal(out, expected)
    grads = (torch.autograd.grad(o.square().sum(), (x, *tokens)) for o in (out, expected))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiled_scores_are_recomputed_too():
    inputs = random_inputs(T=200, D_in=8, N=300, D_out=8)
    one_buffer, found = 200 * 300 * 4, {}
    for function in (recomputing, keeping):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager_decomp_partition")
        out, kept = kept_bytes(compiled, inputs)
        found[function] = kept / one_buffer, torch.autograd.grad(out.square().sum(), inputs)
    assert found[recomputing][0] < 0.01
    assert 1 <= found[keeping][0] < 1.01
    for a, b in zip(found[recomputing][1], found[keeping][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gelu_l2_norm", "softmax"])
def test_other_norms_keep_their_scores(kind):
    layer = Pattention(4, 4, 8, score_norm=kind)
    layer.recompute_scores = True
    with pytest.raises(ValueError, match=f"'{kind}': only l2_norm_gelu computes its scores again"):
        layer(torch.randn(2, 4))


def test_backward_twice_gives_the_same_gradients():
    """The operator works in place on its own buffers only."""
    inputs = random_inputs()
    out = pattention(*inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiles_into_one_graph():
    inputs = random_inputs()
    compiled = torch.compile(pattention, fullgraph=True, backend="inductor")
    out, exact = compiled(*inputs), pattention(*inputs)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    grads, expected = (torch.autograd.grad(o.square().sum(), inputs) for o in (out, exact))
    for mine, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


def test_tau_gradient_is_that_of_the_transcription():
    x, keys, values = random_inputs(torch.float64)
    tau = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    (mine,) = torch.autograd.grad(pattention(x, keys, values, tau).sum(), tau)
    (right,) = torch.autograd.grad(transcription(x, keys, values, tau).sum(), tau)
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=0)


def test_unknown_names_are_refused():
    x, keys, values = random_inputs()
    with pytest.raises(ValueError, match="score_norm='relu'.*l2_norm_gelu"):
        pattention(x, keys, values, score_norm="relu")
    for arguments, message in (({"score_norm": "relu"}, "score_norm"), ({"scale": "half"}, "scale='half'")):
        with pytest.raises(ValueError, match=message):
            Pattention(4, 4, 8, **arguments)
    with pytest.raises(ValueError, match="num_tokens=0"):
        Pattention(4, 4, 0)


# The layer
