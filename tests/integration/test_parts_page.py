"""The commands with which docs/parts.md begins, run as they stand there."""

import csv
import re
import shlex
import subprocess

import torch
from safetensors.torch import load_file

from lit_modules.cli import main
from tests.conftest import ROOT
from tokenformer import from_pretrained


def test_the_twenty_lines_run(tmp_path, monkeypatch, capsys):
    block = re.search(r"## In twenty lines.*?```\n(.*?)```", (ROOT / "docs/parts.md").read_text(), re.S)[1]
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 20
    for name in ("configs", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    said = {}
    for line in lines:
        if line.startswith("tokenformer "):
            command = shlex.split(line, comments=True)[1:]
            small = command[0] == "fit" and "configs/language" in line  # a quarter of the text is enough for a test
            main([*command, *(["--data.batch_size=4"] if small else [])])
        else:
            subprocess.run(line, shell=True, check=True)
        said[line] = capsys.readouterr().out
    base, left = (load_file(f"models/{name}/model.safetensors") for name in ("base", "without"))
    assert base.keys() == left.keys()
    assert all(torch.equal(left[name], tensor) for name, tensor in base.items())
    texts = [text for line, text in said.items() if " generate " in line]
    assert len(texts) == 2
    assert texts[0] != texts[1]
    sizes = {name: from_pretrained(f"models/{name}").num_params() for name in ("base", "merged", "pruned", "half")}
    assert sizes["half"] < sizes["base"] < sizes["merged"] > sizes["pruned"]
    assert "loss " in next(text for line, text in said.items() if "--by use" in line)
    assert (tmp_path / "inside/index.html").stat().st_size > 50_000
    rows = list(csv.DictReader((tmp_path / "runs/digits/continual.csv").open()))
    assert [row["phase"] for row in rows] == ["start", "first", "second"]
    assert float(rows[1]["first/top1"]) > 0.9
    assert float(rows[2]["top1/forgetting"]) > 0.5
