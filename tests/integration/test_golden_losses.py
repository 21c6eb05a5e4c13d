"""The first hundred losses of a tiny run, in float64: a change that moves them changes results.

Remake after a change that is meant to: python -m tests.integration.test_golden_losses
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from lit_modules.cli import main
from tests.conftest import ASSETS, write_corpus
from tests.integration.tiny import rows, write_config

FILE = ASSETS / "golden_losses.json"
OPTIONS = ["--trainer.max_steps=100", "--trainer.log_every_n_steps=1", "--trainer.precision=64-true"]
OPTIONS += ["--trainer.val_check_interval=100", "--model.config.scale=learned", "--model.config.init=scaled"]


def losses(folder: Path) -> list[float]:
    corpus = folder / "corpus.jsonl"
    texts = write_corpus(corpus)
    config = write_config(folder, (corpus, texts))
    main(["fit", "--config", str(config), "--run_dir", str(folder / "run"), *OPTIONS])
    return [loss for _, loss in rows(folder / "run", "train/loss")]


def test_losses_are_the_golden_ones(tmp_path):
    golden = json.loads(FILE.read_text())
    assert len(golden) == 100
    assert golden[-1] < 0.8 * golden[0]
    assert losses(tmp_path) == pytest.approx(golden, rel=0, abs=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(losses(Path(folder))) + "\n")
    sys.exit()
