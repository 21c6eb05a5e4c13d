"""`tokenformer shrink --by use | gradient`: what stays, the optimizer's state with it, and training on from there."""

import csv
import re
from pathlib import Path

import pytest
import torch

from lit_modules.cli import main
from lit_modules.modules.loading import load_model
from tests.integration.growing import checkpoint_of, config_of, contents, fit
from tests.integration.tiny import write_vision
from tokenformer import from_pretrained
from tokenformer.growth import pattention_layers

STAGES = [{"at_step": 2, "factor": 1.5}]
EMA = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5"]
QUICK = ["--trainer.limit_val_batches=0", "--best.save_top_k=0"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "shown.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


@pytest.mark.parametrize(("name", "by"), [("adamw", "gradient"), ("muon", "use")])
def test_a_pruned_run_goes_on_and_grows_again(corpus, text, tmp_path, capsys, name, by):
    options = [f"--model.optim.name={name}", *EMA, *QUICK]
    config = config_of(tmp_path, corpus, STAGES, init="anchored")
    main(fit(config, tmp_path / "run", *options, "--trainer.max_steps=4"))
    checkpoint, pruned = checkpoint_of(tmp_path / "run", 4), tmp_path / "pruned.ckpt"
    shown = ["--keep", "0.5", "--by", by, "--text", str(text)]
    main(["shrink", str(checkpoint), *shown, "--out", str(pruned)])
    saved = torch.load(pruned, weights_only=True)
    record = saved["growths"][-1]
    assert (record["init"], record["ffn_before"], record["ffn_after"]) == (by, "48", "24")
    ids = torch.tensor([[256, *text.read_bytes()]])  # bytes behind the end of another text, all of them one window
    losses = [load_model(path).loss(ids[:, :-1], ids[:, 1:]).item() for path in (checkpoint, pruned)]
    assert [record["loss_before"], record["loss_after"]] == pytest.approx(losses, rel=1e-5)
    assert f"loss {record['loss_before']:.4f} -> {record['loss_after']:.4f} nats" in capsys.readouterr().out
    (tmp_path / "it/checkpoints").mkdir(parents=True)
    pruned.rename(checkpoint_of(tmp_path / "it", 4))
    whole, left = contents(tmp_path / "run", 4), contents(tmp_path / "it", 4)
    assert whole.keys() == left.keys()
    places = {key: rows_of(whole[key], left[key]) for key in left if key.startswith("model.") and key.endswith(".keys")}
    moved = [key for key in left if ".segments." in key and left[key].ndim == 2]
    assert len(moved) == 40 * (4 if name == "adamw" else 3)  # weights, average, state
    for key in moved:  # the same rows of each of them
        kept = places[key.removeprefix("current.").replace(".values", ".keys").partition(".keys")[0] + ".keys"]
        assert torch.equal(left[key], whole[key][kept]), key
    config = config_of(tmp_path, corpus, [*STAGES, {"at_step": 5, "factor": 2}], init="anchored")
    main(fit(config, tmp_path / "on", *options, "--trainer.max_steps=7", resume=checkpoint_of(tmp_path / "it", 4)))
    layer = pattention_layers(load_model(checkpoint_of(tmp_path / "on", 7)))["backbone.blocks.0.ffn"]
    assert layer.num_tokens == 48
    assert len(layer.segments) == 3
    with (tmp_path / "on/growth.csv").open() as file:
        assert [row["ffn_after"] for row in csv.DictReader(file)] == ["48", "24", "48"]


@pytest.mark.parametrize("by", ["use", "gradient"])
def test_an_exported_model_of_images(images, tmp_path, capsys, by):
    main(fit(write_vision(tmp_path, images), tmp_path / "run", *QUICK, "--trainer.max_steps=2"))
    checkpoint = str(checkpoint_of(tmp_path / "run", 2))
    shown = ["--keep", "0.75", "--by", by, "--images", str(images / "val")]
    main(["shrink", checkpoint, *shown, "--out", str(tmp_path / "smaller")])
    model = from_pretrained(tmp_path / "smaller")
    assert (model.config.qkv_tokens, model.config.ffn_tokens) == (12, 24)
    said = capsys.readouterr().out
    assert re.search(r"^loss (0|1)\.\d{4} -> (0|1)\.\d{4} nats$", said, re.MULTILINE)
    assert f"{load_model(Path(checkpoint)).num_params():,} -> {model.num_params():,} parameters" in said
    assert (tmp_path / "smaller/class_map.txt").read_text() == "bright\ndark\ngrey\n"


def test_what_does_not_fit_is_refused(corpus, text, tmp_path):
    config = config_of(tmp_path, corpus, STAGES)
    options = ["--trainer.callbacks=[]", "--model.config.baseline=width", *QUICK, "--trainer.max_steps=2"]
    main(fit(config, tmp_path / "run", *options))
    checkpoint, shown = str(checkpoint_of(tmp_path / "run", 2)), ["--text", str(text)]
    (tmp_path / "there").mkdir()
    for options, message in (
        (["--keep", "0.5", *shown], "--by order: give --text FILE or --images FOLDER for use and gradient"),
        (["--keep", "0.5", "--by", "use"], "--by use: give --text FILE or --images FOLDER for use and gradient"),
        (["--keep", "2", "--by", "use", *shown], "keep=2.0: the share"),
        (["--keep", "0.5", "--by", "use", *shown], "is a baseline and has no parameter tokens"),
        (["--keep", "0.5", "--out", "x.ckpt"], "--out x.ckpt: a checkpoint is made of a checkpoint in one file"),
        (["--keep", "0.5", "--out", str(tmp_path / "there")], "there exists: choose another name"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["shrink", checkpoint, "--out", str(tmp_path / "x"), *options])


def rows_of(whole, left):
    """Which rows of a matrix another one has."""
    return [next(i for i, row in enumerate(whole) if torch.equal(row, kept)) for kept in left]
