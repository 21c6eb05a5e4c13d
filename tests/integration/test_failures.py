"""What is in docs/reliability.md: each failure is injected, and the run, or the next one, is looked at.

One file: the tests share a run that they harm, which takes seconds to make.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from lit_modules.callbacks import Watchdog, watchdog
from lit_modules.checkpoints import validation, writing
from lit_modules.checkpoints.validation import find_corruption, latest_valid
from lit_modules.cli import main
from lit_modules.runs.errors import RunError
from tests.conftest import ROOT, same_threads
from tests.integration.growing import checkpoint_of, difference
from tests.integration.processes import run_in_processes
from tests.integration.tiny import rows, write_config
from tests.lit_modules.runs.test_logs import board_steps

HARM = "--trainer.callbacks+=tests.integration.kill"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """(config, folder) of a run of 4 steps, saved after each, that others go on with."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_config(folder, corpus, trainer={"max_steps": 4, "log_every_n_steps": 1, "limit_val_batches": 0})
    config = yaml.safe_load(path.read_text()) | {"checkpoint": {"every_n_train_steps": 1, "save_top_k": -1}}
    config["model"]["init_args"]["optim"]["schedule"] = "constant"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path), "--run_dir", str(folder / "run")])
    return path, folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """The command line that goes on with a copy of it, and the copy."""
    config, run = finished
    shutil.copytree(run, tmp_path / "run")
    command = ["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"]
    return [*command, "--trainer.max_steps=6"], tmp_path / "run"


def process(command):
    command = [sys.executable, "-m", "lit_modules.cli", *map(str, command)]
    return subprocess.Popen(
        command, cwd=ROOT, env=same_threads(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


# Checkpoints that are corrupted, or half there.


def test_leftovers_of_a_killed_save_are_removed_at_the_next_start(copied):
    command, run = copied
    (run / "checkpoints/step-00000009.ckpt.partial").write_bytes(b"half")
    (run / "checkpoints/step-00000010.ckpt.partial").mkdir()
    (run / "checkpoints/step-00000010.ckpt.partial/meta.pt").write_bytes(b"half")
    main(command)
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"step-00000006.ckpt"}
    assert not list(run.glob("checkpoints/*.partial"))
    assert [step for step, _ in rows(run, "train/loss")] == list(range(6))


# The disk is full.


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A disk of 16 MiB; without the right to mount one, a `torch.save` that fails beside a file called filler."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], check=False, capture_output=True
        ).returncode
    )
    save = torch.save

    def full(content, file):
        if (disk / "run/filler").exists():
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    if not mounted:
        monkeypatch.setattr(torch, "save", full)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**24, 0, 2**24))
    yield disk
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("until", [38, 100])  # rows of so many steps need more than what is left of a block
def test_a_full_disk_costs_saves_but_no_checkpoint(finished, small_disk, until):
    config, _ = finished
    run = small_disk / "run"
    harm = [f"{HARM}.FillDisk", "--trainer.callbacks.step=2", f"--trainer.callbacks.until={until}"]
    command = ["fit", "--config", str(config), "--run_dir", str(run), "--trainer.max_steps=40", *harm]
    command += ["--checkpoint.save_top_k=1"]
    ends = pytest.raises(RunError, match="40.ckpt could not be written.* last steps of the run are lost")
    with (
        ends if until > 40 else nullcontext(),
        pytest.warns(UserWarning, match="3.ckpt could not be written") as warned,
    ):
        main(command)
    is_full, told = small_disk.is_mount(), "\n".join(str(warning.message) for warning in warned)
    left = "step-00000040.ckpt" if until == 38 else "step-00000002.ckpt"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [left]
    assert find_corruption(run / "checkpoints" / left) is None
    made = [step for step, _ in rows(run, "train/loss")]
    if until == 38:
        assert made == list(range(40))
        assert board_steps(run, "train/loss") == made
        assert "metrics.csv can't be written (No space left on device): the training goes on" in told or not is_full
    else:
        assert made[:2] == [0, 1]


def test_a_run_folder_that_is_deleted_is_named(copied):
    command, run = copied
    gone = r"the run's folder .*run was deleted or moved: it is made again, without what it held"
    with pytest.warns(UserWarning, match=gone):
        main([*command, f"{HARM}.RemoveFolder", "--trainer.callbacks.step=5"])
    assert [step for step, _ in rows(run, "train/loss")] == [5]
    assert latest_valid((run / "checkpoints").glob("*.ckpt")).name == "step-00000006.ckpt"


def test_a_row_is_in_the_log_before_its_step_is_saved(copied, monkeypatch):
    """A process that dies right after a save leaves a log to which only later rows are missing."""
    command, run = copied
    write = writing.write_checkpoint

    def write_and_die(checkpoint, path):
        write(checkpoint, path)
        raise SystemExit

    monkeypatch.setattr(writing, "write_checkpoint", write_and_die)
    with pytest.raises(SystemExit):
        main(command)
    monkeypatch.undo()
    assert latest_valid((run / "checkpoints").glob("*.ckpt")).name == "step-00000005.ckpt"
    main(command)
    assert [step for step, _ in rows(run, "train/loss")] == list(range(6))
    assert board_steps(run, "train/loss") == list(range(6))


def test_a_corrupted_part_of_a_sharded_checkpoint_is_seen(finished, small_disk, tmp_path):
    """Saved and resumed in two processes, and on a disk that is full at a save; then one part gets a flipped byte."""
    config, _ = finished
    both = ["fit", "--config", config, "--trainer.strategy=fsdp2", "--trainer.devices=2"]
    run, steps = ["--run_dir", tmp_path / "run"], "--trainer.max_steps={}".format
    harm = [f"{HARM}.FillDisk", "--trainer.callbacks.step=1", "--trainer.callbacks.until=2"]
    full = [*both, *harm, steps(3), "--run_dir", small_disk / "run"]
    run_in_processes([[*both, *run, steps(2)], [*both, *run, steps(3), "--ckpt_path", "last"], full])
    if small_disk.is_mount():
        left = {path.name for path in (small_disk / "run/checkpoints").iterdir()}
        assert left == {"step-00000001.ckpt", "step-00000003.ckpt"}
    saved = tmp_path / "run/checkpoints/step-00000003.ckpt"
    assert set(json.loads((saved / "manifest.json").read_text())) == {
        path.name for path in saved.iterdir() if path.name != "manifest.json"
    }
    (part, *_) = saved.glob("__1_*")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-00000003.ckpt is passed over: its part __1_0.distcp is corrupted"):
        assert latest_valid(saved.parent.glob("*.ckpt")).name == "step-00000002.ckpt"
    part.write_bytes(content[:-1])
    assert "truncated" in find_corruption(saved)
    (saved / "manifest.json").unlink()
    assert "half-written" in find_corruption(saved)


def test_a_run_whose_checkpoints_will_not_fit_does_not_start(finished, tmp_path, monkeypatch):
    config, run = finished
    saved = torch.load(checkpoint_of(run, 4), weights_only=True)
    size = 3 * sum(tensor.nbytes for tensor in saved["state_dict"].values())
    grow = ["--trainer.callbacks=GrowParameterTokens", '--trainer.callbacks.stages=[{"at_step": 2, "factor": 8.0}]']
    for options, room in (([], 3.5), (["--trainer.callbacks=EMA"], 4.5), (grow, 8)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, r=room: shutil._ntuple_diskusage(0, 0, int(r * size)))
        command = ["fit", "--config", str(config), "--trainer.max_steps=6", *options]
        if not options:  # two are kept, and a best one, and one is written
            main([*command, "--run_dir", str(tmp_path / "fits"), "--checkpoint.save_top_k=1"])
        with pytest.raises(ValueError, match="has .* GiB free; 4 checkpoints of .*lower checkpoint.save_top_k"):
            main([*command, "--run_dir", str(tmp_path / f"{room}"), "--checkpoint.save_top_k=2"])


# What changes under a run.


def test_other_data_or_another_model_under_a_resumed_run_is_refused(copied, finished, tmp_path, corpus):
    command, _ = copied
    for option, message in (
        ("--data.seed=1", r"data.seed: 0 then, 1 now"),
        ("--data.seq_len=16", r"data.seq_len: 32 then, 16 now"),
        ("--model.config.score_norm=softmax", r"score_norm: l2_norm_gelu then, softmax now.*model.init_from"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*command, option])
    tokens = tmp_path / "tokens"
    shutil.copytree(finished[0].parent.parent / "tokens", tokens)
    same = f"--data.cache_dir={tokens}"
    main([*command, same, "--trainer.max_steps=5"])
    for file in tokens.glob("*/train.bin"):
        changed = bytearray(file.read_bytes())
        changed[100] ^= 1
        file.write_bytes(changed)
    with pytest.raises(ValueError, match=r"training tokens: [\d,]+ with fingerprint \w+ then, .* now"):
        main([*command, same])


# Processes.


def test_a_second_process_on_a_run_folder_is_refused(copied):
    command, run = copied
    harm = [f"{HARM}.SleepAt", "--trainer.callbacks.step=4"]
    first = process([*command, *harm])
    try:
        wait_for(lambda: (run / "asleep").exists(), first)
        with pytest.raises(
            ValueError, match=rf"another process is at work in it: pid {first.pid} on {socket.gethostname()}"
        ):
            main(command)
    finally:
        first.kill()
        first.wait()
    main(command)  # a kill has given it back


def wait_for(condition, running, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_job_that_loses_a_process_ends_and_says_which(copied, victim):
    """The other process hangs and hears of nothing, as with NCCL."""
    command, run = copied
    both = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]
    harm = [f"{HARM}.KillAt", "--trainer.callbacks.step=5", f"--trainer.callbacks.rank={victim}"]
    job = process([*command, *both, *harm])
    wait_for(lambda: (run / "pids").exists() and len((run / "pids").read_text().split()) == 2, job)
    pids = [int(pid) for pid in (run / "pids").read_text().split()]
    _, said = job.communicate(timeout=120)
    assert job.returncode != 0
    if victim == 1:
        assert "error: process 1 (pid" in said
        assert "was ended by SIGKILL. Resume with --ckpt_path last" in said
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    main(command)
    assert [step for step, _ in rows(run, "train/loss")] == list(range(6))


def test_a_connection_that_was_closed_is_explained_by_the_process_that_died():
    """With gloo the others get an error; it says less than what the system knows of their processes."""
    callback = Watchdog()
    callback._children = [subprocess.Popen(["sh", "-c", "kill -9 $$"])]
    with pytest.raises(RunError, match=r"process 1 \(pid \d+\) was ended by SIGKILL"):
        callback.on_exception(None, None, RuntimeError("Connection closed by peer"))
    callback._children = [subprocess.Popen(["sh", "-c", "exit 1"])]  # has said itself why
    callback.on_exception(None, None, RuntimeError("Connection closed by peer"))


def test_a_data_worker_that_dies_ends_the_run(copied):
    command, run = copied
    harm = [f"{HARM}.KillWorker", "--trainer.callbacks.step=4"]
    start = time.monotonic()
    with pytest.raises(RunError, match=r"a process that loads data has died: worker \d+ .*lower data.num_workers"):
        main([*command, "--data.num_workers=1", *harm])
    assert time.monotonic() - start < 60
    main(command)
    assert [step for step, _ in rows(run, "train/loss")] == list(range(6))


def test_a_port_in_use_is_named(copied):
    command, _ = copied
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with (
            mock.patch.dict(os.environ, {"MASTER_PORT": port}),
            pytest.raises(RunError, match=f"MASTER_PORT={port}: an"),
        ):
            main([*command, "--trainer.strategy=ddp", "--trainer.devices=1"])


def test_a_child_whose_parent_is_gone_before_it_looks_ends_too(monkeypatch):
    monkeypatch.setattr(watchdog, "GRACE", 0.1)
    child = os.fork()
    if child == 0:
        watchdog.end_with(os.getpid())  # which is not its parent
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


# What comes from others.


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_a_checkpoint_with_code_in_it_is_refused(copied, tmp_path):
    command, run = copied
    harmful = run / "checkpoints/step-00000009.ckpt"
    torch.save({"state_dict": {}, "x": Harmful(tmp_path / "executed")}, harmful)
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    shutil.copy(harmful, folder / "meta.pt")
    validation.write_manifest(folder, [validation.checksums(folder, 0)])
    assert "holds code" in find_corruption(folder)
    with pytest.raises(ValueError, match=r"step-00000009.ckpt'?: it holds code \(.*\), which is never run"):
        main([*command[:-3], "--ckpt_path", str(harmful)])
    with pytest.warns(UserWarning, match="step-00000009.ckpt is passed over: it holds code"):
        main(command)
    assert not (tmp_path / "executed").exists()


HOSTILE = {
    "trainer: !!python/object/apply:os.system [touch executed]": "could not determine a constructor",
    "trainer: {callbacks: [{class_path: os.system, init_args: {command: touch executed}}]}": "os.system",
    "data: {class_path: subprocess.Popen, init_args: {args: [touch, executed]}}": "Popen",
    'model: {class_path: builtins.exec, init_args: {source: \'open("executed", "w")\'}}': "exec",
    "run_dir: ${eval:open('executed','w')}": "${...} that can't be resolved",
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_config_runs_nothing(finished, tmp_path, monkeypatch, capsys, hostile):
    monkeypatch.chdir(tmp_path)
    Path("hostile.yaml").write_text(hostile)
    with pytest.raises((SystemExit, ValueError)) as refused:
        main(["fit", "--config", str(finished[0]), "--config", "hostile.yaml"])
    assert HOSTILE[hostile] in capsys.readouterr().err + str(refused.value)
    assert not Path("executed").exists()


def test_a_run_folder_with_an_odd_name_is_a_folder(finished, tmp_path):
    run = tmp_path / "a;touch $(executed) 'b' \n#%"
    main(["fit", "--config", str(finished[0]), "--run_dir", str(run), "--trainer.max_steps=2"])
    assert latest_valid((run / "checkpoints").glob("*.ckpt")) is not None


def test_what_is_linked_in_a_run_folder_is_left_alone(copied, tmp_path):
    """Nothing outside of it is written or removed; the checkpoints may lie elsewhere, behind a link to their folder."""
    command, run = copied
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("config.yaml", "metrics.csv", "run.lock"):
        (run / name).rename(mine / name)
        (run / name).symlink_to(mine / name)
    (mine / "folder").mkdir()
    (mine / "folder/text").write_text("keep")
    (run / "checkpoints/step-00000001.ckpt.partial").symlink_to(mine / "folder")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    main(command)
    assert before == {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    assert not any(path.is_symlink() for path in [*run.iterdir(), *elsewhere.iterdir()] if path.name != "checkpoints")
    assert [step for step, _ in rows(run, "train/loss")] == [*range(len(rows(run, "train/loss")))]


# Written while the training goes on.


def test_asynchronous_saves_hold_the_step_of_the_save(finished, tmp_path, monkeypatch):
    config, run = finished
    replace = Path.replace

    def slowly(self, target):
        time.sleep(0.3)  # steps are made meanwhile
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slowly)
    main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--checkpoint.asynchronous=true"])
    for step in range(1, 5):
        assert difference(run, tmp_path / "run", step) == 0
    both = [
        torch.load(folder / "checkpoints/step-00000004.ckpt", weights_only=True) for folder in (run, tmp_path / "run")
    ]
    assert both[0]["loops"] == both[1]["loops"]
    assert both[0]["TextDataModule"] == both[1]["TextDataModule"]
