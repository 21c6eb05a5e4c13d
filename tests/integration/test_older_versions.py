"""What an older version wrote is read and resumed by this one; tests/assets/README.md says what it is."""

import csv

import pytest

from lit_modules.cli import main
from tests.conftest import ASSETS, write_corpus

OLD = ASSETS / "version-0.1"


def rows(path):
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) >= 6]


@pytest.fixture
def arguments(tmp_path):
    """Of a command on the old run's config, with its data where they are now."""
    write_corpus(tmp_path / "corpus.jsonl", 60)
    data = [f"--data.source={tmp_path / 'corpus.jsonl'}", f"--data.cache_dir={tmp_path / 'tokens'}"]
    return [f"--config={OLD / 'config.yaml'}", f"--ckpt_path={OLD / 'step-00000006.ckpt'}", *data]


def test_a_run_goes_on_with_the_same_losses(arguments, tmp_path):
    main(["fit", *arguments, f"--run_dir={tmp_path / 'run'}"])
    then, now = rows(OLD / "metrics.csv"), rows(tmp_path / "run/metrics.csv")
    assert len(then) == len(now) == 3
    for column in ("step", "train/loss", "train/lr", "train/grad_norm", "train/tokens", "val/loss", "val/raw_loss"):
        assert [float(row[column] or 0) for row in now] == pytest.approx([float(row[column] or 0) for row in then])


def test_a_model_is_exported(arguments, tmp_path):
    from tokenformer import from_pretrained

    main(["export", str(OLD / "step-00000006.ckpt"), "--out", str(tmp_path / "model")])
    assert from_pretrained(tmp_path / "model").num_params() == 7221
