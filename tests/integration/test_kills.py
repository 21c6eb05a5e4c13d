"""A few of the random kills of kills.py; docs/reliability.md has the table of many."""

import subprocess
import sys

from tests.conftest import ROOT


def test_runs_that_are_killed_at_random_end_as_one_that_was_not(tmp_path):
    cases = ["asynchronous saves, EMA", "DDP"]
    command = [sys.executable, "-m", "tests.integration.kills", "--runs", "2", "--seed", "12", "--cases", *cases]
    run = subprocess.run([*command, "--out", str(tmp_path / "kills.csv")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 of 2 equal" in run.stdout
    assert (tmp_path / "kills.csv").read_text().count("SIG") >= 2
