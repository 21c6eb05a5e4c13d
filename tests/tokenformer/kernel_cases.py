"""The Triton kernels against torch's functions; :mod:`tests.tokenformer.test_kernels` runs these tests in a process."""

import os

import pytest
import torch
from torch.nn import functional as F

import tokenformer.fused as fused
import tokenformer.loss as loss_module
from tokenformer import Pattention
from tokenformer.growth import append_tokens
from tokenformer.kernels import cross_entropy, norm_gelu, norm_gelu_backward
from tokenformer.loss import IGNORE, linear_cross_entropy
from tokenformer.operator import attend

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# Relative errors against float64. Triton's interpreter cuts off where it goes to bfloat16; a GPU rounds.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 2.5e-2, torch.float16: 2e-3}


def use_kernels(monkeypatch, on=True):
    for module in (fused, loss_module):
        monkeypatch.setattr(module, "uses_kernels", lambda x, group=None: on)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def error(mine, right):
    return (mine.double() - right).norm() / right.norm()


def row_of(N, seed):
    """A row (1, N) in a sheet: NaN up to the next multiple of 16, between rows of sevens."""
    sheet = torch.full((3, -(-N // 16) * 16), 7.0, device=DEVICE)
    sheet[1] = torch.nan
    sheet[1, :N] = numbers(N, seed=seed).float()
    return sheet, sheet[1:2, :N]


@pytest.mark.parametrize("N", [1, 511, 512, 576, 2140, 34480])
def test_one_row_is_that_of_torch_and_no_other_is_touched(N):
    sheet, scores = row_of(N, seed=0)
    tau = torch.tensor([0.7 * N**0.5], dtype=torch.float64, device=DEVICE)
    factor, before = scores.new_empty(1, 1), sheet.clone()
    weights = norm_gelu(scores, tau, factor, N)
    assert torch.equal(sheet.nan_to_num(), before.nan_to_num())
    assert weights.stride() == scores.stride() == (sheet.shape[1], 1)
    A = scores.double().requires_grad_()
    wide = tau.requires_grad_()
    z = wide * A / A.norm()
    right = F.gelu(z)
    assert error(factor, wide / A.norm()) < 1e-6
    assert error(weights, right) < 1e-6
    grads, grad = row_of(N, seed=1)
    dA, dtau = torch.autograd.grad(right, (A, wide), grad.double())
    weights, r, left = norm_gelu_backward(grad, scores, tau, factor, N)
    assert error(weights, right) < 1e-6
    assert torch.allclose(r.double().sum() * N / tau, dtau, rtol=1e-5)
    assert left is None
    assert (grad - dA).norm() < 1e-6 * grad.norm() + 1e-6  # N = 1: nothing is left
    assert (grads[::2] == 7).all()


def inputs(dtype, sizes, T=5, D=16, scale=1.0):
    """x with a row of zeros, tau, keys and values in segments; made in float64, so that all dtypes have the same."""
    x = scale * numbers(T, D)
    x[1] = 0
    N = sum(sizes)
    tau = torch.tensor([1.3 * N**0.5], dtype=torch.float64, device=DEVICE)
    parts = [part for i in (1, 2) for part in numbers(N, D, seed=i).split(sizes)]
    return [t.to(dtype).detach().requires_grad_() for t in (x, *parts)] + [tau.requires_grad_()]


def results(tensors, wanted=None, recompute=False, norm_tokens=None):
    """Output and gradients of those that are wanted, by default all."""
    x, *parts, tau = tensors
    half = len(parts) // 2
    out = attend(x, parts[:half], parts[half:], tau, "l2_norm_gelu", None, recompute, norm_tokens)
    grad_out = numbers(*out.shape, seed=3)
    return [out, *torch.autograd.grad(out, wanted or tensors, grad_out.to(out.dtype), retain_graph=True)]


@pytest.mark.parametrize(("sizes", "norm_tokens"), [((576,), None), ((700, 1300), 700), ((30, 513, 1), None)])
@pytest.mark.parametrize("dtype", ERROR)
def test_operator_is_that_of_torch(monkeypatch, dtype, sizes, norm_tokens):
    tensors = inputs(dtype, sizes)
    use_kernels(monkeypatch, on=False)
    right = results([t.detach().double().requires_grad_() for t in tensors], norm_tokens=norm_tokens)
    torchs = results(tensors, norm_tokens=norm_tokens)
    use_kernels(monkeypatch)
    mine = results(tensors, norm_tokens=norm_tokens)
    assert (mine[0][1] == 0).all()
    for a, b, c in zip(mine, right, torchs, strict=True):
        assert a.dtype == c.dtype
        assert error(a, b) < ERROR[dtype]


def test_backward_twice_recomputed_and_in_part(monkeypatch):
    """Bit for bit: nothing that is kept is changed, and what is not wanted changes nothing."""
    use_kernels(monkeypatch)
    tensors = inputs(torch.float32, (30, 513))
    first, again = results(tensors), results(tensors, recompute=True)
    out, *grads = first
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    grad_out = numbers(*out.shape, seed=3).float()
    for _ in range(2):
        once_more = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, once_more, strict=True))
    for i in range(len(tensors)):
        frozen = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        assert torch.equal(results(frozen, [frozen[i]])[1], grads[i])


def test_a_factor_beyond_float16_is_cut_to_its_range(monkeypatch):
    use_kernels(monkeypatch)
    x, keys, values, tau = inputs(torch.float16, (2000,), scale=1e-6)
    out, grad_keys, grad_values = results([x, keys, values, tau], [keys, values])
    assert 1.3 * 2000**0.5 / (x @ keys.T).double().norm(dim=1)[0] > torch.finfo(torch.float16).max
    assert all(t.isfinite().all() for t in (out, grad_keys, grad_values))
    assert (out[0] != 0).any()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("size", [0.0, 1e-25, -1.5])
def test_a_tau_near_zero_or_below(monkeypatch, size):
    tensors = inputs(torch.float32, (30, 513))
    tensors[-1] = torch.full_like(tensors[-1], size).requires_grad_()
    use_kernels(monkeypatch, on=False)
    right = results([t.detach().double().requires_grad_() for t in tensors])
    use_kernels(monkeypatch)
    for mine, torchs in zip(results(tensors), right, strict=True):
        assert (mine.double() - torchs).norm() <= 1e-5 * torchs.norm() + 1e-14


def test_squares_beyond_float32(monkeypatch):
    use_kernels(monkeypatch)
    x, keys, values, tau = (t.detach() for t in inputs(torch.float32, (576,)))
    x[0] *= 1e20
    x[2] *= 1e-24
    out = results([x.requires_grad_(), keys.requires_grad_(), values.requires_grad_(), tau.requires_grad_()])[0]
    assert out[0].isnan().all()
    assert (out[1:3] == 0).all()
    assert out[3:].isfinite().all()


def test_r_beyond_float16(monkeypatch):
    """With values near 1 and a gradient of 8, r is about 128 * 0.5 * N."""
    tensors = inputs(torch.float16, (2000,))
    tensors[2] = (1 + 0.1 * tensors[2]).detach().requires_grad_()
    found = []
    for on, like in ((True, tensors), (False, [t.detach().double().requires_grad_() for t in tensors])):
        use_kernels(monkeypatch, on)
        x, keys, values, tau = like
        out = attend(x, [keys], [values], tau, "l2_norm_gelu")
        found.append(torch.autograd.grad(out, like, torch.full_like(out, 8)))
    r = found[1][3] * tensors[3] / 4  # of the four rows that are not zero
    assert r > torch.finfo(torch.float16).max
    for mine, right in zip(*found, strict=True):
        assert error(mine, right) < ERROR[torch.float16]


def test_layer_with_a_shared_norm_and_norms_of_their_own(monkeypatch):
    torch.manual_seed(0)
    layer = Pattention(16, 12, num_tokens=40, scale="learned")
    append_tokens(layer, 30, "random")
    append_tokens(layer, 20, "segment_norm")
    torch.nn.init.normal_(layer.segments[2].values)
    layer.to(DEVICE)
    x = numbers(3, 5, 16).float()
    both = []
    for on in (True, False):
        use_kernels(monkeypatch, on)
        layer.zero_grad()
        out = layer(x)
        out.square().sum().backward()
        both.append([out, *(p.grad for p in layer.parameters())])
    for mine, right in zip(*both, strict=True):
        assert error(mine, right.double()) < 1e-5


def test_compiled_operator_is_the_same_op(monkeypatch):
    """Bit for bit, with segments and without a graph break: what torch.compile sees is one op."""
    use_kernels(monkeypatch)
    tensors = inputs(torch.bfloat16, (30, 513))
    eager = results(tensors)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for recompute in (False, True):
        monkeypatch.setitem(results.__globals__, "attend", compiled)
        again = results(tensors, recompute=recompute)
        assert all(torch.equal(a, b) for a, b in zip(eager, again, strict=True))


@pytest.mark.parametrize("V", [7, 257, 2048, 5000])
@pytest.mark.parametrize("dtype", ERROR)
def test_cross_entropy_and_its_gradient(dtype, V):
    logits = (20 * numbers(6, V)).to(dtype)
    logits[2] -= 1000  # far from what float32 can take the exponential of
    targets = torch.tensor([0, IGNORE, V - 1, V // 2, 3, 5], device=DEVICE)
    wide = logits.double().requires_grad_()
    right = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
    right.sum().backward()
    sheet = torch.full((8, V + 9), 7.0, dtype=dtype, device=DEVICE)  # rows that begin anywhere, others beside them
    mine = sheet[1:7, 4 : V + 4]
    mine.copy_(logits)
    alone, beside_gradient = (cross_entropy(mine.clone(), targets, IGNORE, needs_grad) for needs_grad in (False, True))
    # Two programs, which a GPU's compiler rounds by themselves: an ulp of 1 apart where almost nothing is left of it.
    ulp = 0 if DEVICE == "cpu" else 1.2e-7
    assert torch.allclose(alone, beside_gradient, rtol=ulp, atol=ulp)
    assert torch.equal(mine, logits)
    nats = cross_entropy(mine, targets, IGNORE, True)
    assert nats[1] == 0
    assert (nats.double() - right).abs().max() < 1e-4
    assert (mine[1] == 0).all()
    assert error(mine, wide.grad) < ERROR[dtype]
    mine.fill_(7)
    assert (sheet == 7).all()


@pytest.mark.parametrize("dtype", ERROR)
def test_loss_is_that_of_torch(monkeypatch, dtype):
    monkeypatch.setattr(loss_module, "KERNEL_BLOCK_BYTES", 2 * 300 * dtype.itemsize)  # two rows and one
    hidden, weight = (numbers(n, 16, seed=n).to(dtype).requires_grad_() for n in (5, 300))
    targets = torch.tensor([1, IGNORE, 299, 0, 17], device=DEVICE)
    found = []
    for on in (True, False):
        use_kernels(monkeypatch, on)
        loss = linear_cross_entropy(hidden, weight, targets)
        found.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for mine, right in zip(*found, strict=True):
        assert mine.dtype == right.dtype
        assert error(mine, right.double()) < ERROR[dtype]
