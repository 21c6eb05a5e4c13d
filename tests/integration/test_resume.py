"""A run that was killed and resumed ends with the same bits as one that was not."""

import csv
import os
import warnings
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from lit_modules.callbacks.checkpoint import RunCheckpoint
from lit_modules.cli import main
from tests.integration.tiny import rows, write_config

# 90 batches an epoch of 2 micro-batches of 4: 12 steps are 24 batches, so the kill comes in the middle of an epoch;
# seq_len 256 has 4 batches an epoch, so it comes in the middle of the third.
OPTIONS = {
    "plain": [],
    "EMA, accumulation, several epochs": [
        "--trainer.callbacks+=EMA",
        "--trainer.callbacks.decay=0.9",
        "--trainer.accumulate_grad_batches=2",
        "--data.seq_len=256",
    ],
    "bf16-mixed, learned tau, workers": [
        "--trainer.precision=bf16-mixed",
        "--model.config.scale=learned",
        "--data.num_workers=2",
    ],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_killed_and_resumed_equals_uninterrupted(corpus, tmp_path, options):
    validating = "EMA" in str(options)
    step = 8 if validating else 7
    config = write_config(tmp_path, corpus, trainer={"max_steps": 12, "log_every_n_steps": 1})
    command = ["fit", "--config", str(config), *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main([*command, "--run_dir", str(whole)])
    kill = ["--trainer.callbacks+=tests.integration.kill.KillAt", f"--trainer.callbacks.step={step}"]
    kill += [f"--trainer.callbacks.validating={str(validating).lower()}"]
    process = get_context("fork").Process(target=main, args=([*command, *kill, "--run_dir", str(killed)],))
    process.start()
    process.join(120)
    assert process.exitcode == -9
    assert [path.name for path in (killed / "checkpoints").glob("step-*")] == ["step-00000004.ckpt"]
    main([*command, "--run_dir", str(killed), "--ckpt_path", "last"])

    for column in ("train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/flops", "val/loss"):
        assert rows(killed, column) == rows(whole, column), column
    assert len(rows(whole, "train/loss")) == 12
    ends = [torch.load(run / "checkpoints/step-00000012.ckpt", weights_only=True) for run in (whole, killed)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "current_model_state", "averaging_state", "loops"):
        assert_same(ends[0].get(key), ends[1].get(key), key)
    assert ("current_model_state" in ends[0]) == ("EMA" in str(options))


def assert_same(a, b, where):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif "param_names" not in where:
        assert a == b, where


@pytest.fixture
def finished(corpus, tmp_path):
    config = write_config(tmp_path, corpus, trainer={"max_steps": 8})
    run_dir = tmp_path / "run"
    main(["fit", "--config", str(config), "--run_dir", str(run_dir), "--model.optim.schedule=constant"])
    return config, run_dir


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_corrupted_checkpoint_is_passed_over(finished, damage):
    config, run_dir = finished
    for path in (run_dir / "checkpoints").glob("*8.ckpt"):
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    arguments = ["--config", str(config), "--run_dir", str(run_dir), "--ckpt_path", "last"]
    with pytest.warns(UserWarning, match="step-00000008.ckpt is passed over"):
        main(["fit", *arguments, "--model.optim.schedule=constant", "--trainer.max_steps", "10"])
    with (run_dir / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == [1, 3, 5, 7, 9]  # from step 4 on they were made again, none is there twice


def test_a_leftover_of_an_interrupted_save_is_not_a_checkpoint(finished, tmp_path):
    config, run_dir = finished
    (run_dir / "checkpoints" / "step-00000009.ckpt.partial").write_bytes(b"half")
    arguments = ["--config", str(config), "--ckpt_path", "last", "--run_dir", str(run_dir)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        from lit_modules.checkpoints.validation import latest_valid

        assert latest_valid((run_dir / "checkpoints").glob("*.ckpt")).name.endswith("00000008.ckpt")
    main(["fit", *arguments, "--trainer.max_steps", "10", "--model.optim.schedule=constant"])
    assert (run_dir / "checkpoints" / "step-00000010.ckpt").exists()


def test_last_finds_the_newest_run_of_the_experiment_and_goes_on_there(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, corpus)
    command = ["fit", "--config", str(config), "--model.optim.schedule=constant"]
    main([*command, "--trainer.max_steps", "4"])
    main([*command, "--trainer.max_steps", "4"])
    newest = max((tmp_path / "runs/tiny").iterdir(), key=lambda run: run.stat().st_mtime_ns)
    main([*command, "--ckpt_path", "last"])
    assert len(list((tmp_path / "runs/tiny").iterdir())) == 2
    assert [step for step, _ in rows(newest, "train/loss")] == [1, 3, 5, 7]


def test_settings_of_the_command_line_win_over_the_checkpoint(finished, tmp_path):
    """Lightning's own command line would silently take the checkpoint's hyperparameters."""
    config, run_dir = finished
    checkpoint = run_dir / "checkpoints/step-00000004.ckpt"
    changed = tmp_path / "changed"
    arguments = ["--config", str(config), "--run_dir", str(changed), "--ckpt_path", str(checkpoint)]
    asked = ["--model.optim.weight_decay=0.3", "--model.optim.lr=0.0005", "--model.optim.betas=[0.8,0.9]"]
    main(["fit", *arguments, "--model.optim.schedule=constant", *asked])
    saved = torch.load(changed / "checkpoints/step-00000008.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["optim"]["weight_decay"] == 0.3
    matrices, vectors = saved["optimizer_states"][0]["param_groups"]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    for group in (matrices, vectors):
        assert group["lr"] == 0.0005
        assert tuple(group["betas"]) == (0.8, 0.9)
    assert [lr for _, lr in rows(changed, "train/lr")] == pytest.approx([0.0005] * 2)


def test_average_is_not_trained_on_as_if_it_were_the_weights(corpus, tmp_path):
    config = write_config(tmp_path, corpus, trainer={"max_steps": 4})
    command = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--model.optim.schedule=constant"]
    main([*command, "--trainer.callbacks=EMA"])
    with pytest.raises(ValueError, match="trained with EMA, this run is not: add"):
        main([*command, "--ckpt_path=last", "--trainer.max_steps=8"])
    main([*command, "--ckpt_path=last", "--trainer.max_steps=8", "--trainer.callbacks=EMA"])


def test_resume_with_other_batches_loses_and_repeats_nothing(corpus, tmp_path):
    """From 1 batch of 4 sequences a step to 2 of 2, in the middle of an epoch of 9 steps: the same steps and epochs."""
    trainer = {"max_steps": -1, "max_epochs": 1, "log_every_n_steps": 1, "limit_val_batches": 0}
    config = write_config(tmp_path, corpus, trainer=trainer, checkpoint={"every_n_train_steps": 7})
    command = ["fit", "--config", str(config), "--trainer.precision=64-true", "--data.seq_len=512"]
    main([*command, "--run_dir", str(tmp_path / "whole")])
    checkpoint = tmp_path / "whole/checkpoints/step-00000007.ckpt"
    other = ["--data.batch_size=2", "--trainer.accumulate_grad_batches=2"]
    main([*command, *other, "--run_dir", str(tmp_path / "other"), "--ckpt_path", str(checkpoint)])
    for column in ("train/loss", "train/grad_norm", "train/tokens", "epoch"):
        expected = rows(tmp_path / "whole", column)
        assert len(expected) == 9
        assert [step for step, _ in rows(tmp_path / "other", column)] == [7, 8]
        found = [value for _, value in rows(tmp_path / "other", column)]
        assert found == pytest.approx([value for _, value in expected[7:]], rel=1e-9), column


def test_a_truncated_checkpoint_that_was_asked_for_is_named(finished, tmp_path):
    config, run_dir = finished
    path = run_dir / "checkpoints/step-00000008.ckpt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="step-00000008.ckpt.*truncated.*`last` takes the newest valid one"):
        main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "new"), "--ckpt_path", str(path)])


def test_a_resumed_run_keeps_no_more_checkpoints_than_any_other(corpus, tmp_path, monkeypatch):
    """Not the one that it went on from, nor a corrupted one, nor those of a folder that was named in another way."""
    config = write_config(tmp_path, corpus, checkpoint={"every_n_train_steps": 2})
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    command = ["fit", "--config", str(config), "--ckpt_path=auto", "--model.optim.schedule=constant", "--run_dir"]
    saved = []
    good = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]  # at the first validation
    good += ["--trainer.callbacks.stopping_threshold=100", "--trainer.val_check_interval=1"]
    for folder, *options in (
        ("run", *good),
        ("run", "--trainer.max_steps=4"),
        (str(run), "--trainer.max_steps=8"),
    ):
        main([*command, folder, *options])
        saved.append({path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("best")})
        for path in (run / "checkpoints").glob("*4.ckpt"):
            path.write_bytes(b"half")
    assert saved == [{f"step-0000000{step}.ckpt" for step in steps} for steps in ((1,), (2, 4), (6, 8))]
    assert [path.name for path in (run / "checkpoints").glob("best*")] == ["best-step-00000008.ckpt"]


@pytest.mark.parametrize("command", ["fit", "submit"])
def test_a_run_folder_that_cant_be_made_is_named(corpus, tmp_path, command, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    config = write_config(tmp_path, corpus)
    time, options = (["--time=1"], ["--"]) if command == "submit" else ([], [])
    with pytest.raises(ValueError, match=r"run_dir.*tiny.yaml/run: can't be written to \(Not a directory\)"):
        main([command, "--config", str(config), *time, "--run_dir", str(config / "run")])
    for name in ("../elsewhere", "a/../../b", str(tmp_path / "elsewhere")):
        with pytest.raises(ValueError, match=f"name={name}: is a folder in trainer.default_root_dir: without"):
            main([command, "--config", str(config), *time, *options, "--name", name])


def test_what_a_killed_process_had_still_to_remove_is_removed(finished, tmp_path):
    """After a resume there are as many as `save_top_k` says, in a folder that was moved too."""
    config, run = finished
    moved = run.rename(tmp_path / "moved") / "checkpoints"
    for name in ("step-00000002.ckpt", "best-step-00000004.ckpt", "mine.ckpt"):
        (moved / name).write_bytes((moved / "step-00000004.ckpt").read_bytes())
    command = ["fit", "--config", str(config), "--run_dir", str(moved.parent), "--model.optim.schedule=constant"]
    with pytest.raises(ValueError, match=r"step-00000004.ckpt: the run has (best-)?step-00000008.ckpt too"):
        main([*command, f"--ckpt_path={moved}/step-00000004.ckpt", "--trainer.max_steps=12"])
    found = []
    for steps, kept in ((12, 2), (16, 1)):
        for best in moved.glob("best-step*"):  # resumed is from the other one of that step, which was saved before it
            os.utime(best, (1, 1))
        main([*command, "--ckpt_path=last", f"--trainer.max_steps={steps}", f"--checkpoint.save_top_k={kept}"])
        found.append({path.stem.removeprefix("step-0000") for path in moved.iterdir()})
    assert found == [
        {"0008", "0012", "best-step-00000012", "mine"},
        {"0016", "best-step-00000016", "mine"},
    ]


@pytest.mark.parametrize(("step", "first"), [(8, "checkpoint"), (4, "best")])
def test_a_kill_between_the_two_saves_of_a_step_costs_neither(corpus, tmp_path, monkeypatch, step, first):
    """Of the last step too, after which a resumed run has nothing to train but a curve to draw."""
    config = write_config(tmp_path, corpus, checkpoint={"save_top_k": 1})
    command = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--ckpt_path=auto"]
    command += ["--trainer.callbacks=LossCurve"]
    if first == "best":  # without a validation, which comes before the save of the step itself
        command += ["--best.monitor=train/loss", "--best.every_n_train_steps=4", "--trainer.limit_val_batches=0"]
    save = RunCheckpoint._save_checkpoint

    def killed(self, trainer, path):
        if trainer.global_step == step and ("best" in path) == (first == "checkpoint"):
            raise Killed
        save(self, trainer, path)

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "_save_checkpoint", killed)
        with pytest.raises(Killed):
            main(command)
    main([*command, "--trainer.max_steps=8"])
    main([*command[:3], "--run_dir", str(tmp_path / "whole"), *command[5:]])
    files = {run: {p.name for p in (tmp_path / run).rglob("*") if "tfevents" not in p.name} for run in ("run", "whole")}
    assert files["run"] == files["whole"]
    assert {"step-00000008.ckpt", "best-step-00000008.ckpt", "loss.png"} <= files["run"]
    for name in ("step-00000008.ckpt", "best-step-00000008.ckpt"):
        ends = [torch.load(tmp_path / run / "checkpoints" / name, weights_only=True) for run in ("whole", "run")]
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
            assert_same(ends[0][key], ends[1][key], key)
        for one, other in zip(*(end["callbacks"].items() for end in ends), strict=True):
            if "Checkpoint" in one[0]:
                assert one[0] == other[0]
                assert [Path(path).name for path in one[1]["best_k_models"]] == [
                    Path(path).name for path in other[1]["best_k_models"]
                ]


class Killed(BaseException):
    pass
