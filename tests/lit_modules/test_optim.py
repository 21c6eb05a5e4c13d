"""Which parameters decay, and what the learning rate is at each step."""

import math

import pytest
import torch

from lit_modules.optim import OptimConfig, adamw, lr_factor, lr_scheduler, param_groups
from tokenformer import LMConfig, TokenFormerLM

SMALL = {"vocab_size": 20, "depth": 2, "dim": 16, "num_heads": 2}


@pytest.mark.parametrize("variant", [{"scale": "learned", "norm_affine": True}, {"baseline": "width"}, {}])
def test_every_parameter_is_in_exactly_one_group(variant):
    model = TokenFormerLM(LMConfig(**SMALL | variant, tie_embeddings=False))
    groups = param_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, kept = ([name for name, _ in group["params"]] for group in groups)
    assert sorted(decayed + kept) == sorted(name for name, _ in model.named_parameters())
    for name in decayed:
        assert name.endswith((".keys", ".values", "embedding.weight", "lm_head.weight")) or "baseline" in variant
    for name in kept:
        assert "norm" in name or name.endswith("tau_gain")
    assert "backbone.norm.weight" in kept
    assert "embedding.weight" in decayed


def test_frozen_parameters_are_in_no_group():
    model = TokenFormerLM(LMConfig(**SMALL))
    model.embedding.requires_grad_(False)
    names = [name for group in param_groups(model, 0.1) for name, _ in group["params"]]
    assert "embedding.weight" not in names


def test_adamw_has_the_published_numbers():
    optimizer = adamw(param_groups(TokenFormerLM(LMConfig(**SMALL)), 0.1), OptimConfig(), fused=False)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (6e-4, (0.9, 0.95), 1e-8)


def test_cosine_goes_up_then_down_to_its_floor():
    factor = lr_factor(OptimConfig(schedule="cosine", warmup_steps=9, min_lr_ratio=0.1), max_steps=109)
    assert [factor(step) for step in (0, 4, 8)] == pytest.approx([0.1, 0.5, 0.9])
    assert factor(9) == 1.0
    assert factor(59) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(34) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(109) == factor(500) == pytest.approx(0.1)


def test_wsd_is_level_and_goes_down_at_the_end():
    factor = lr_factor(OptimConfig(schedule="wsd", warmup_steps=9, min_lr_ratio=0.0, decay_fraction=0.2), max_steps=100)
    assert factor(0) == pytest.approx(0.1)
    assert [factor(step) for step in (9, 50, 80)] == [1.0, 1.0, 1.0]
    assert factor(90) == pytest.approx(0.5)
    assert factor(100) == 0.0


def test_phases_that_do_not_fit_are_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    wsd = OptimConfig(schedule="wsd", warmup_steps=50, decay_fraction=0.9)
    with pytest.raises(ValueError, match=r"warmup_steps=50 and the 90 steps of optim\.decay_fraction=0\.9 don't fit"):
        lr_scheduler(optimizer, wsd, 100)
    lr_scheduler(optimizer, OptimConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.9), 100)
    with pytest.raises(ValueError, match="warmup_steps=100 don't fit into trainer.max_steps=100"):
        lr_scheduler(optimizer, OptimConfig(warmup_steps=100), 100)


def test_constant_stays():
    factor = lr_factor(OptimConfig(schedule="constant", warmup_steps=1), max_steps=10)
    assert [factor(step) for step in (0, 1, 10, 1000)] == [0.5, 1.0, 1.0, 1.0]


def test_scheduler_follows_the_factor():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    config = OptimConfig(lr=2.0, warmup_steps=3)
    scheduler = lr_scheduler(optimizer, config, 10)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == 2.0 * lr_factor(config, 10)(step)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"schedule": "linear"}, "optim.schedule='linear': choose cosine, wsd or constant"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1"),
        ({"min_lr_ratio": 2.0}, "optim.min_lr_ratio=2.0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)
