"""One job at a time on a run's folder."""

import fcntl
import json
import os
import socket
import warnings
from pathlib import Path

NAME = "run.lock"


class RunLock:
    """Held by the first process of a job for as long as it lives; the kernel takes it back however that ends.

    It is a POSIX lock: forked workers don't inherit it, and on NFS it holds between machines if the lock service runs.

    Args:
        folder: of the run.

    Raises:
        ValueError: when another process has it; says which.
    """

    def __init__(self, folder: Path) -> None:
        self._file = (folder / NAME).open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            holder = self._file.read() or "{}"
            self._file.close()
            raise ValueError(
                f"run_dir={folder}: another process is at work in it: {_describe_holder(holder)}"
            ) from error
        except OSError as error:  # a file system without locks
            warnings.warn(f"run_dir={folder}: can't be locked ({error}): start no second job on it", stacklevel=2)
        self._file.truncate(0)
        holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")})
        self._file.write(holder)
        self._file.flush()

    def release(self) -> None:
        """Let others have the folder."""
        self._file.truncate(0)
        self._file.close()


def _describe_holder(holder: str) -> str:
    try:
        found = json.loads(holder)
    except ValueError:  # half-written: it has just started
        found = {}
    job = f", Slurm job {found['job']}" if found.get("job") else ""
    where = f"pid {found.get('pid', 'unknown')} on {found.get('host', 'unknown')}{job}"
    return f"{where}. Wait for it or end it, or choose another run_dir"
