"""A run that is told to stop saves at the end of a step; what starts again in its folder goes on from there."""

import errno
import multiprocessing
import os
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from datamodules.loader import loading
from lit_modules.callbacks import Preemption
from lit_modules.cli import main
from lit_modules.runs import signals
from tests.integration.test_resume import assert_same
from tests.integration.tiny import rows, write_config

SIGNAL_AT = "tests.integration.signalling.SignalAt"
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
STEP |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_JOB_NAME": "tiny"}


def told_at(step, name):
    return [f"--trainer.callbacks+={SIGNAL_AT}", f"--trainer.callbacks.step={step}", f"--trainer.callbacks.name={name}"]


@pytest.fixture(autouse=True)
def ctrl_c_counts():
    """Even where the tests run in the background, for which a shell ignores it."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_stopped_and_resumed_equals_uninterrupted(corpus, tmp_path, name, code, caplog):
    """Told after step 5, so with a gradient accumulated at the next batch; it stops after step 6, at a validation."""
    caplog.set_level("INFO")
    config = write_config(tmp_path, corpus, trainer={"log_every_n_steps": 1, "accumulate_grad_batches": 2})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ["fit", "--config", str(config), "--checkpoint.every_n_train_steps=100", "--ckpt_path=auto"]
    main([*command, "--run_dir", str(whole)])
    with pytest.raises(SystemExit) as ended:
        main([*command, "--run_dir", str(stopped), *told_at(5, name)])
    assert ended.value.code == code
    assert signals._note not in [signal.getsignal(each) for each in signals.EXIT_CODES]
    assert [path.name for path in (stopped / "checkpoints").glob("step-*")] == ["step-00000006.ckpt"]
    assert rows(stopped, "val/loss") == rows(whole, "val/loss")[:3]
    assert (stopped / "requeue").exists() == (name == "SIGUSR1")
    how = f"in {stopped}; to go on, add --run_dir {stopped} --ckpt_path last to the command"
    assert f"{name}: saved and stopped after step 6, {how}" in caplog.text
    main([*command, "--run_dir", str(stopped)])
    for column in ("train/loss", "train/tokens", "val/loss"):
        assert rows(stopped, column) == rows(whole, column), column
    ends = [torch.load(run / "checkpoints/step-00000008.ckpt", weights_only=True) for run in (whole, stopped)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert_same(ends[0][key], ends[1][key], key)


def test_a_disk_that_refuses_the_checkpoint_is_not_called_saved(corpus, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lit_modules.checkpoints.writing.write_checkpoint", full)
    config = write_config(tmp_path, corpus)
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="could not be written"), caplog.at_level("INFO"):
        main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), *told_at(2, "SIGTERM")])
    assert re.search(r"SIGTERM: stopped, NOT saved \(checkpoint .*No space.*after step 3", caplog.text)


def test_told_at_its_last_step_a_run_ends_as_always(corpus, tmp_path):
    config = write_config(tmp_path, corpus)
    main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), *told_at(8, "SIGUSR1")])
    assert not (tmp_path / "run" / "requeue").exists()


def test_sigterm_before_the_training_ends_the_process_and_sigusr1_waits():
    with signals.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.requested() == signal.SIGUSR1
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.code == 143
        signals.set_training(True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested() == signal.SIGUSR1  # the first
    assert signals.requested() == 0


@pytest.mark.parametrize(("times", "code"), [(1, 7), (2, 130)])
def test_a_second_ctrl_c_ends_at_once(times, code, capfd):
    def train():
        with signals.listening():
            signals.set_training(True)
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(7 if signals.requested() == signal.SIGINT else 8)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert "once more ends at once, without saving" in capfd.readouterr().err


def test_ctrl_c_before_the_training_ends_it_and_is_left_alone_where_it_is_ignored():
    with signals.listening(), pytest.raises(SystemExit, match="130"):
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_task_of_a_job_has_the_folder_of_that_job_and_goes_on_in_it(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, corpus)
    command = ["fit", "--config", str(config), "--model.optim.schedule=constant", "--checkpoint.every_n_train_steps=2"]
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "runs/tiny/slurm-77.0"
    main([*command, "--ckpt_path=auto", "--trainer.max_steps=2"])
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002.ckpt"]
    with pytest.raises(ValueError, match=r"run_dir=runs/tiny/slurm-77.0 holds a run already"):
        main(command)
    main([*command, "--ckpt_path=auto", "--trainer.max_steps=4"])
    assert [step for step, _ in rows(run, "train/loss")] == [1, 3]
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    main([*command, "--ckpt_path=auto", "--trainer.max_steps=2"])  # requeued before its first checkpoint: anew
    assert [step for step, _ in rows(run, "train/loss")] == [1]
    monkeypatch.setenv("SLURM_JOB_ID", "78")  # another job
    main([*command, "--ckpt_path=auto", "--trainer.max_steps=2"])
    assert (tmp_path / "runs/tiny/slurm-78.0/checkpoints/step-00000002.ckpt").exists()


def _answers(rank, folder, told, answers):
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    callback = Preemption("run")
    callback._group = dist.new_group(backend="gloo")
    seen = []
    for step in range(6):
        signals._requested = signals._requested or told[rank].get(step, 0)
        seen.append(int(callback._agree()))
        if rank == step % 2:
            time.sleep(0.1)  # neither waits for the other
    answers.put((rank, seen))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([{}, {2: signal.SIGTERM}], [0, 0, 0, 15, 15, 15]),
        ([{1: signal.SIGTERM}, {3: signal.SIGUSR1}], [0, 0, 15, 15, 10, 10]),
    ],
)
def test_what_one_process_hears_all_know_at_the_same_step(tmp_path, told, expected):
    fork = multiprocessing.get_context("fork")  # imports nothing anew
    answers = fork.Queue()
    processes = [fork.Process(target=_answers, args=(rank, tmp_path, told, answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert found == {0: expected, 1: expected}


def test_processes_that_resume_from_different_checkpoints_stop():
    strategy = SimpleNamespace(broadcast=lambda _: "step-2.ckpt")
    loop = SimpleNamespace(epoch_loop=SimpleNamespace())
    trainer = SimpleNamespace(strategy=strategy, fit_loop=loop, _signal_connector=SimpleNamespace(), global_rank=3)
    Preemption("run", "step-2.ckpt").setup(trainer, None, "fit")
    with pytest.raises(
        RuntimeError, match=r"process 3 has found the checkpoint step-1.ckpt, the first one step-2.ckpt"
    ):
        Preemption("run", "step-1.ckpt").setup(trainer, None, "fit")


def test_auto_needs_a_folder_and_does_not_begin_anew_over_corrupted_checkpoints(corpus, tmp_path):
    config = write_config(tmp_path, corpus)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000001.ckpt").write_bytes(b"half")
    with (
        pytest.raises(ValueError, match="all checkpoints in .* are corrupted"),
        pytest.warns(UserWarning, match="passed"),
    ):
        main(["fit", "--config", str(config), "--ckpt_path=auto", "--run_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="ckpt_path=auto .*give --run_dir"):
        main(["fit", "--config", str(config), "--ckpt_path=auto"])


def test_who_loads_data_goes_on_whatever_signal_comes():
    """A terminal sends Ctrl-C to all processes."""
    old = {number: signal.getsignal(number) for number in signals.EXIT_CODES}
    try:
        loading(1)["worker_init_fn"](0)
        assert {signal.getsignal(number) for number in old} == {signal.SIG_IGN}
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
