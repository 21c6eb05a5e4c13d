"""docs/from-elsewhere.md: each command of ours does what the page says, on tiny models."""

import io
import json
import re
import shlex
import shutil
import sys
from itertools import pairwise

import pytest
import timm
import torch
import yaml

from lit_modules.cli import main
from tests.conftest import ROOT
from tests.integration.tiny import rows, write_config, write_vision
from tokenformer import from_pretrained

HERE = [
    line.split("|")[2] for line in (ROOT / "docs/from-elsewhere.md").read_text().splitlines() if line.startswith("| ")
]
FOUND = dict.fromkeys(re.findall(r"`([^`]+)`", "\n".join(HERE)))
COMMANDS = [found.removeprefix("tokenformer ") for found in FOUND if found.startswith("tokenformer ")]
# test_evaluate.py runs it, in a process that has the harness already, which takes seconds to import.
COMMANDS.remove("evaluate models/mine --tasks piqa --local data/eval")
PYTHON = [found for found in FOUND if "(" in found]
# What makes it quick, or fit the tiny checkpoint.
MORE = {"generate": ["--max_new_tokens", "4"], "import": ["--num_heads", "4"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus, images, golden_lm):
    """A folder with all that the commands name."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("configs/language", "configs/vision", "texts", "models", "runs"):
        (folder / name).mkdir(parents=True)
    few = {"max_steps": 3, "val_check_interval": 3, "limit_val_batches": 2}
    language = write_config(folder / "configs/language", corpus, trainer=few, checkpoint={"every_n_train_steps": 3})
    language = language.rename(folder / "configs/language/quickstart.yaml")
    language.write_text(language.read_text().replace("warmup_steps: 2", "warmup_steps: 1"))
    tune = yaml.safe_load(language.read_text())
    tune["data"] = yaml.safe_load((ROOT / "configs/language/finetune.yaml").read_text())["data"]
    tune["data"]["init_args"] |= {"seq_len": 64, "batch_size": 4}
    (folder / "configs/language/finetune.yaml").write_text(yaml.safe_dump(tune))
    answers = [json.dumps({"instruction": f"Say {i}.", "output": str(i)}) for i in range(20)]
    (folder / "answers.jsonl").write_text("\n".join(answers))
    vision = write_vision(folder / "configs/vision", images).rename(folder / "configs/vision/cifar-10.yaml")
    steps = (
        vision.read_text()
        .replace("max_steps: 8", "max_steps: 3")
        .replace("val_check_interval: 4", "val_check_interval: 3")
    )
    vision.write_text(steps)
    (folder / "input.txt").write_text("\n".join(corpus[1]))
    shutil.copy(corpus[0], folder / "texts")
    (folder / "photos").symlink_to(images)
    (folder / "new").symlink_to(images / "val/dark")
    torch.save({k: v for k, v in golden_lm.items() if k.startswith("sequential.")}, folder / "pytorch_model.bin")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stops = "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"
        for config, out, *options in (
            (language, "runs/quickstart/first"),
            (vision, "runs/cifar-10/first", *stops),
        ):
            main(["fit", "--config", str(config), "--run_dir", out, *options])
        shutil.copytree("runs/quickstart/first", "runs/mine")
        (folder / "runs/mine/checkpoints/step-00000003.ckpt").rename("runs/mine/checkpoints/last.ckpt")
        main(["export", "runs/mine/checkpoints/last.ckpt", "--out", "models/mine"])
        main(["export", "runs/cifar-10/first/checkpoints/step-00000003.ckpt", "--out", "models/vit"])
    return folder


def test_the_page_has_commands_of_all_kinds():
    assert {command.split()[0] for command in COMMANDS} == {
        *("prepare", "fit", "validate", "predict", "generate", "import", "export")
    }
    assert len(PYTHON) == 6


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_a_command(place, command, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def \n"))
    name, *options = shlex.split(command)
    given = dict(pairwise(options))
    out = place / given.get("--out", given.get("--run_dir", tmp_path / "out"))
    own = ["--run_dir", str(out)] if name in ("fit", "validate", "predict") and "--run_dir" not in given else []
    resumes = name == "fit" and "--ckpt_path" in given
    if resumes:  # in its own folder, three more steps
        out, own = place / "runs/quickstart/first", ["--trainer.max_steps", "6"]
    if name == "validate":
        out, own = place / "runs/cifar-10", []
    main([name, *options, *own, *MORE.get(name, [])])
    assert not [warning for warning in recwarn if "callbacks used to create" in str(warning.message)]
    printed = capsys.readouterr().out
    if name == "fit":
        assert rows(out, "val/loss")[-1][0] == (5 if resumes else 2)
    elif name == "generate":
        assert len(printed) > 1
        assert printed.count("def ") == (0 if "--interactive" in options else int(given.get("--num_samples", 1)))
    elif name == "validate":
        assert (out / "results.csv").is_file()
    elif name == "predict":
        assert (out / "predictions.parquet").is_file()
    elif name in ("import", "export"):
        assert from_pretrained(out).config.depth == (3 if name == "import" else 2)


def test_python(place, monkeypatch):
    import peft
    import transformers

    import tokenformer.hf  # noqa: F401  (registers)

    monkeypatch.chdir(place)
    names = {"timm": timm} | {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "pipeline")}
    names |= {name: getattr(peft, name) for name in ("get_peft_model", "LoraConfig")}
    results = {}
    for expression in PYTHON:
        names["model"] = results.get("AutoModelForCausalLM")
        results[expression.partition(".from")[0]] = eval(expression, names)
    assert results[PYTHON[0]].num_classes == 10
    assert len(results) == 6
