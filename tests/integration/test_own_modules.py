"""Modules of a user's own beside ours, an optimizer of their own, sizes that are given though the data settles them."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import yaml

from lit_modules.cli import main
from lit_modules.modules.classes import match_initial
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
    new = [name for name in end["state_dict"] if name.endswith(".segments.1.values")]
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
def test_data_of_ones_own_trains_our_model(corpus, tmp_path, kind, monkeypatch):
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
    predicted = []  # as a callback of the user's own would have them
    hook = lambda self, trainer, module, outputs, *_: predicted.append(outputs)  # noqa: E731
    monkeypatch.setattr("lit_modules.callbacks.FreeSpace.on_predict_batch_end", hook)
    main(["predict", "--config", str(run / "config.yaml"), last, "--run_dir", str(tmp_path / "p")])
    (total, rest) = (16 * 32, ()) if kind == "language" else (16, (3,))
    values = torch.cat([outputs["nats" if kind == "language" else "probabilities"] for outputs in predicted])
    assert values.shape == (total, *rest)
    assert kind == "language" or values.sum(1).tolist() == pytest.approx([1.0] * 16)


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
    """Fewer classes than the folder's, or others: `fit` says that the classifier is new, `validate` refuses it."""
    given = json.loads(json.dumps(TINY_VISION))
    given["data"]["init_args"] |= {"source": "digits"}
    given["trainer"] |= {"max_steps": 1, "limit_val_batches": 1, "val_check_interval": 1}
    given["model"]["init_args"]["optim"] |= {"warmup_steps": 0}
    sizes = given["model"]["init_args"]["config"] | {"image_size": given["data"]["init_args"]["image_size"]}
    for command, names in (("test", "abc"), ("validate", "abcdefghij")):
        model = TokenFormerViT(ViTConfig(**sizes | {"num_classes": len(names)}))
        torch.nn.init.constant_(model.head.weight, 9.0)
        save_pretrained(model, tmp_path / names)
        (tmp_path / names / "class_map.txt").write_text("\n".join(names))
        given["model"]["init_args"]["init_from"] = str(tmp_path / names)
        config = tmp_path / "tiny.yaml"
        config.write_text(yaml.safe_dump(given))
        with pytest.raises(ValueError, match=r"has other classes than the 10 of data.source \(0, 1, .* one: train it"):
            main([command, "--config", str(config), "--run_dir", str(tmp_path / command)])
    with caplog.at_level("INFO"):
        run = fit(config, tmp_path / "run")
    assert "the classifier is new" in caplog.text
    last = f"--ckpt_path={run / 'checkpoints/step-00000001.ckpt'}"
    head = torch.load(run / "checkpoints/step-00000001.ckpt", weights_only=True)["state_dict"]["model.head.weight"]
    assert head.abs().max() < 1
    main(["validate", "--config", str(config), last, "--run_dir", str(tmp_path / "trained")])
    assert rows(tmp_path / "trained", "val/top1")


def test_classes_of_a_checkpoint_to_start_from(tmp_path):
    """Of a file, of a folder with a class map, of one whose config says them: data take their order, if they can."""

    class Data:
        class_names = ("cat", "dog")

        def set_class_order(self, names):
            self.class_names = names

    model = TokenFormerViT(ViTConfig(**TINY_VISION["model"]["init_args"]["config"] | {"num_classes": 2}))
    for names, same in ((["dog", "cat"], True), (["dog", "cow"], False)):
        model.pretrained_cfg = {"label_names": names}
        save_pretrained(model, folder := tmp_path / names[1])
        sizes = {"hyper_parameters": {"config": asdict(model.config)}, "class_names": names}
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save(sizes | {"state_dict": weights}, tmp_path / "model.ckpt")
        for source in (folder, tmp_path / "model.ckpt"):
            assert match_initial(str(source), data := Data()) == same
            assert data.class_names == (names if same else Data.class_names)
