"""Command lines in groups of processes: imports cost more than a tiny training, so one process makes them and forks.

python -m tests.integration.processes      reads a line of JSON for each group that it is to start
"""

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from tests.conftest import ROOT

_groups: dict[int, "Group"] = {}  # by the number of their processes
_parent: subprocess.Popen | None = None  # of all groups of this process


def run_in_processes(commands: list[list[str]], num_processes: int = 2, timeout: float = 240) -> None:
    """Run each command line in `num_processes` processes together, on one thread each; fail with their output."""
    if num_processes not in _groups:
        _groups[num_processes] = Group(num_processes)
    try:
        _groups[num_processes].run(commands, timeout)
    except BaseException:  # one has ended, or they no longer do the same
        _groups.pop(num_processes).end()
        raise


class Group:
    """Processes that train together, each on one thread; they wait for jobs until they are ended."""

    def __init__(self, num_processes: int) -> None:
        self.folder, self.size, self.jobs = Path(tempfile.mkdtemp()), num_processes, 0
        world = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0"}
        world["MASTER_PORT"] = free_port()
        parent = the_parent()
        parent.stdin.write(json.dumps({"folder": str(self.folder), "size": num_processes, "world": world}) + "\n")
        parent.stdin.flush()
        atexit.register(self.end)

    def run(self, commands: list[list[str]], timeout: float) -> None:
        """Run each command line in all processes; fail with their output."""
        self.jobs += 1
        job = self.folder / f"{self.jobs}.json"
        part = job.with_suffix(".part")
        part.write_text(json.dumps([[str(word) for word in command] for command in commands]))
        part.rename(job)
        deadline = time.monotonic() + timeout
        while not all(job.with_suffix(f".{rank}.done").exists() for rank in range(self.size)):
            lost = [rank for rank, pid in self.pids().items() if not Path(f"/proc/{pid}").exists()]
            if lost or time.monotonic() > deadline:
                logs = "\n".join((self.folder / f"{rank}.log").read_text()[-14000:] for rank in range(self.size))
                raise AssertionError(f"{f'processes {lost} have ended' if lost else 'timeout'}:\n{logs}")
            time.sleep(0.05)

    def pids(self) -> dict[int, int]:
        found = {rank: self.folder / f"{rank}.pid" for rank in range(self.size)}
        return {rank: int(path.read_text()) for rank, path in found.items() if path.exists()}

    def end(self) -> None:
        for pid in self.pids().values():
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def the_parent() -> subprocess.Popen:
    global _parent
    if _parent is None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENFORMER_DEBUG": "1"}
        command = [sys.executable, "-m", "tests.integration.processes"]
        _parent = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, text=True)
        atexit.register(_parent.kill)
    return _parent


def fork(folder: Path, rank: int, world: dict[str, str]) -> None:
    """Start a process that runs the jobs of its group, one after the other."""
    if os.fork():
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(world | {"LOCAL_RANK": str(rank)})
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    part = folder / f"{rank}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{rank}.pid")
    code = 1
    try:
        run_jobs(folder, rank)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_jobs(folder: Path, rank: int) -> None:
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from lit_modules.cli import main as tokenformer

    rank_zero_only.rank = rank  # which it takes from the environment when it is imported
    torch.set_num_threads(1)  # makes the pool of threads anew; two threads at once would end the process
    for number in count(1):
        job = folder / f"{number}.json"
        while not job.exists():
            time.sleep(0.02)
            if os.getppid() == 1:  # nobody is left who would ask
                return
        for command in json.loads(job.read_text()):
            tokenformer(command)
        job.with_suffix(f".{rank}.done").touch()


def main() -> None:
    """Import everything, then fork the groups that are asked for."""
    import lit_modules.commands.experiment  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not waited for
    for line in sys.stdin:
        asked = json.loads(line)
        for rank in range(asked["size"]):
            fork(Path(asked["folder"]), rank, asked["world"])


if __name__ == "__main__":
    main()
