"""Two processes see the data once, and train the model that one process trains on the same batches."""

import subprocess
import sys

import pytest
import torch

from lit_modules.cli import main
from tests.conftest import ROOT
from tests.integration.processes import run_in_processes
from tests.integration.tiny import rows, write_config

DDP = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]


def test_two_processes_equal_one(corpus, tmp_path):
    config = write_config(tmp_path, corpus, trainer={"log_every_n_steps": 1})
    command = ["fit", "--config", str(config), "--model.config.scale=learned", "--trainer.precision=64-true"]
    command += [f"--data.val_sources={{more: {corpus[0]}}}"]
    main([*command, "--run_dir", str(tmp_path / "one"), "--data.batch_size=4"])
    process = [sys.executable, "-m", "lit_modules.cli", *command, *DDP, "--run_dir", str(tmp_path / "two")]
    result = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    for column in ("train/loss", "train/grad_norm", "val/loss", "val/bits_per_byte", "val/entropy", "val/more/loss"):
        one, two = rows(tmp_path / "one", column), rows(tmp_path / "two", column)
        assert [step for step, _ in one] == [step for step, _ in two], column
        assert [v for _, v in two] == pytest.approx([v for _, v in one], rel=1e-6), column
    for column in ("train/tokens", "train/flops"):
        assert rows(tmp_path / "one", column) == rows(tmp_path / "two", column)
    weights = [torch.load(tmp_path / n / "checkpoints/step-00000008.ckpt", weights_only=True) for n in ("one", "two")]
    for name, tensor in weights[0]["state_dict"].items():
        torch.testing.assert_close(weights[1]["state_dict"][name], tensor, rtol=1e-9, atol=1e-9)

    # A run that is only evaluated finds the newest checkpoint once, and all its processes use that one.
    last = ["--ckpt_path=last", "--name=experiment", f"--trainer.default_root_dir={tmp_path}"]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "two").rename(tmp_path / "experiment" / "run")
    run_in_processes([["validate", *command[1:], *DDP, *last]])
    (validated,) = (tmp_path / "experiment").glob("*-validate")
    trained = rows(tmp_path / "experiment" / "run", "val/loss")[-1][1]
    assert rows(validated, "val/loss")[-1][1] == pytest.approx(trained, rel=1e-9)
