"""Text files of any encoding, compressed or not. What is wrong with one is said with its name and the line."""

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, RawIOBase, TextIOWrapper
from itertools import chain, count
from pathlib import Path
from typing import Any, TextIO

COMPRESSED = (".gz", ".zst")
LONGEST = 2**30  # characters of a line or a text, which have to be in memory as a whole, and more than once
CHUNK = 2**20  # characters, or bytes, that are read at a time
MOST_INFLATED, LEAST_INFLATED = 200, 2**26  # times the size of a compressed file, and bytes in any case
REMEDY = "set data.encoding to the file's (utf-16, cp1252, latin-1, ...), or save it as UTF-8"


def read_text(path: Path, encoding: str = "utf-8", remedy: str = REMEDY) -> str:
    """A text file, whole; see :func:`opened`."""
    with opened(path, encoding, remedy) as file:
        return file.read()


def texts_of(path: Path, encoding: str, separator: str | None) -> Iterator[str]:
    """The texts of a file, between separators; without one the file is a text.

    Raises:
        ValueError: for a longer one than LONGEST, and as :func:`opened`.
    """
    with opened(path, encoding) as file:
        text = ""  # the last one so far
        # Twice as much each time, so that no part is split many times.
        while chunk := file.read(min(max(CHUNK, len(text)), LONGEST + 1 - len(text))):
            *whole, text = (text + chunk).split(separator) if separator else [text + chunk]
            yield from whole
            if len(text) > LONGEST:
                raise ValueError(
                    f"{path}: has a text of more than {LONGEST:,} characters: set data.document_separator to what is "
                    "between its texts, or divide the file"
                )
        yield text


def lines_of(path: Path, encoding: str) -> Iterator[str]:
    """The lines of a file, each with its end.

    Raises:
        ValueError: for a longer one than LONGEST, and as :func:`opened`.
    """
    with opened(path, encoding) as file:
        for number in count(1):
            line = file.readline(LONGEST)
            if len(line) == LONGEST and not line.endswith("\n"):
                raise ValueError(f"{path}:{number}: a line of more than {LONGEST:,} characters: remove it")
            if not line:
                return
            yield line


@contextmanager
def opened(path: Path, encoding: str = "utf-8", remedy: str = REMEDY) -> Iterator[TextIO]:
    """A text file, decompressed if it ends in `.gz` or `.zst`, without its byte order mark.

    Args:
        path: of the file.
        encoding: one that Python knows.
        remedy: what to do about a file of another encoding.

    Raises:
        ValueError: for a file of another encoding, or one that can't be read; also while it is read.
    """
    name = codecs.lookup(encoding).name
    try:
        with _binary(path) as file:
            looks = _wide(file.read(4096))
        if looks and not name.startswith(looks[:6]):
            raise ValueError(f"{path}: is {looks.upper()} text, not {name.upper()}: {remedy}")
        with TextIOWrapper(_binary(path), "utf-8-sig" if name == "utf-8" else encoding) as text:
            yield text
    except UnicodeError as error:
        raise ValueError(f"{path}{_line(path, name)}: is no {name.upper()} text: {remedy}") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read, or is corrupted: {error}") from error


def _binary(path: Path) -> Any:
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    return BufferedReader(_Inflated(path), 2**16)


class _Inflated(RawIOBase):
    """A compressed file, as long as what it holds may be a text: what unpacks to far more fills the memory instead."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path, self.left = path, most_inflated(path)
        self.stream = pyarrow.input_stream(str(path), compression="detect")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As RawIOBase's. Raises a ValueError that names the file."""
        content = self.stream.read(len(buffer))
        self.left -= len(content)
        if self.left < 0:
            raise far_more(self.path)
        buffer[: len(content)] = content
        return len(content)


def most_inflated(path: Path) -> int:
    """Bytes that a compressed file may unpack to."""
    return MOST_INFLATED * path.stat().st_size + LEAST_INFLATED


def far_more(path: Path) -> ValueError:
    """The error of one that unpacks to more."""
    return ValueError(
        f"{path}: unpacks to more than {MOST_INFLATED} times its size: no text does, so it is not read. If it is one, "
        "unpack it yourself, into .txt or .jsonl"
    )


def _wide(start: bytes) -> str | None:
    """UTF-16 or 32 by the first bytes of a file: a byte order mark, or zeros, which are in no other text."""
    for mark in ("UTF32_LE", "UTF32_BE", "UTF16_LE", "UTF16_BE"):  # in this order: the first begins as the third
        if start.startswith(getattr(codecs, f"BOM_{mark}")):
            return f"utf-{mark[3:5]}"
    zeros = start.count(0) / max(1, len(start))
    order = "be" if start.startswith(b"\0") else "le"
    return f"utf-32-{order}" if zeros > 0.6 else f"utf-16-{order}" if zeros > 0.25 else None


def _line(path: Path, encoding: str) -> str:
    """The number of the first line that can't be decoded, and what is there; of UTF-16 and 32, nothing."""
    if encoding.startswith(("utf-16", "utf-32")):
        return ""
    decoder, number = codecs.getincrementaldecoder(encoding)(), 1
    with _binary(path) as file:
        for chunk in chain(iter(lambda: file.read(CHUNK), b""), [b""]):
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                before, after = error.object[: error.start], error.object[error.start : error.start + 20]
                shown = before.rpartition(b"\n")[2][-20:] + after[: after.find(b"\n") + 1 or None]
                number += before.count(b"\n")
                return f":{number}, {shown!r}"
            number += chunk.count(b"\n")
    return ""
