"""Images on two processes: they train and count as one does."""

import csv

import pytest
import torch

from lit_modules.cli import main
from tests.integration.growing import checkpoint_of, difference, fit, saving
from tests.integration.processes import run_in_processes
from tests.integration.tiny import GROW_ONCE, rows, write_vision


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, images):
    """Runs of two processes: DDP, FSDP2 with an average and a timm model; and DDP's validation."""
    folder = tmp_path_factory.mktemp("two")
    config = write_vision(folder, images, [GROW_ONCE])
    shared = ["--trainer.devices=2", "--data.batch_size=2", "--model.config.drop_path=0", *saving(every=4)]
    ema = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9"]
    whole = ["--trainer.strategy=FSDP2", "--trainer.strategy.save_distributed_checkpoint=false"]
    plain = write_vision(folder, images).rename(folder / "plain.yaml")
    config = write_vision(folder, images, [GROW_ONCE])
    run_in_processes(
        [
            fit(config, folder / "ddp", *shared, "--trainer.strategy=ddp", "--trainer.precision=64-true"),
            fit(config, folder / "fsdp", *shared, *whole, *ema),
            fit(plain, folder / "timm", *shared, *whole, "--model.timm_model=test_vit", "--trainer.max_steps=2"),
            fit(plain, folder / "norms", *shared, *ema, "--model.timm_model=test_resnet", "--trainer.max_steps=4"),
            [
                *["validate", "--config", str(config), "--run_dir", str(folder / "validated"), *shared],
                *[
                    "--trainer.strategy=ddp",
                    "--trainer.precision=64-true",
                    "--ckpt_path",
                    str(checkpoint_of(folder / "ddp", 8)),
                ],
            ],
        ]
    )
    return folder


def test_two_processes_train_and_count_as_one(two_processes, images, tmp_path):
    config = write_vision(tmp_path, images, [GROW_ONCE])
    precise, average = ["--trainer.precision=64-true"], ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9"]
    for name, options, tolerance in (("ddp", precise, 1e-10), ("fsdp", average, 1e-3)):  # Adam enlarges roundings
        main(fit(config, tmp_path / name, "--model.config.drop_path=0", *options, *saving(every=8)))
        assert difference(tmp_path / name, two_processes / name, 8) < tolerance
        for column in ("val/loss", "val/top1", "val/top5", "val/raw_loss", "val/raw_top1"):
            alone, both = (dict(rows(run, column)) for run in (tmp_path / name, two_processes / name))
            assert both == pytest.approx(alone, rel=1e-4), column
    (row,) = csv.DictReader((two_processes / "validated" / "results.csv").open())
    assert row["count"] == "23"  # 12 of one process and 11 of the other
    assert float(row["top1"]) == pytest.approx(100 * rows(tmp_path / "ddp", "val/top1")[-1][1], abs=1e-3)
    assert len(rows(two_processes / "timm", "train/loss")) == 2


def test_statistics_of_a_norm_are_those_of_the_first_process(two_processes, images, tmp_path):
    """Of the weights that are validated beside their average, too: what is logged is what the checkpoint has."""
    saved = torch.load(checkpoint_of(two_processes / "norms", 4), weights_only=True)
    saved["state_dict"] = saved.pop("current_model_state")
    torch.save(saved, tmp_path / "raw.ckpt")
    command = ["validate", "--config", str(write_vision(tmp_path, images)), "--ckpt_path", str(tmp_path / "raw.ckpt")]
    main([*command, "--model.timm_model=test_resnet", "--run_dir", str(tmp_path / "run")])
    alone = rows(tmp_path / "run", "val/loss")[-1][1]
    assert rows(two_processes / "norms", "val/raw_loss")[-1][1] == pytest.approx(alone, rel=1e-5)
