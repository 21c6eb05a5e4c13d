"""Lightning's own options: each works, or is refused in a line before data is touched."""

import logging

import pytest
import torch
from lightning import Trainer

from datamodules.text import TextDataModule
from lit_modules.callbacks import EMA
from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from lit_modules.optim.config import OptimConfig
from lit_modules.runs.errors import RunError
from tests.integration.growing import contents, difference, logged
from tests.integration.kill import KeepWeights
from tests.integration.tiny import rows, write_config
from tokenformer import LMConfig

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
    parts = fit(config, tmp_path / "parts", "--trainer.max_epochs=9", *same, *end)
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


# Options.

FOUR = {"max_steps": 4, "log_every_n_steps": 1, "val_check_interval": 2, "limit_val_batches": 1}


def callback(name, *settings):
    return [f"--trainer.callbacks={name}", *(f"--trainer.callbacks.{setting}" for setting in settings)]


WORK = [
    ["--trainer.enable_checkpointing=false"],
    ["--trainer.val_check_interval=00:00:00:00"],
    ["--trainer.val_check_interval=0.5", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=4"],
    ["--trainer.min_epochs=1", "--trainer.min_steps=2", "--trainer.num_sanity_val_steps=0"],
    ["--trainer.limit_train_batches=0.5", "--trainer.logger=false", "--trainer.log_every_n_steps=0"],
    ["--trainer.deterministic=true", "--trainer.benchmark=true", "--trainer.use_distributed_sampler=false"],
    ["--trainer.detect_anomaly=true", "--trainer.profiler=simple", "--trainer.inference_mode=false"],
    ["--trainer.sync_batchnorm=true", "--trainer.enable_model_summary=true", "--trainer.precision=64-true"],
    [*callback("RichProgressBar"), "--trainer.enable_progress_bar=true"],
    [*callback("TQDMProgressBar"), "--trainer.enable_progress_bar=true"],
    [*callback("DeviceStatsMonitor"), "--trainer.callbacks+=LearningRateMonitor"],
    [*callback("ModelSummary"), "--trainer.callbacks+=RichModelSummary"],
    callback("ThroughputMonitor", "batch_size_fn=builtins.len"),
    callback("ModelCheckpoint", "filename=own"),
    callback("EarlyStopping", "monitor=val/loss"),
]


KEEP = "--trainer.callbacks+=tests.integration.kill.KeepWeights"


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """The sum of the weights that a run without further options ends with."""
    folder = tmp_path_factory.mktemp("plain")
    fit(write_config(folder, corpus, trainer=FOUR, checkpoint=RARELY), folder / "run", KEEP)
    return KeepWeights.total


@pytest.mark.parametrize("options", WORK, ids=" ".join)
def test_an_option_works(corpus, tmp_path, plain, options):
    """And does nothing to the weights."""
    config = write_config(tmp_path, corpus, trainer=FOUR, checkpoint=RARELY)
    run = fit(config, tmp_path / "run", *options, KEEP)
    assert KeepWeights.step == 4
    assert bool(saved(run)) == ("--trainer.enable_checkpointing=false" not in options)
    if "--trainer.precision=64-true" not in options:
        assert KeepWeights.total == plain


REFUSED = {
    "barebones": (["--trainer.barebones=true"], "trainer.barebones=True: a run writes a log"),
    "value": (["--trainer.gradient_clip_algorithm=value"], "gradient_clip_algorithm=value: only 'norm'"),
    "reload": (["--trainer.reload_dataloaders_every_n_epochs=1"], "would repeat the same samples"),
    "no batches": (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0: must be at least 1"),
    "half a step": (["--trainer.accumulate_grad_batches=3"], "no multiple of trainer.accumulate_grad_batches=3"),
    "clock": (
        ["--trainer.val_check_interval=00:00:10:00", "--trainer.accumulate_grad_batches=2"],
        "val_check_interval=00:00:10:00: is a time, .* in the middle of a step",
    ),
    "clocks": (
        ["--trainer.val_check_interval=00:00:10:00", "--trainer.devices=2", "--trainer.strategy=ddp"],
        "val_check_interval=00:00:10:00: is a time, and each process has its own clock",
    ),
    "spawn": (["--trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn: use ddp"),
    "fsdp": (["--trainer.strategy=fsdp"], "trainer.strategy=fsdp: use fsdp2"),
    "deepspeed": (["--trainer.strategy=deepspeed_stage_2"], "trainer.strategy=deepspeed_stage_2: use fsdp2"),
    "two minds": (callback("RichProgressBar"), "enable_progress_bar=False. but found .RichProgressBar"),
    "endless": (["--trainer.max_steps=-1"], "trainer.max_steps=-1: the run would not end"),
    "SWA": (callback("StochasticWeightAveraging", "swa_lrs=0.01"), "StochasticWeightAveraging copies .* use EMA"),
    "averaging": (callback("EMAWeightAveraging"), "EMAWeightAveraging does not grow: use EMA"),
    "rate": (callback("LearningRateFinder"), "LearningRateFinder replaces the schedule .* a model.optim.lr each"),
    "batch": (callback("BatchSizeFinder"), "BatchSizeFinder finds .*: set data.batch_size"),
    "accumulation": (
        callback("GradientAccumulationScheduler", "scheduling={0: 2}"),
        "GradientAccumulationScheduler .*: set trainer.accumulate_grad_batches",
    ),
    "timer": (callback("Timer", "duration=00:01:00:00"), "Timer can.t be given: use trainer.max_time"),
    "exception": (
        callback("OnExceptionCheckpoint", "dirpath=x"),
        "OnExceptionCheckpoint saves in the middle of a step",
    ),
    "pruning": (callback("ModelPruning", "pruning_fn=l1_unstructured"), "ModelPruning .*: prune an exported model"),
    "finetuning": (callback("BackboneFinetuning"), "BackboneFinetuning freezes in .setup., before there is a model"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_an_option_is_refused_before_data_is_touched(corpus, tmp_path, monkeypatch, options, message):
    config = write_config(tmp_path, corpus, trainer=FOUR)
    monkeypatch.setattr("datamodules.text.TextDataModule.prepare_data", lambda _: pytest.fail("data was touched"))
    with pytest.raises(ValueError, match=message):
        fit(config, tmp_path / "run", *options)


WRONG_METRIC = {
    "misspelt": (["monitor=val/los"], {}, "'val/los' is not logged: did you mean 'val/loss'"),
    "not validated first": (["monitor=val/x"], {"num_sanity_val_steps": 0}, "'val/x' is not logged: .*val/loss"),
    "no validation": (["monitor=val/loss"], {"limit_val_batches": 0}, "this run makes no validations"),
    "of training": (
        ["monitor=train/x", "check_on_train_epoch_end=true"],
        {"limit_train_batches": 2},
        "train/x.*train/loss",
    ),
}


@pytest.mark.parametrize(("settings", "trainer", "message"), WRONG_METRIC.values(), ids=WRONG_METRIC)
def test_a_metric_that_is_not_logged_is_named(corpus, tmp_path, settings, trainer, message):
    config = write_config(tmp_path, corpus, trainer=FOUR | trainer)
    with pytest.raises((ValueError, RunError), match=message):
        fit(config, tmp_path / "run", *callback("EarlyStopping", *settings))


def test_overfit_batches_repeats_the_same_batches(corpus, tmp_path):
    """What people try first; the same numbers when it is resumed in the middle of a pass over them."""
    config = write_config(tmp_path, corpus, trainer=FOUR | {"max_steps": 6, "limit_val_batches": 1.0})
    same = ["--trainer.overfit_batches=2", "--model.optim.lr=1e-9", "--checkpoint.every_n_train_steps=3"]
    run = fit(config, tmp_path / "run", *same)
    losses = [round(loss, 5) for _, loss in rows(run, "train/loss")]
    assert losses == losses[:2] * 3
    assert losses[0] != losses[1]
    resumed = fit(config, tmp_path / "resumed", *same, f"--ckpt_path={run / 'checkpoints/step-00000003.ckpt'}")
    assert rows(resumed, "train/loss") == rows(run, "train/loss")[3:]


def test_a_validation_after_a_training_with_an_average_names_it_once(corpus, tmp_path):
    """`val/raw_loss` is that of the weights themselves, which the end of the training has replaced."""
    data = TextDataModule(source=str(corpus[0]), seq_len=32, batch_size=4, cache_dir=str(tmp_path / "tokens"))
    sizes = {"depth": 1, "dim": 32, "num_heads": 2, "qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 32}
    module = LanguageModule(LMConfig(vocab_size=257, **sizes), OptimConfig(warmup_steps=1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=4, callbacks=[EMA()], limit_val_batches=2, val_check_interval=2, **quiet)
    trainer.fit(module, data)
    assert "val/raw_loss" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    (found,) = trainer.validate(module, data, verbose=False)
    assert "val/loss" in found
    assert "val/raw_loss" not in found

    # Nor do other weights afterwards meet that training's average: they are evaluated as by any other trainer.
    other = Trainer(limit_val_batches=2, limit_test_batches=2, **quiet)
    trainer.limit_test_batches = 2
    state = torch.load(tmp_path / "averaged.ckpt", weights_only=True)
    for part in state["current_model_state"].values():
        part.zero_()  # the weights themselves, which no evaluation asks for
    torch.save(state, tmp_path / "averaged.ckpt")
    for evaluate in (Trainer.validate, Trainer.test):
        ours, theirs = (evaluate(t, module, data, tmp_path / "averaged.ckpt", verbose=False) for t in (trainer, other))
        assert ours == theirs
    with torch.no_grad():
        for part in module.parameters():
            part.mul_(2)
    ours, theirs = (t.validate(module, data, verbose=False) for t in (trainer, other))
    assert ours == theirs
    assert ours != [found]
