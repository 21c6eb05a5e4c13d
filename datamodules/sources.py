"""Where documents come from: the standard library, local files, Hugging Face datasets."""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FULL_READ = 2**32  # bytes of files that are read whole for their fingerprint: a few seconds' work


@dataclass(frozen=True)
class TextFormat:
    """How to find documents in a source.

    Attributes:
        text_field: column of `.jsonl`, `.parquet` and Hugging Face rows that holds the text.
        document_separator: string between the documents of a `.txt` file; None: a file is a document.
        streaming: read a Hugging Face dataset without downloading all of it first.
    """

    text_field: str = "text"
    document_separator: str | None = None
    streaming: bool = False


class FileSource:
    """Local `.txt`, `.jsonl` and `.parquet` files; paths or globs, read in the order of their names.

    Raises:
        ValueError: when a pattern matches nothing or a file has another ending.
    """

    def __init__(self, patterns: list[str], form: TextFormat) -> None:
        self.form, self.name = form, ", ".join(patterns)
        self.files: list[Path] = []
        for pattern in patterns:
            found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
            if not found:
                raise ValueError(f"data source {pattern!r}: no such file (in {Path.cwd()})")
            self.files += found
        for path in self.files:
            if path.suffix not in (".txt", ".jsonl", ".parquet"):
                raise ValueError(f"data source {path}: ends in {path.suffix!r}; give .txt, .jsonl or .parquet files")

    def documents(self) -> Iterator[str]:
        """The text of each document."""
        for path in self.files:
            if path.suffix == ".txt":
                text = path.read_text(encoding="utf-8", errors="replace")
                yield from text.split(self.form.document_separator) if self.form.document_separator else [text]
            elif path.suffix == ".jsonl":
                with path.open(encoding="utf-8") as file:
                    for number, line in enumerate(file, 1):
                        if not line.strip():
                            continue
                        yield self._field(_parse(line, f"{path}:{number}"), f"{path}:{number}")
            else:
                yield from self._parquet(path)

    def _parquet(self, path: Path) -> Iterator[str]:
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(path)
        if self.form.text_field not in table.schema_arrow.names:
            self._field(dict.fromkeys(table.schema_arrow.names), str(path))
        for batch in table.iter_batches(batch_size=1024, columns=[self.form.text_field]):
            for text in batch.column(0).to_pylist():
                yield self._field({self.form.text_field: text}, str(path))

    def _field(self, row: dict[str, Any], where: str) -> str:
        text = row.get(self.form.text_field)
        if not isinstance(text, str):
            raise ValueError(f"{where}: no text in {self.form.text_field!r}; set data.text_field to one of {list(row)}")
        return text

    def fingerprint(self) -> str:
        """Changes when a file's name or contents do; of a corpus that takes long to read, its name, size or time."""
        digest = hashlib.blake2b(digest_size=16)
        read = sum(path.stat().st_size for path in self.files) <= FULL_READ
        for path in self.files:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {0 if read else status.st_mtime_ns} ".encode())
            if read:
                digest.update(path.read_bytes())
        return digest.hexdigest()


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    return row if isinstance(row, dict) else {}


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
            yield path.read_text(encoding="utf-8", errors="replace")


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
        if self.split not in self.splits():
            raise ValueError(f"data source {spec!r}: has no split {self.split!r}, but {', '.join(self.splits())}")

    @property
    def _on_disk(self) -> bool:
        return any((Path(self.path) / name).is_file() for name in ("dataset_dict.json", "state.json"))

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
        for row in self._load():
            if not isinstance(text := row.get(self.form.text_field), str):
                field = self.form.text_field
                raise ValueError(f"{self.name}: no text in {field!r}; set data.text_field to one of {list(row)}")
            yield text

    def fingerprint(self) -> str:
        """Changes when the dataset does (streaming: when its name does)."""
        return self.name if self.form.streaming else f"{self.name} {self._load()._fingerprint}"


Source = FileSource | HuggingFace


def open_source(spec: str | list[str], form: TextFormat) -> Source:
    """The source that `data.source` names: `stdlib`, `hf:...`, or files."""
    specs = [spec] if isinstance(spec, str) else spec
    if specs == ["stdlib"]:
        return StandardLibrary()
    if len(specs) == 1 and specs[0].startswith("hf:"):
        return HuggingFace(specs[0], form)
    return FileSource(specs, form)
