"""Lightning's own options: each works, or is refused in a line before data is touched."""

import csv
import logging

import pytest
import torch

from lit_modules.cli import main
from tests.integration.growing import contents, difference, logged
from tests.integration.test_training import rows, write_config

EPOCHS = {"max_steps": -1, "limit_train_batches": 3, "log_every_n_steps": 1, "val_check_interval": 3}
RARELY = {"every_n_train_steps": 100}  # the last step is saved in any case


def fit(config, run, *options):
    main(["fit", "--config", str(config), "--run_dir", str(run), *options])
    return run


def saved(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step*"))


# What a run ends by: it has saved where it ended, and goes on from there.

EVERY_EPOCH = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
STOPPED = ["EarlyStopping", "monitor=train/loss", "stopping_threshold=100", "check_on_train_epoch_end=true"]
STOPPED = ["--trainer.callbacks=" + STOPPED[0], *(f"--trainer.callbacks.{setting}" for setting in STOPPED[1:])]


@pytest.mark.parametrize("validations", [{"limit_val_batches": 0}, EVERY_EPOCH], ids=["never", "every epoch"])
@pytest.mark.parametrize("end", [["--trainer.max_epochs=1"], STOPPED], ids=["max_epochs", "EarlyStopping"])
def test_a_run_ends_with_a_checkpoint_and_goes_on_from_there(corpus, tmp_path, end, validations):
    """From the best one too, which Lightning saves at the very end of an epoch."""
    config = write_config(tmp_path, corpus, trainer=EPOCHS | validations, checkpoint=RARELY)
    same = ["--model.optim.schedule=constant", "--checkpoint.save_top_k=-1", "--best.save_top_k=-1"]
    whole = fit(config, tmp_path / "whole", *same, "--trainer.max_epochs=2")
    parts = fit(config, tmp_path / "parts", *same, *end)
    assert saved(parts) == ["step-00000003.ckpt"]
    (first,) = parts.glob("checkpoints/best*") if validations is EVERY_EPOCH else parts.glob("checkpoints/*")
    fit(config, parts, *same, "--trainer.max_epochs=2", f"--ckpt_path={first}")
    assert saved(parts) == ["step-00000003.ckpt", "step-00000006.ckpt"]
    assert difference(whole, parts, 6) == 0
    ours, theirs = (logged(run) for run in (whole, parts))
    assert [step for step, _ in ours["train/loss"]] == list(range(6))
    assert ours == theirs


def test_a_run_that_is_told_to_stop_ends_after_the_step(corpus, tmp_path):
    """Not between its batches: what they have done to the gradients would be lost."""
    config = write_config(tmp_path, corpus, trainer={"limit_val_batches": 0}, checkpoint=RARELY)
    stop = ["--trainer.callbacks=tests.integration.kill.StopAt", "--trainer.callbacks.batch=3"]
    run = fit(config, tmp_path / "run", "--trainer.accumulate_grad_batches=4", "--data.batch_size=1", *stop)
    assert saved(run) == ["step-00000001.ckpt"]
    progress = torch.load(run / "checkpoints/step-00000001.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert progress["epoch_loop.batch_progress"]["current"]["ready"] == 4


def test_the_number_of_steps_follows_from_the_epochs(corpus, tmp_path, caplog):
    config = write_config(tmp_path, corpus, trainer=EPOCHS, checkpoint=RARELY)
    steps = fit(config, tmp_path / "steps", "--trainer.max_steps=6")
    epochs = fit(config, tmp_path / "epochs", "--trainer.max_epochs=2")
    assert rows(epochs, "train/lr") == rows(steps, "train/lr")
    assert difference(steps, epochs, 6) == 0
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit(config, epochs, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert "nothing was trained: the checkpoint is of step 6, where the run ends by trainer.max_epochs=2" in caplog.text


ENDS = {
    "epochs": (["--trainer.max_epochs=1"], "at step 3 of 100, ended by trainer.max_epochs=1"),
    "metric": (STOPPED, "at step 3 of 100, ended by EarlyStopping: Stopping threshold reached: train/loss"),
    "time": (["--trainer.max_time=00:00:00:00"], "step 0, where the run ends by trainer.max_time, after 0 s"),
}


@pytest.mark.parametrize(("end", "message"), ENDS.values(), ids=ENDS)
def test_a_run_that_ends_before_its_schedule_says_why(corpus, tmp_path, caplog, end, message):
    config = write_config(tmp_path, corpus, trainer=EPOCHS | {"max_steps": 100}, checkpoint=RARELY)
    with caplog.at_level(logging.INFO):
        fit(config, tmp_path / "run", *end)
    assert message in caplog.text
    decays = "the learning rate was to decay until step 100: it is higher than planned"
    assert (decays in caplog.text) == ("of 100" in message)


# A step that an epoch cuts short.


def test_the_last_step_of_an_epoch_weighs_its_batches(corpus, tmp_path):
    """An epoch of two batches: a step is that of a run which accumulates two, though this one accumulates four."""
    trainer = {"limit_val_batches": 0, "limit_train_batches": 2, "log_every_n_steps": 1, "max_steps": 3}
    config = write_config(tmp_path, corpus, trainer=trainer, checkpoint=RARELY)
    cut, whole = (
        fit(config, tmp_path / f"{number}", "--data.batch_size=1", f"--trainer.accumulate_grad_batches={number}")
        for number in (4, 2)
    )
    assert len(rows(cut, "train/loss")) == 3
    for column in ("train/loss", "train/grad_norm", "train/tokens"):
        assert dict(rows(cut, column)) == pytest.approx(dict(rows(whole, column)), rel=1e-5)
    ours, theirs = contents(cut, 3), contents(whole, 3)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-7)
