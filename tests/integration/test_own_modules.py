"""Modules of a user's own beside ours, an optimizer of their own, sizes that are given though the data settles them."""

import json
import math

import pytest
import torch
import yaml

from lit_modules.cli import main
from tests.integration.own_modules import OwnOptimizer
from tests.integration.test_lightning_options import FOUR, fit, saved
from tests.integration.tiny import TINY_VISION, rows, write_config
from tokenformer import TokenFormerViT, ViTConfig
from tokenformer.interop import save_pretrained

GROW = {
    "class_path": "GrowParameterTokens",
    "init_args": {"stages": [{"at_step": 3, "factor": 2.0}], "schedule": "continue"},
}


def grown_by(corpus, folder, monkeypatch, kind):
    monkeypatch.setattr(OwnOptimizer, "kind", kind)
    config = write_config(folder, corpus, trainer=FOUR | {"max_steps": 6, "callbacks": [GROW]})
    given = yaml.safe_load(config.read_text())
    given["model"]["class_path"] = "tests.integration.own_modules.OwnOptimizer"
    config.write_text(yaml.safe_dump(given | {"checkpoint": {"every_n_train_steps": 1, "save_top_k": -1}}))
    return config


@pytest.mark.parametrize("kind", ["SGD", "Lion", "AdamW"])
def test_an_optimizer_of_ones_own_takes_up_new_tokens(corpus, tmp_path, monkeypatch, kind):
    """They are trained, and a resumed run, which asks for the optimizer at the grown size, has the same bits."""
    config = grown_by(corpus, tmp_path, monkeypatch, kind)
    run = fit(config, tmp_path / "run")
    start, end = (torch.load(run / f"checkpoints/step-0000000{step}.ckpt", weights_only=True) for step in (4, 6))
    new = [name for name in end["state_dict"] if name.endswith(".segments.1.keys")]
    assert len(new) == 2 * 5
    assert all((end["state_dict"][name] != start["state_dict"][name]).any() for name in new)
    fit(config, tmp_path / "resumed", f"--ckpt_path={run / 'checkpoints/step-00000004.ckpt'}")
    again = torch.load(tmp_path / "resumed/checkpoints/step-00000006.ckpt", weights_only=True)
    torch.testing.assert_close(again["state_dict"], end["state_dict"], rtol=0, atol=0)
    ours, theirs = (saved["optimizer_states"][0]["state"] for saved in (end, again))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_an_optimizer_that_can_not_grow_is_refused_before_the_training(corpus, tmp_path, monkeypatch):
    config = grown_by(corpus, tmp_path, monkeypatch, "LBFGS")
    with pytest.raises(ValueError, match="LBFGS can't take up the parameters of a model that grows"):
        fit(config, tmp_path / "run")
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_groups_that_depend_on_the_size_are_refused(corpus, tmp_path, monkeypatch):
    config = grown_by(corpus, tmp_path, monkeypatch, "more groups")
    with pytest.raises(ValueError, match=r"made \d+ groups of parameters, and \d+ when asked again"):
        fit(config, tmp_path / "run")


def test_a_model_of_ones_own_trains_on_our_data(corpus, tmp_path):
    config = write_config(tmp_path, corpus, trainer=FOUR)
    given = yaml.safe_load(config.read_text())
    given["model"] = {"class_path": "tests.integration.own_modules.Bigram"}
    config.write_text(yaml.safe_dump(given))
    run = fit(config, tmp_path / "run")
    assert len(rows(run, "train/loss")) == 4
    assert rows(run, "val/loss")[-1][1] < math.log(257) + 0.5
    best = f"--ckpt_path={run / 'checkpoints/step-00000004.ckpt'}"
    main(["validate", "--config", str(run / "config.yaml"), best, "--run_dir", str(tmp_path / "v")])
    assert rows(tmp_path / "v", "val/loss")


@pytest.mark.parametrize("kind", ["language", "vision"])
def test_data_of_ones_own_trains_our_model(corpus, tmp_path, kind):
    config = write_config(tmp_path, corpus, trainer=FOUR)
    given = yaml.safe_load(config.read_text())
    given["data"] = {"class_path": f"tests.integration.own_modules.{'Tokens' if kind == 'language' else 'Images'}"}
    if kind == "vision":
        given["model"]["class_path"] = "VisionModule"
        given["model"]["init_args"]["config"] |= {"num_classes": 3, "image_size": 16, "patch_size": 8}
    else:
        given["model"]["init_args"]["config"]["vocab_size"] = 64
    config.write_text(yaml.safe_dump(given))
    run = fit(config, tmp_path / "run")
    assert rows(run, "train/loss")[0][1] == pytest.approx(math.log(64 if kind == "language" else 3), abs=0.5)
    last = f"--ckpt_path={run / 'checkpoints/step-00000004.ckpt'}"
    main(["test", "--config", str(run / "config.yaml"), last, "--run_dir", str(tmp_path / "t")])
    assert rows(tmp_path / "t", "test/loss")


SIZES = {
    "another": (["--model.config.vocab_size=100"], "vocab_size=100, but the data has 257: leave it out"),
    "the default, given": (["--model.config.vocab_size=50304"], "vocab_size=50304, but the data has 257"),
    "the same": (["--model.config.vocab_size=257"], None),
}


@pytest.mark.parametrize(("options", "message"), SIZES.values(), ids=SIZES)
def test_a_size_that_the_data_overrules_is_an_error(corpus, tmp_path, options, message):
    config = write_config(tmp_path, corpus, trainer=FOUR | {"max_steps": 1})
    if message is None:
        assert saved(fit(config, tmp_path / "run", *options, "--model.optim.warmup_steps=0"))
        return
    with pytest.raises(ValueError, match=message):
        fit(config, tmp_path / "run", *options)


def test_a_classifier_that_nobody_has_trained_is_not_evaluated(tmp_path, caplog):
    """Another number of classes than the folder's: `fit` says that the classifier is new, `validate` refuses it."""
    given = json.loads(json.dumps(TINY_VISION))
    given["data"]["init_args"] |= {"source": "digits"}
    given["trainer"] |= {"max_steps": 1, "limit_val_batches": 1, "val_check_interval": 1}
    given["model"]["init_args"]["optim"] |= {"warmup_steps": 0}
    sizes = given["model"]["init_args"]["config"] | {"image_size": given["data"]["init_args"]["image_size"]}
    save_pretrained(TokenFormerViT(ViTConfig(**sizes | {"num_classes": 3})), tmp_path / "model")
    given["model"]["init_args"]["init_from"] = str(tmp_path / "model")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(given))
    for command in ("validate", "test"):
        with pytest.raises(ValueError, match="has other classes than the 10 of data.source.* random one: train it"):
            main([command, "--config", str(config), "--run_dir", str(tmp_path / command)])
    with caplog.at_level("INFO"):
        run = fit(config, tmp_path / "run")
    assert "the classifier is new" in caplog.text
    last = f"--ckpt_path={run / 'checkpoints/step-00000001.ckpt'}"
    main(["validate", "--config", str(config), last, "--run_dir", str(tmp_path / "trained")])
    assert rows(tmp_path / "trained", "val/top1")
