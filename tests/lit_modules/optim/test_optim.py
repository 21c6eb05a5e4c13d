"""Which parameters decay, and what the learning rate is at each step."""

import math

import pytest
import torch
from timm.optim import param_groups_layer_decay

from lit_modules.modules.language import LanguageModule
from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.groups import make_optimizer, param_groups
from lit_modules.optim.schedule import lr_factor, lr_scheduler
from tokenformer import LMConfig, TokenFormerLM, ViTConfig, grow

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


@pytest.mark.parametrize("name", [None, "test_vit"])
def test_layer_decay_is_timms(name):
    """Same rate and decay of every parameter as in timm's own groups; as many groups after growth."""
    config = ViTConfig(image_size=16, patch_size=8, depth=3, dim=16, num_heads=2, num_classes=4, scale="learned")
    module = VisionModule(config, OptimConfig(weight_decay=0.3, layer_decay=0.5), timm_model=name)
    module.configure_model()
    groups = module.param_groups()
    found = {n: (group["lr_scale"], group["weight_decay"]) for group in groups for n, _ in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(module.parameters()))
    expected = param_groups_layer_decay(
        module.model, 0.3, no_weight_decay_list=module.model.no_weight_decay(), layer_decay=0.5
    )
    for group in expected:
        for name_in_model, p in module.model.named_parameters():
            if any(p is other for other in group["params"]):
                assert found[f"model.{name_in_model}"] == (group["lr_scale"], group["weight_decay"]), name_in_model
    if name is None:
        assert found["model.position"] == (0.5**4, 0.0)
        assert found["model.head.weight"] == (1.0, 0.3)
        assert found["model.backbone.blocks.0.ffn.segments.0.keys"] == (0.5**3, 0.3)
        grow(module.model, ffn=3000)
        assert len(module.param_groups()) == len(groups)
        module.old_lr_scale = 0.1
        module.growths = [{"new": ["backbone.blocks.0.ffn.segments.1.keys"]}]
        rates = {n: group["lr_scale"] for group in module.param_groups() for n, _ in group["params"]}
        assert rates["model.backbone.blocks.0.ffn.segments.1.keys"] == 0.5**3
        assert rates["model.backbone.blocks.0.ffn.segments.0.keys"] == pytest.approx(0.1 * 0.5**3)


def test_layer_decay_needs_a_model_that_names_its_layers():
    module = LanguageModule(LMConfig(**SMALL), OptimConfig(layer_decay=0.5))
    module.configure_model()
    with pytest.raises(ValueError, match="layer_decay=0.5"):
        module.param_groups()


def test_adamw_has_the_published_numbers():
    optimizer = make_optimizer(param_groups(TokenFormerLM(LMConfig(**SMALL)), 0.1), OptimConfig(), fused=False)
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


def test_moments_of_another_shape_are_refused():
    """The fused update would read past them."""
    one, other = (torch.nn.Linear(4, size) for size in (2, 3))
    optimizers = [make_optimizer(param_groups(model, 0.1), OptimConfig()) for model in (one, other)]
    one(torch.randn(1, 4)).sum().backward()
    optimizers[0].step()
    with pytest.raises(ValueError, match=r"trained weight with the shape \(2, 4\), now it has \(3, 4\)"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
