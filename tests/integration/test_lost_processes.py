"""A run one of whose processes dies, or that meets another one: what it says, and that it goes on afterwards."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from lit_modules.callbacks import Watchdog, watchdog
from lit_modules.cli import main
from lit_modules.runs.errors import RunError
from tests.conftest import ROOT, same_threads
from tests.integration.kill import HARM
from tests.integration.tiny import rows


def process(command):
    command = [sys.executable, "-m", "lit_modules.cli", *map(str, command)]
    return subprocess.Popen(
        command, cwd=ROOT, env=same_threads(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


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
