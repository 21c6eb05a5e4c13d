"""Each way to make a model larger: which function and how many parameters it has then."""

import pytest
import torch

from studies import pretraining, widening
from studies.widening import build, larger, run

EXACT = {"anchored": True, "net2net": True, "hypercloning": True, "orthogonal": True, "none": True} | dict.fromkeys(
    ("zero padding", "stacking"), False
)


def parameters_of_blocks(model):
    return sum(p.numel() for name, p in model.named_parameters() if ".blocks." in name and p.ndim == 2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(pretraining, "SIZES", {"0.1M": (1, 16, 2)})


@pytest.mark.parametrize("method", EXACT)
def test_what_is_learned_is_there_in_four_times_the_parameters(tiny, method):
    model = build("tokenformer" if method == "anchored" else "transformer", 0)
    with torch.no_grad():
        for name, p in model.named_parameters():  # as after a training
            p.add_(torch.randn_like(p) * (0.1 if "norm" in name else (p.std() if p.numel() > 1 else 0)))
    ids = torch.randint(257, (2, 32))
    before, size = model(ids), parameters_of_blocks(model)
    wide = larger(model, method, seed=0)
    assert parameters_of_blocks(wide) == (1 if method == "none" else 4) * size
    moved = (wide(ids) - before).norm() / before.norm()
    assert (moved < 1e-4) == EXACT[method], moved
    wide(ids).square().mean().backward()
    blocks = [p.grad for name, p in wide.named_parameters() if ".blocks." in name]
    assert all(grad is not None and grad.isfinite().all() for grad in blocks)
    learns = [bool(grad.any()) for grad in blocks]
    assert all(learns) or method == "anchored"  # whose new keys wait for their values, a step


def test_a_row_counts_its_flops(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(widening, "BASES", tmp_path)
    monkeypatch.setattr(widening, "STEPS", 50)
    monkeypatch.setattr(widening, "STAGE", 30)
    rows = {method: run("transformer", method, "muon", 8e-3, 0) for method in ("net2net", "none")}
    base, wide = (widening.step_flops(build("transformer", 0, whole)) for whole in (False, True))
    assert rows["none"]["flops"] == 80 * base
    assert rows["net2net"]["flops"] == 50 * base + 30 * wide
    assert rows["none"]["before"] == rows["none"]["after"] > rows["none"]["loss"]
    scratch = {budget: run("transformer", "scratch", "muon", 8e-3, 0, budget) for budget in ("stage", "flops")}
    assert scratch["stage"]["flops"] == 30 * wide
    assert scratch["flops"]["flops"] == pytest.approx(rows["net2net"]["flops"], abs=wide / 2)
    grown, whole = (run("tokenformer", method, "muon", 8e-3, 0, "stage") for method in ("anchored", "scratch"))
    assert grown["params"] == whole["params"]
    assert parameters_of_blocks(build("tokenformer", 0, whole=True)) == parameters_of_blocks(
        build("transformer", 0, whole=True)
    )


def test_hypercloning_has_noise_10_db_below_the_halves(tiny):
    model = build("transformer", 0)
    wide = larger(model, "hypercloning", seed=0)
    old, new = (m.backbone.blocks[0].ffn.up.weight for m in (model, wide))
    left, right = new.chunk(2, dim=1)
    torch.testing.assert_close(left + right, old.repeat(2, 1))
    noise = (left - right).detach() / 2
    assert 20 * torch.log10((old.detach() / 2).std() / noise.std()) == pytest.approx(10, abs=1)
    left, right = wide.lm_head.weight.chunk(2, dim=1)
    assert torch.equal(left, right)
