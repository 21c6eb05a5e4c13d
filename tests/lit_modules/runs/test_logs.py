"""`metrics.csv` survives kills, the power, and disks that are full."""

import csv
import resource
from pathlib import Path

import pytest

from lit_modules.runs.curves import Run
from lit_modules.runs.logs import BoardLogger, ResumableCSVLogger
from lit_modules.runs.tables import read_rows


def log(folder, steps, **more):
    """A new process logs a row of each of `steps`."""
    logger = ResumableCSVLogger(str(folder))
    for step in steps:
        logger.log_metrics({"train/loss": step / 2, **more}, step)
    return logger


def steps_of(folder):
    return [int(row["step"]) for row in read_rows(folder / "metrics.csv")[1]]


def test_a_resumed_run_replaces_what_comes_after_its_first_row(tmp_path):
    log(tmp_path, range(10))
    log(tmp_path, (6, 8), more=1.0)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["train/loss"], row["more"]) for row in rows[4:]] == [
        ("4", "2.0", ""),
        ("5", "2.5", ""),
        ("6", "3.0", "1.0"),
        ("8", "4.0", "1.0"),
    ]


@pytest.mark.parametrize("why", ["resumed", "a new column"])
def test_a_kill_while_the_file_is_rewritten_costs_nothing(tmp_path, monkeypatch, why):
    logger = log(tmp_path, range(10))
    before = (tmp_path / "metrics.csv").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    act = {
        "resumed": lambda: log(tmp_path, [10]),
        "a new column": lambda: logger.log_metrics({"val/loss": 1.0}, 10),
    }
    with pytest.raises(KeyboardInterrupt):
        act[why]()
    assert (tmp_path / "metrics.csv").read_bytes() == before


TAILS = {
    "torn": (b"5,2", None, []),
    "torn with its end": (b"5\n", "1 of its lines", []),
    "zeros": (bytes(500), "1 of its lines", []),
    "zeros, and then a row": (bytes(500) + b"5,2.5\r\n", None, [5]),
    "zeros in a row": (b"5,\0\0\n", "1 of its lines", []),
    "not a number": (b"x,2.5\n6,3\n", "1 of its lines", [6]),
    "no text": (b"\xff\xfe\n", "1 of its lines", []),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.filterwarnings("error")
def test_the_end_of_a_file_may_be_lost(tmp_path, tail):
    log(tmp_path, range(5))
    added, warning, more = TAILS[tail]
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(added)

    def told(act):
        if warning is None:
            return act()
        with pytest.warns(UserWarning, match=warning):
            return act()

    drawn = told(lambda: Run(tmp_path))
    assert drawn.columns["train/loss"][0].tolist() == [1, 2, 3, 4, 5, *(step + 1 for step in more)]
    told(lambda: log(tmp_path, [7]))
    assert steps_of(tmp_path) == [*range(5), *more, 7]


def test_a_file_without_its_beginning_is_not_swallowed(tmp_path):
    (tmp_path / "metrics.csv").write_text("4,2.0\n5,2.5\n")
    with pytest.raises(ValueError, match=r"metrics.csv: its first line names no column `step`"):
        Run(tmp_path)
    with pytest.warns(UserWarning, match=r"names no column `step`.* It is metrics-unreadable.csv now"):
        log(tmp_path, [6])
    assert (tmp_path / "metrics-unreadable.csv").read_text() == "4,2.0\n5,2.5\n"
    assert steps_of(tmp_path) == [6]
    (tmp_path / "metrics.csv").write_text("")
    with pytest.warns(UserWarning, match=r"metrics.csv is empty: what the run logged before is lost"):
        log(tmp_path, [6])
    assert steps_of(tmp_path) == [6]


@pytest.fixture
def no_file_over():
    """Limits the size of files, as a full disk does: the last write is cut off, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_the_disk_refuses_are_written_when_there_is_room(tmp_path, no_file_over, recwarn):
    logger, board = log(tmp_path, range(5)), BoardLogger(str(tmp_path / "board"))
    file, events = tmp_path / "metrics.csv", tmp_path / "board"
    board.log_metrics({"train/loss": 1.0}, 4)
    board.save()
    before = file.read_bytes()
    no_file_over(len(before) + 3)
    for step in (5, 6):
        logger.log_metrics({"train/loss": step / 2}, step)
        board.log_metrics({"train/loss": step / 2}, step)
        board.save()
    logger.log_metrics({"val/loss": 1.0}, 6)
    assert file.read_bytes() == before
    no_file_over()
    logger.log_metrics({"train/loss": 3.5}, 7)
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4, 5, 6, 6, 7]
    board.log_metrics({"train/loss": 3.5}, 7)
    board.finalize("success")
    assert board_steps(events, "train/loss") == [4, 5, 6, 7]
    said = [str(warning.message) for warning in recwarn if "can't be written" in str(warning.message)]
    assert len(said) == 2  # once for each
    assert "metrics.csv can't be written (No space" in said[0]


def board_steps(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(name)]
