"""Parquet files in little memory. A page of a few bytes can hold gigabytes, and what the file's end says of it may lie:
the pages' own headers are read first, which Arrow holds them to.
"""  # noqa: D205

from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from datamodules.reading import far_more, most_inflated

MOST_ROWS, LARGEST_BATCH = 1024, 2**28  # of a batch; bytes that entries of a dictionary may become in one
OBJECT = 64  # bytes that a value takes in Python, at least: a file can hold a million in a few bits


def columns_of(path: Path) -> list[str]:
    """Names of the columns.

    Raises:
        ValueError: for a file that is no parquet file.
    """
    import pyarrow.parquet

    with _named(path):
        return list(pyarrow.parquet.read_schema(path).names)


def rows_of(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file; with a column only what is in that.

    Raises:
        ValueError: for a file that is none, and for one that unpacks to far more than any text does.
    """
    import pyarrow.parquet

    with _named(path), pyarrow.parquet.ParquetFile(path) as file:
        left, largest = most_inflated(path), _largest_dictionary(path)
        rows = min(MOST_ROWS, max(1, LARGEST_BATCH // max(1, largest)))
        for batch in file.iter_batches(batch_size=rows, columns=None if column is None else [column]):
            whole = (part.dictionary_decode() if hasattr(part, "indices") else part for part in batch.columns)
            left -= sum(part.nbytes for part in whole)
            if left < 0:
                raise far_more(path)
            yield from batch.to_pylist()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    import pyarrow

    corrupted = pyarrow.ArrowException, OSError, LookupError, TypeError, RecursionError  # of Arrow, of `_pages`
    try:
        yield
    except (*corrupted, UnicodeDecodeError, OverflowError) as error:  # values that Python has not
        raise ValueError(f"{path}: no parquet file, or corrupted: {error}") from error


def _largest_dictionary(path: Path) -> int:
    """Bytes of the largest one, of which a batch may repeat each entry. Refuses pages that are too large together."""
    left, largest = most_inflated(path), 0
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        end, _ = _struct(content, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
        for chunk in (chunk for group in end.get((4, LIST), []) for chunk in group[1, LIST]):
            for size, values, is_dictionary in _pages(content, chunk[3, STRUCT]):
                left -= size + OBJECT * values
                largest = max(largest, size * is_dictionary)
                if left < 0:
                    raise far_more(path)
    return largest


def _pages(content: Any, chunk: Any) -> Iterator[tuple[int, int, bool]]:
    """(bytes when unpacked, values, whether it is a dictionary) of each page that Arrow reads of a column."""
    starts = chunk[9, I64], chunk.get((11, I64), 0)  # of data, of a dictionary if there is one
    place = min((start for start in starts if start > 0), default=0)
    if not place:
        raise IndexError("a column without a place")
    end, seen = place + chunk[7, I64], 0
    while place < end and seen < chunk[5, I64]:
        header, place = _struct(content, place)
        of_data = header.get((5, STRUCT)) or header.get((8, STRUCT)) or {}  # of either version
        size, compressed, values = header[2, I32], header[3, I32], of_data.get((1, I32), 0)
        if min(size, compressed, values) < 0:
            raise IndexError("a page of less than nothing")
        yield size, values, (7, STRUCT) in header
        seen, place = seen + values, place + compressed


# What Thrift calls its types, and bits of the integers.
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, STRUCT = (*range(1, 10), 12)
BITS = {I16: 16, I32: 32, I64: 64}

Fields = dict[tuple[int, int], Any]  # by number and type: one of another type is another one to Thrift, too


def _struct(content: Any, place: int) -> tuple[Fields, int]:
    """(fields, where it ends) of a struct in Thrift's compact form, of which parquet's metadata is made."""
    fields: Fields = {}
    number = 0
    while head := content[place]:
        kind, place = head & 15, place + 1
        if head >> 4:
            number += head >> 4
        else:
            number, place = _integer(content, place, 16)
        fields[number, kind], place = _value(content, place, kind)
    return fields, place + 1


def _value(content: Any, place: int, kind: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return kind == TRUE, place
    if kind in (BYTE, DOUBLE):
        return None, place + (1 if kind == BYTE else 8)
    if kind in BITS:
        return _integer(content, place, BITS[kind])
    if kind == BINARY:
        length, place = _varint(content, place, 32)
        return None, place + length
    if kind == STRUCT:
        return _struct(content, place)
    if kind != LIST:
        raise IndexError(f"a field of type {kind}, which parquet has not")
    length, inner, place = content[place] >> 4, content[place] & 15, place + 1
    if length == 15:
        length, place = _varint(content, place, 32)
    if length > len(content) - place:
        raise IndexError("a list longer than the file")
    values = []
    for _ in range(length):
        value, place = (None, place + 1) if inner in (TRUE, FALSE) else _value(content, place, inner)
        values.append(value)
    return values, place


def _varint(content: Any, place: int, bits: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if value >> bits or shift > 70:
            raise IndexError(f"a number of more than {bits} bits")
        if byte < 128:
            return value, place


def _integer(content: Any, place: int, bits: int) -> tuple[int, int]:
    value, place = _varint(content, place, bits)
    return (value >> 1) ^ -(value & 1), place
