"""The operator where its numbers leave their range, and derivatives that it does not have."""

import pytest
import torch
from torch.autograd import forward_ad

from tests.tokenformer.test_pattention import KINDS, L2_KINDS, random_inputs, transcription
from tokenformer import pattention


def with_gradients(operator, inputs, tau, dtype=torch.float64):
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    tau = torch.tensor([tau], dtype=torch.float64, requires_grad=True)
    out = operator(*leaves, tau)
    weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
    return [t.double() for t in (out, *torch.autograd.grad((out.double() * weight).sum(), [*leaves, tau]))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.0, 1e-30, -1e-22, 1e-19, -1e-12, -1.5])
def test_a_tau_near_zero_gives_what_the_formula_gives(tau, dtype):
    inputs = random_inputs(dtype)
    right = with_gradients(transcription, inputs, tau)
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for mine, formulas in zip(with_gradients(pattention, inputs, tau, dtype), right, strict=True):
        assert (mine - formulas).norm() <= accuracy * formulas.norm() + 1e-14


@pytest.mark.parametrize("kind", L2_KINDS)
def test_scores_whose_squares_leave_float32(kind):
    """Too large: NaN, which stops a run, where zeros would train on in silence. Too small: zeros, as documented."""
    x, keys, values = (t.detach() for t in random_inputs())
    x_64 = torch.cat([size * x.double() for size in (1, 1e20, 1e-24, 0)])
    x = x_64.float().requires_grad_()
    out = pattention(x, keys, values, score_norm=kind)
    normal, large, small, zero = out.split(10)
    assert large.isnan().all()
    assert not small.any()
    assert not zero.any()
    assert torch.equal(normal, pattention(x[:10], keys, values, score_norm=kind))
    (grad,) = torch.autograd.grad(normal.sum() + small.sum() + zero.sum(), x)
    assert grad[:10].isfinite().all()
    assert not grad[20:].any()
    wide = pattention(x_64, keys.double(), values.double(), score_norm=kind)
    assert wide.isfinite().all()
    if kind == "l2_norm_gelu":  # whose result does not depend on the magnitude
        torch.testing.assert_close(wide[10:30], wide[:10].repeat(2, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("constant", [True, False])
def test_second_derivatives_are_refused_or_right(constant):
    x, keys, values = random_inputs(torch.float64, T=3, D_in=4, N=6, D_out=5)
    for kind in KINDS:
        out = pattention(x, keys, values, score_norm=kind)
        loss = out.sum() if constant else (out**2).sum()
        if kind == "l2_norm_gelu":
            with pytest.raises(ValueError, match="create_graph=True: l2_norm_gelu has no second derivatives"):
                torch.autograd.grad(loss, x, create_graph=True)
        else:
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            assert torch.autograd.grad((grad**2).sum(), keys)[0].abs().sum() > 0
    assert torch.autograd.gradgradcheck(lambda *args: pattention(*args, score_norm="gelu_l2_norm"), (x, keys, values))


def test_transforms_that_differentiate_are_refused_in_a_sentence():
    x, keys, values = (t.detach() for t in random_inputs())
    refused = pytest.raises(
        ValueError, match=r"no derivatives in torch.func and in forward mode: use torch.autograd.grad"
    )
    with refused:
        torch.func.grad(lambda x: pattention(x, keys, values).sum())(x)
    with refused:
        torch.func.jvp(lambda x: pattention(x, keys, values), (x,), (x,))
    for tokens in (values, values.clone().requires_grad_()):
        with forward_ad.dual_level(), refused:
            pattention(forward_ad.make_dual(x, x), keys, tokens)
    mapped = torch.func.vmap(lambda x: pattention(x, keys, values))(x[:, None])
    torch.testing.assert_close(mapped[:, 0], pattention(x, keys, values))
