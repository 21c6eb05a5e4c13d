"""The precision matrix on a GPU: every precision x one device, DDP, FSDP2, each growing and resumed.

Without a GPU the cells but 16-mixed run in test_growing_in_processes.py.
"""

import csv

import pytest
import torch

from lit_modules.cli import main
from tests.integration.growing import checkpoint_of, config_of, fit, logged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none here")


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_grows_and_resumes(corpus, tmp_path, strategy, precision):
    config = config_of(tmp_path, corpus, trainer={"accelerator": "gpu", "devices": 1})
    options = [f"--trainer.strategy={strategy}", f"--trainer.precision={precision}"]
    main(fit(config, tmp_path / "whole", *options))
    assert len(list(csv.DictReader((tmp_path / "whole/growth.csv").open()))) == 2
    for step in (6, 8):
        run = tmp_path / f"from-{step}"
        main(fit(config, run, *options, resume=checkpoint_of(tmp_path / "whole", step)))
        for column, pairs in logged(tmp_path / "whole", step).items():
            assert dict(logged(run)[column]) == pytest.approx(dict(pairs), rel=1e-3), (step, column)
