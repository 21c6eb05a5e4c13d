"""The loss in blocks: against the plain one, in each precision, and what it holds."""

import pytest
import torch
from torch.nn import functional as F

from tokenformer import LMConfig, TokenFormerLM

TINY = {"vocab_size": 100, "depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 64}


def test_loss_equals_the_plain_one_in_every_block_size(monkeypatch):
    import tokenformer.loss as loss_module

    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(**TINY, vocab_multiple=64)).double()
    ids, targets = torch.randint(0, 100, (3, 10)), torch.randint(0, 100, (3, 10))
    targets[0, 3:] = -100
    plain = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(plain, list(model.parameters()))
    for size in (2**25, 700, 1):
        monkeypatch.setattr(loss_module, "BLOCK_LOGITS", size)
        loss = model.loss(ids, targets)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert abs(loss - plain) < 1e-14
        for mine, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-14)
        nats, entropy = model.nats_and_entropy(ids, targets)
        assert abs(nats.sum() / 23 - plain) < 1e-14
        probabilities = model(ids).softmax(-1)
        exact = -(probabilities * probabilities.log()).sum(-1).where(targets != -100, 0)
        torch.testing.assert_close(entropy, exact, rtol=0, atol=1e-13)


def test_loss_follows_autocast():
    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(**TINY))
    ids = torch.randint(0, 100, (3, 11))
    exact = model.loss(ids[:, :-1], ids[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss - exact) < 1e-2
    assert model.embedding.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("num_tokens", [40, 4000])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_float16_gradients_survive_the_loss_scale(num_tokens, scale):
    from tokenformer.loss import linear_cross_entropy

    torch.manual_seed(0)
    hidden, weight = torch.randn(num_tokens, 32), torch.randn(300, 32) * 0.1
    targets = torch.randint(0, 300, (num_tokens,))
    exact = [t.clone().requires_grad_() for t in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].T, targets).backward()
    ours = [t.clone().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = linear_cross_entropy(*ours, targets)
    (loss * scale).backward()
    for mine, right in zip(ours, exact, strict=True):
        error = (mine.grad / scale - right.grad).norm() / right.grad.norm()
        assert error < (3e-3 if scale > 1 else 5e-2)


def test_loss_never_holds_the_full_logits():
    """Peak memory of forward and backward, by the allocations that autograd's profiler sees."""
    from torch.profiler import ProfilerActivity, profile

    from tokenformer.loss import linear_cross_entropy

    T, D, V = 16384, 8, 8192
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    targets = torch.randint(0, V, (T,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        linear_cross_entropy(hidden, weight, targets).backward()
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < 0.8 * 4 * T * V
