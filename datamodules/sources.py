"""Where documents come from: the standard library, local files, Hugging Face datasets."""

import glob
import hashlib
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.parquet import columns_of, rows_of
from datamodules.reading import CHUNK, COMPRESSED, lines_of, texts_of

KINDS, ENDINGS = (".txt", ".jsonl", ".parquet"), ".txt, .jsonl (.gz and .zst of both) or .parquet"
SAVED_DATASET = ("dataset_dict.json", "state.json")  # what save_to_disk writes
HELD_OUT_NAMES = ("val", "valid", "validation", "dev", "test")  # a file that begins so lies beside one for training
FULL_READ = 2**32  # bytes of files that are read whole for their fingerprint: a few seconds' work


@dataclass(frozen=True)
class TextFormat:
    """How to find documents in a source.

    Attributes:
        text_field: column of `.jsonl`, `.parquet` and Hugging Face rows that holds the text.
        document_separator: string between the documents of a `.txt` file; None: a file is a document.
        streaming: read a Hugging Face dataset without downloading all of it first.
        encoding: of `.txt` and `.jsonl` files.
    """

    text_field: str = "text"
    document_separator: str | None = None
    streaming: bool = False
    encoding: str = "utf-8"


class FileSource:
    """Local `.txt`, `.jsonl` (`.gz` and `.zst` of both) and `.parquet` files: paths, folders or globs, in the order of
    their names.

    Raises:
        ValueError: when a pattern matches nothing or a file has another ending.
    """  # noqa: D205

    def __init__(self, patterns: list[str], form: TextFormat) -> None:
        self.form, self.name = form, ", ".join(patterns)
        self.files = [path for pattern in patterns for path in _files(pattern)]
        for path in self.files:
            if not path.is_file():
                raise ValueError(f"data source {path}: is a link to a file that is not there")

    def documents(self) -> Iterator[str]:
        """The text of each document."""
        for path in self.files:
            if _kind(path) == ".parquet":
                yield from self._parquet(path)
            elif _kind(path) == ".jsonl":
                yield from (text_of(row, self.form.text_field, where) for where, row in self._json_lines(path))
            else:
                yield from texts_of(path, self.form.encoding, self.form.document_separator)

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(where it is, row) of each row."""
        for path in self.files:
            if _kind(path) == ".jsonl":
                yield from self._json_lines(path)
            elif _kind(path) == ".parquet":
                yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows_of(path), 1))
            else:
                raise ValueError(f"data source {path}: is text, and rows with named fields are needed: give .jsonl")

    def _json_lines(self, path: Path) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines_of(path, self.form.encoding), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({error.msg} at column {error.colno}): {shown(line.strip())}; "
                    "each line of a .jsonl file is a JSON object: mend or remove this one"
                ) from error
            except (RecursionError, ValueError) as error:  # nested too deep, a number of too many digits
                raise ValueError(f"{path}:{number}: can't be read as JSON ({error}): remove this line") from error
            yield f"{path}:{number}", row

    def _parquet(self, path: Path) -> Iterator[str]:
        field, columns = self.form.text_field, dict.fromkeys(columns_of(path))
        if field not in columns:
            text_of(columns, field, str(path))
        for number, row in enumerate(rows_of(path, field), 1):
            text = row[field]
            yield text if isinstance(text, str) else text_of(columns | row, field, f"{path}, row {number}")

    def fingerprint(self) -> str:
        """Changes when a file's name or contents do; of a corpus that takes long to read, its name, size or time."""
        digest = hashlib.blake2b(digest_size=16)
        read = sum(path.stat().st_size for path in self.files) <= FULL_READ
        for path in self.files:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {0 if read else status.st_mtime_ns} ".encode())
            if read:
                with path.open("rb") as file:
                    for chunk in iter(lambda: file.read(CHUNK), b""):
                        digest.update(chunk)
        return digest.hexdigest()


def _files(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return _files_in(path)
    found = [path] if path.is_file() else sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    found = [path for path in found if not path.is_dir()]
    if not found:
        raise ValueError(f"data source {pattern!r}: no such file (in {Path.cwd()})")
    for path in found:
        if _kind(path) not in KINDS:
            raise ValueError(f"data source {path}: ends in {path.suffix!r}; give {ENDINGS} files")
    return found


def _files_in(folder: Path) -> list[Path]:
    """The text files in a folder and in those below it. What lies there besides is counted in a warning."""
    below = sorted(path for path in folder.rglob("[!.]*") if not path.is_dir())
    below = [path for path in below if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = [path for path in below if _kind(path) in KINDS]
    if any(path.name in SAVED_DATASET for path in below):
        raise ValueError(f"data source {folder}: is a Hugging Face dataset: give it as hf:{folder}")
    if not found:
        raise ValueError(f"data source {folder}: this folder has no {ENDINGS} files")
    parts = ((part, path) for path in found for part in path.relative_to(folder).parts)
    splits = {word[0]: path for part, path in parts if (word := re.match("[a-z]+", part.lower()))}
    if "train" in splits and (others := [splits[word] for word in HELD_OUT_NAMES if word in splits]):
        raise ValueError(
            f"data source {folder}: not all of its files are for training, as {others[0]}: give data.source and "
            f"data.val_source as globs, for example {folder}/**/train*, or hf:{folder}"
        )
    if left_out := Counter(path.suffix or path.name for path in below if _kind(path) not in KINDS):
        shown = ", ".join(f"{count} {ending}" for ending, count in left_out.most_common(5))
        warnings.warn(f"data source {folder}: {left_out.total()} files are left out ({shown})", stacklevel=2)
    return found


def _kind(path: Path) -> str:
    """What its name ends in; of a compressed text, before it was compressed."""
    inner = Path(path.stem).suffix
    return inner if path.suffix in COMPRESSED and inner in (".txt", ".jsonl") else path.suffix


class StandardLibrary(FileSource):
    """The source text of Python's standard library without its tests: a real corpus that every machine has."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        self.form, self.name = TextFormat(), "stdlib"
        self.files = sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))

    def documents(self) -> Iterator[str]:
        """The text of each module."""
        for path in self.files:
            yield path.read_text(encoding="utf-8", errors="replace")  # one that is not UTF-8 is no reason to fail


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row.

    Raises:
        ValueError: naming the place, for a row without one.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: holds {shown(row)}, not an object with the text in {field!r}")
    text = row.get(field)
    if isinstance(text, str):
        return text
    if field not in row:
        raise ValueError(f"{where}: no text in {field!r}; set data.text_field to one of {list(row)}")
    others = [name for name in row if name != field]
    another = f", or set data.text_field to another of {others}" if others else ""
    raise ValueError(f"{where}: {field!r} holds {shown(text)}, not text: mend or remove the row{another}")


def shown(value: Any) -> str:
    """A value, cut if it is long, for a message."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class HuggingFace:
    """`hf:PATH[:CONFIG][@SPLIT]`: a dataset of the hub, or a local copy of one (a folder that `save_to_disk` wrote, or
    one that `load_dataset` reads). The split is `train` by default.

    Raises:
        ValueError: when it can't be had, or has no such split.
    """  # noqa: D205

    def __init__(self, spec: str, form: TextFormat) -> None:
        self.form, self.name = form, spec
        path, _, self.split = spec.removeprefix("hf:").partition("@")
        self.path, _, config = path.partition(":")
        self.config = config or None
        self.split = self.split or "train"
        if not self.path:
            raise ValueError(f"data source {spec!r}: names no dataset: give hf:PATH[:CONFIG][@SPLIT]")
        if self.split not in self.splits():
            raise ValueError(f"data source {spec!r}: has no split {self.split!r}, but {', '.join(self.splits())}")

    @property
    def _on_disk(self) -> bool:
        return any((Path(self.path) / name).is_file() for name in SAVED_DATASET)

    def splits(self) -> list[str]:
        """Names of the dataset's splits."""
        import datasets

        try:
            if self._on_disk:
                loaded = datasets.load_from_disk(self.path)
                return list(loaded) if isinstance(loaded, datasets.DatasetDict) else ["train"]
            return datasets.get_dataset_split_names(self.path, self.config)
        except Exception as error:  # what the hub's client raises has no common class
            raise ValueError(f"data source {self.name!r} can't be read: {error}") from error

    def _load(self) -> Any:
        import datasets

        if self._on_disk:
            loaded = datasets.load_from_disk(self.path)
            return loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(self.path, self.config, split=self.split, streaming=self.form.streaming)

    def documents(self) -> Iterator[str]:
        """The text of each row."""
        for where, row in self.rows():
            yield text_of(row, self.form.text_field, where)

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(where it is, row) of each row."""
        for number, row in enumerate(self._load(), 1):
            yield f"{self.name}, row {number}", row

    def fingerprint(self) -> str:
        """Changes when the dataset does (streaming: when its name does)."""
        return self.name if self.form.streaming else f"{self.name} {self._load()._fingerprint}"


class Several:
    """Sources one after the other."""

    def __init__(self, sources: list["Source"]) -> None:
        self.sources = sources
        self.name: str = ", ".join(source.name for source in sources)

    def documents(self) -> Iterator[str]:
        """The text of each document."""
        for source in self.sources:
            yield from source.documents()

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(where it is, row) of each row."""
        for source in self.sources:
            yield from source.rows()

    def fingerprint(self) -> str:
        """Changes when one of theirs does."""
        return ", ".join(source.fingerprint() for source in self.sources)


Source = FileSource | HuggingFace | Several


def open_source(spec: str | list[str], form: TextFormat) -> Source:
    """The source that `data.source` names: `stdlib`, `hf:...`, files, or a list of these."""
    specs = [spec] if isinstance(spec, str) else spec
    if not any(spec == "stdlib" or spec.startswith("hf:") for spec in specs):
        return FileSource(specs, form)
    if len(specs) > 1:
        return Several([open_source(spec, form) for spec in specs])
    return StandardLibrary() if specs == ["stdlib"] else HuggingFace(specs[0], form)
