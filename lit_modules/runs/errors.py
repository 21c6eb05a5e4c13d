"""What ends a run, said in a line or two."""

import errno
import re
from collections.abc import Iterator


class RunError(RuntimeError):
    """Something that no setting has caused; the message says what happened and how to continue."""


def explain(error: BaseException) -> str | None:
    """What an error of torch or of the system means for a run; None for any other.

    It may have come in the middle of anything, whose own error it then caused.
    """
    return next((known for cause in causes(error) if (known := _explain(cause))), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({text}): make room, and resume with --ckpt_path last"
    if taken := re.search(r"port: (\d+).*EADDRINUSE", text, re.DOTALL):
        return (
            f"MASTER_PORT={taken[1]}: another process of this machine listens on that port; choose a free one, or "
            "unset MASTER_PORT, and on one machine one is found"
        )
    if missing := re.search(r"Early stopping conditioned on metric `(.+?)` .* following: (.*)", text):
        return f"EarlyStopping.monitor={missing[1]!r} is not logged: choose one of {missing[2].replace('`', '')}"
    if worker := re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (.*)", text):
        return (
            f"a process that loads data has died: worker {worker[1]} {worker[2]} Killed from outside, it is mostly the "
            "machine's memory that ran out: lower data.num_workers. Resume with --ckpt_path last"
        )
    return None
