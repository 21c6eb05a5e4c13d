"""CSV files of a run, `metrics.csv` and `growth.csv`: read whatever is left of them, rewritten whole or not at all."""

import csv
import errno
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a file, which may be written to at this moment or have lost its end with the power.

    A last line without an end is left out, others that are no rows with a warning. An empty file has no columns.

    Raises:
        ValueError: for a first line that names no column `step`, and for what is no CSV.
    """
    *lines, unfinished = path.read_bytes().decode(errors="replace").split("\n")
    zeros = "\0" in unfinished
    # Zeros are what a file system has of bytes that did not reach the disk; what was written later follows on them.
    try:
        cells = list(csv.reader(line.strip("\r").lstrip("\0") for line in lines))
    except csv.Error as error:
        raise ValueError(f"{path}: no CSV: {error}") from error
    columns = cells[0] if cells else []
    if cells and "step" not in columns:
        raise ValueError(f"{path}: its first line names no column `step`: it is no log of a run, or lost its header")
    rows = [dict(zip(columns, row, strict=True)) for row in cells[1:] if len(row) == len(columns)]
    rows = [row for row in rows if row["step"].isdecimal() and "\0" not in "".join(row.values())]
    if lost := max(0, len(cells) - 1) - len(rows) + zeros:
        warnings.warn(f"{path}: {lost} of its lines are no rows and are left out: torn, or zeros", stacklevel=2)
    return columns, rows


def number(path: Path, row: dict[str, str], column: str) -> float:
    """What a row has in a column.

    Raises:
        ValueError: if that is no number.
    """
    try:
        return float(row[column])
    except (KeyError, ValueError):
        found = f"{column}={row[column]!r}" if column in row else f"no {column}"
        raise ValueError(f"{path}: the row of step {row['step']} has {found}, no number: mend or delete it") from None


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a file again: whoever is killed meanwhile leaves the old one."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", newline="") as file:
            file.write(as_text(columns, rows, header=True))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Append to a file; whole rows, or nothing where the disk refuses."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        text = as_text(columns, rows).encode()
        if file.write(text) != len(text):  # the disk is full
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def as_text(columns: Sequence[str], rows: Iterable[dict[str, Any]], header: bool = False) -> str:
    """Rows as CSV; what is no column is left out."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
