"""What is frozen, by `model.train` and by growth; models of timm with weights of their own."""

from types import SimpleNamespace

import pytest
import timm
import torch

from lit_modules.growth.structure import freeze
from lit_modules.modules.language import LanguageModule
from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.trained import trained_after_growth, trained_names
from tests.lit_modules.modules.tiny_module import CONFIG, module
from tokenformer import LMConfig


def trains(made):
    return {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}


def test_a_probe_of_a_timm_model(tmp_path):
    """Its classifier goes by another name; statistics of frozen norms stay; a growth of another kind thaws nothing."""
    source = timm.create_model("test_resnet", num_classes=3, drop_rate=0.5)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    weights = {"file": str(tmp_path / "weights.pth"), "num_classes": 3}
    made = module("head", timm_model="test_resnet", timm_args={"pretrained": True, "pretrained_cfg_overlay": weights})
    assert trains(made) == {"fc.weight", "fc.bias"}
    for name, tensor in source.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], tensor) != name.startswith("fc."), name
    made.train()
    made.model(torch.randn(4, 3, 16, 16)).sum().backward()
    assert {name for name, p in made.model.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}
    assert torch.equal(made.model.bn1.running_mean, source.bn1.running_mean)


def test_growth_and_patterns_agree_on_what_is_frozen():
    made = module(["*.blocks.0.*", "head.*"])
    chosen = {name for name, _ in made.model.named_parameters() if ".blocks.0." in name or name.startswith("head.")}
    assert trains(made) == chosen
    new = ["backbone.blocks.0.ffn.segments.0.keys", "backbone.blocks.1.ffn.segments.0.keys"]
    for how, expected in (("new", {new[0]}), ("all", chosen)):
        made.growths = [{"train": how, "new": new}]
        freeze(made)
        assert trains(made) == expected
    made = module("all")
    made.growths = [{"train": "new", "new": new}]
    freeze(made)
    assert trains(made) == set(new)
    assert made.model.backbone.blocks[0].drop_path.training  # as ever: old and new tokens share their blocks


def test_names_of_a_language_model():
    made = LanguageModule(LMConfig(vocab_size=9, depth=2, dim=8, num_heads=1), OptimConfig(), train="*.1.ffn.*")
    made._trainer = SimpleNamespace()
    made.configure_model()
    assert trains(made) == {f"backbone.blocks.1.ffn.segments.0.{part}" for part in ("keys", "values")}
    for train, message in (
        ("head", "model.train=head: only image models have a classifier"),
        (["all", "backbone.norn.*"], r"model.train='backbone.norn.\*': no parameter .* such as backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            trained_names(made.model, train)
    with pytest.raises(ValueError, match="^train=head: only image models"):
        trained_after_growth(made.model, ["new", "head"], [])


def test_a_probe_of_a_random_backbone_is_refused():
    for arguments in ({}, {"timm_model": "test_vit"}, {"timm_model": "test_vit", "timm_args": {"pretrained": False}}):
        with pytest.raises(ValueError, match="model.train=head: needs trained features: give model.init_from"):
            VisionModule(CONFIG, OptimConfig(), train="head", **arguments)


def test_flops_are_counted_without_reading_weights(tmp_path, monkeypatch):
    torch.save(timm.create_model("test_vit", num_classes=3, img_size=16).state_dict(), tmp_path / "weights.pth")
    made = module("all", timm_model="test_vit", timm_args={"checkpoint_path": str(tmp_path / "weights.pth")})
    (tmp_path / "weights.pth").unlink()
    assert made.training_flops((torch.zeros(2, 3, 16, 16), None)) > 0


def test_a_file_of_weights_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="model.timm_model='test_vit' with .*nowhere.*: no such file"):
        module(timm_model="test_vit", timm_args={"checkpoint_path": "nowhere"})
