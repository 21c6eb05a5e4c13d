"""TextDataModule: documents to batches of token sequences. B batch, T sequence length."""

import codecs
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loader import IGNORE, Ordered, Stream, StreamDataModule, StreamLoader, loading, rank_and_world_size
from datamodules.reading import read_text
from datamodules.sampler import sample_at
from datamodules.sources import HuggingFace, Source, TextFormat, open_source
from datamodules.tokenizer import VOCAB_SIZES, Tokenizer, load_tokenizer
from datamodules.tokens import TokenFile, prepare, read_metadata

VAL_SPLITS = ("validation", "val", "valid", "dev")

Batch = tuple[Tensor, Tensor]  # input_ids (B, T), targets (B, T): the ids one place further on


class TextDataModule(StreamDataModule):
    """Text for causal language models: tokenizes once, then serves sequences from a memory-mapped file.

    Args:
        source: training documents: stdlib (Python's own standard library), .txt/.jsonl/.parquet files (also .txt.gz,
            .jsonl.zst, ...), folders or globs of them, hf:NAME[:CONFIG][@SPLIT], a Hugging Face dataset of the hub or a
            local folder of one, or a list of these.
        val_source: validation documents. Default: the dataset's own validation split if there is one dataset, else
            `val_fraction` of the documents of `source`.
        test_source: test documents. Default: the dataset's own test split; without one, `test` runs on validation.
        tokenizer: bytes, the path of a tokenizer.json, hub:NAME, or bpe (trained on the corpus).
        bpe_vocab_size: size of the vocabulary that `bpe` trains; a small text gives a smaller one.
        seq_len: tokens of a training sequence, T.
        batch_size: sequences of a batch on each device, B.
        val_fraction: share of the documents to hold out when there is no validation split; of a single one, as of a
            single .txt file, that share of its text, the end.
        text_field: column with the text in .jsonl, .parquet and Hugging Face rows.
        document_separator: string between the documents of a .txt file. Default: a file is one document. A
            backslash with an n or a t stands for a line's end or a tab, as a command line has them.
        streaming: read a Hugging Face dataset without downloading it first.
        cache_dir: token files go into a folder of their own in here.
        num_workers: processes that load batches; 0 is enough unless the disk is slow.
        num_processes: cores that tokenize, a thread each. Default: all of them.
        seed: of the order of samples.
        predict_file: a text file for `tokenformer predict`.
        encoding: of .txt and .jsonl files and of `predict_file`, as Python names it: utf-8, latin-1, utf-16, ...

    Raises:
        ValueError: in `prepare_data` or `setup`, for missing files, an empty corpus, text shorter than a sequence, or
            token files that were made from something else.
    """

    def __init__(
        self,
        source: str | list[str] = "stdlib",
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        tokenizer: str = "bytes",
        bpe_vocab_size: int = 8192,
        seq_len: int = 1024,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        text_field: str = "text",
        document_separator: str | None = None,
        streaming: bool = False,
        cache_dir: str = "data",
        num_workers: int = 0,
        num_processes: int | None = None,
        seed: int = 0,
        predict_file: str | None = None,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__()
        for name, value, least in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"data.{name}={value}: must be at least {least}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: must lie between 0 and 1")
        if not source:
            raise ValueError(f"data.source={source!r}: give files, a folder, hf:NAME or stdlib")
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise ValueError(f"data.encoding={encoding!r}: unknown to Python; utf-8, latin-1, ... are known") from error
        ends = {r"\n": "\n", r"\t": "\t"}  # as they come from a command line
        separator = re.sub(r"\\[nt]", lambda found: ends[found[0]], document_separator or "") or None
        self.source, self.val_source, self.test_source = source, val_source, test_source
        self.tokenizer_name, self.bpe_vocab_size = tokenizer, bpe_vocab_size
        self.seq_len, self.batch_size, self.val_fraction = seq_len, batch_size, val_fraction
        self.form = TextFormat(text_field, separator, streaming, encoding)
        self.cache_dir, self.num_workers, self.seed = Path(cache_dir), num_workers, seed
        self.num_processes = num_processes or os.cpu_count() or 1
        self.predict_file = predict_file
        # Known before anything is read, since the model's embedding is built from it; a small text gives fewer, which
        # `setup` knows.
        known = bpe_vocab_size if tokenizer == "bpe" else VOCAB_SIZES.get(tokenizer)
        self.requested_vocab_size = known or self.tokenizer.vocab_size
        self.vocab_size = self.requested_vocab_size

    @property
    def tokens_per_batch(self) -> int:
        """Training tokens of a batch on one device."""
        return self.batch_size * self.seq_len

    @property
    def folder(self) -> Path:
        """Where the tokens are: a name to recognise, and a hash of all settings that they depend on."""
        settings = [self.source, self.val_source, self.test_source, self.tokenizer_name, self.val_fraction]
        settings += [self.form.text_field, self.form.document_separator]
        settings += [self.form.encoding] if self.form.encoding != "utf-8" else []
        settings += [self.bpe_vocab_size] if self.tokenizer_name == "bpe" else []
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        first = self.source if isinstance(self.source, str) else self.source[0]
        words = (Path(first).stem, Path(self.tokenizer_name).parent.name or self.tokenizer_name)
        return self.cache_dir / re.sub(r"[^\w.-]+", "-", "-".join((*words, digest)))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the prepared tokens."""
        saved = self.folder / "tokenizer.json"
        return load_tokenizer(str(saved) if saved.exists() else self.tokenizer_name)

    def sources(self) -> dict[str, Source]:
        """The source of each split that has one of its own."""
        sources = {"train": open_source(self.source, self.form)}
        own = sources["train"].splits() if isinstance(sources["train"], HuggingFace) else []
        for split, given, names in (("val", self.val_source, VAL_SPLITS), ("test", self.test_source, ("test",))):
            found = [name for name in names if name in own]
            if given is not None:
                sources[split] = open_source(given, self.form)
            elif found:
                sources[split] = open_source(f"{sources['train'].name.partition('@')[0]}@{found[0]}", self.form)
        return sources

    def prepare_data(self) -> None:
        """Tokenize, unless it is done already. Tokens whose source is gone are used as they are, with a warning."""
        if self.trainer is not None and self.trainer.predicting and self.tokenizer_name != "bpe":
            return  # only the tokenizer is needed
        try:
            sources = self.sources()
        except ValueError as error:
            if not self.folder.exists():
                raise
            warnings.warn(f"{error}; the tokens in {self.folder} are used as they are", stacklevel=2)
            return
        prepare(
            self.folder,
            sources,
            self.tokenizer_name,
            bpe_vocab_size=self.bpe_vocab_size,
            val_fraction=self.val_fraction,
            num_threads=self.num_processes,
        )

    def setup(self, stage: str) -> None:
        """Open the token files and check that they are long enough; `vocab_size` is the tokenizer's from here on."""
        if self.tokenizer_name == "bpe" and read_metadata(self.folder).get("whole_vocab"):
            self.vocab_size = self.tokenizer.vocab_size
        if stage == "predict":
            self.predict_ids = self._encode_predict_file()
            return
        self.train, self.val = TokenFile(self.folder, "train"), TokenFile(self.folder, "val")
        has_test = "test" in read_metadata(self.folder)["splits"]
        self.test = TokenFile(self.folder, "test") if has_test else self.val
        if stage == "fit" and len(self.train.ids) <= self.seq_len:
            raise ValueError(
                f"the training text has {len(self.train.ids)} tokens, data.seq_len={self.seq_len} needs at least "
                f"{self.seq_len + 1}: give more text or a smaller seq_len"
            )

    def order(self) -> dict[str, int | str]:
        """The token file, and how it is cut and shuffled."""
        tokens = f"{len(self.train.ids):,} with fingerprint {self.train.fingerprint()}"
        return {"training tokens": tokens, "data.seq_len": self.seq_len, "data.seed": self.seed}

    def _encode_predict_file(self) -> NDArray[np.int64]:
        if self.predict_file is None:
            raise ValueError("predict needs a text: give --data.predict_file FILE")
        path = Path(self.predict_file)
        if not path.is_file():
            raise ValueError(f"data.predict_file={self.predict_file!r}: no such file (in {Path.cwd()})")
        tokenizer = self.tokenizer
        ids = tokenizer.encode_batch([read_text(path, self.form.encoding)])[0]
        if not ids:
            raise ValueError(f"data.predict_file={self.predict_file!r}: is empty")
        return np.array([tokenizer.end_of_text, *ids])  # a document begins after the end of another

    def train_dataloader(self) -> "TrainLoader":
        """This rank's share of the shuffled stream."""
        rank, world_size = rank_and_world_size(self)
        return TrainLoader(
            self.train.ids,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every token of the validation split once."""
        return self._in_order(self.val.ids)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Every token of the test split once."""
        return self._in_order(self.test.ids)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every token of `predict_file` once."""
        return self._in_order(self.predict_ids)

    def _in_order(self, ids: NDArray[Any]) -> DataLoader[Batch]:
        return DataLoader(
            OrderedBatches(ids, self.seq_len, self.batch_size, *rank_and_world_size(self)), **loading(num_workers=0)
        )


class TrainLoader(StreamLoader):
    """The shuffled stream of sequences. A sample is seq_len + 1 tokens, and the next begins at its last one."""

    def __init__(
        self,
        ids: NDArray[Any],
        *,
        seq_len: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(_Sequences(ids, seq_len, batch_size, rank, world_size, seed), accumulate, num_workers)


class _Sequences(Stream):
    def __init__(self, ids: NDArray[Any], seq_len: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        super().__init__((len(ids) - 1) // seq_len, batch_size, rank, world_size)
        self.ids, self.seq_len, self.seed = ids, seq_len, seed

    def __getstate__(self) -> dict[str, Any]:
        """For workers: a memory-mapped file travels as its name, not as its contents."""
        mapped = (self.ids.filename, self.ids.dtype) if isinstance(self.ids, np.memmap) else None
        return self.__dict__ | ({"ids": None, "mapped": mapped} if mapped else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        mapped = state.pop("mapped", None)
        self.__dict__.update(state)
        if mapped:
            self.ids = np.memmap(mapped[0], dtype=mapped[1], mode="r")

    def batch_at(self, positions: NDArray[np.int64]) -> Batch:
        """Inputs and targets."""
        samples = sample_at(positions, self.num_samples, self.seed)
        places = samples[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        sequences = torch.from_numpy(self.ids[places].astype(np.int64))
        return sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()  # (B, T): pinning needs them whole


class OrderedBatches(Ordered):
    """All windows of a text in order, each token a target exactly once; what only fills up has the target IGNORE."""

    def __init__(self, ids: NDArray[Any], seq_len: int, batch_size: int, rank: int, world_size: int) -> None:
        super().__init__(-(-(len(ids) - 1) // seq_len), batch_size, rank, world_size)
        self.ids, self.seq_len = ids, seq_len

    def batch_at(self, positions: NDArray[np.int64]) -> Batch:
        """Inputs and targets."""
        inputs = torch.zeros(len(positions), self.seq_len, dtype=torch.long)
        targets = torch.full_like(inputs, IGNORE)
        for row, start in enumerate(positions * self.seq_len):
            window = torch.from_numpy(self.ids[start : start + self.seq_len + 1].astype(np.int64))
            if len(window) > 1:
                inputs[row, : len(window) - 1] = window[:-1]
                targets[row, : len(window) - 1] = window[1:]
        return inputs, targets
