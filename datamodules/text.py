"""TextDataModule: documents to batches of token sequences. B batch, T sequence length."""

import codecs
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from datamodules.corpus import Corpus, Spec
from datamodules.loader import StreamDataModule, check_part_of_name, check_sizes, loading, rank_and_world_size
from datamodules.mixtures import BLOCK, Joined, repeated, shares_of
from datamodules.reading import read_text
from datamodules.sources import TextFormat
from datamodules.text_batches import Batch, OrderedBatches, Texts, TrainLoader
from datamodules.tokenizer import VOCAB_SIZES, Tokenizer, load_tokenizer
from datamodules.tokens import read_metadata


class TextDataModule(StreamDataModule):
    """Text for causal language models: tokenizes once, then serves sequences from a memory-mapped file.

    Args:
        source: training documents: stdlib (Python's own standard library), .txt/.jsonl/.parquet files (also .txt.gz,
            .jsonl.zst, ...), folders or globs of them, hf:NAME[:CONFIG][@SPLIT], a Hugging Face dataset of the hub or a
            local folder of one, or a list of these. Or a mixture, {SOURCE: WEIGHT, ...}: a weight, over their sum, is
            the share of the training samples that come from that source.
        val_source: validation documents. Default: the dataset's own validation split if there is one dataset, else
            `val_fraction` of the documents of `source`; of a mixture, of each of its sources.
        test_source: test documents. Default: the dataset's own test split (of a mixture without `val_source`, those of
            its sources); without one, `test` runs on validation.
        val_sources: more validation documents, {NAME: SOURCE, ...}; their metrics are `val/NAME/loss`, ...
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
        source: str | list[str] | dict[str, float] = "stdlib",
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        val_sources: dict[str, str | list[str]] | None = None,
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
        check_sizes(seq_len, batch_size, seed, val_fraction)
        if not source:
            raise ValueError(f"data.source={source!r}: give files, a folder, hf:NAME or stdlib")
        # A mapping has no order: one that a run has saved may come in another.
        source = dict(sorted(source.items())) if isinstance(source, dict) else source
        self.shares = shares_of(source) if isinstance(source, dict) else None
        if self.shares is not None and tokenizer == "bpe":
            raise ValueError(
                "data.tokenizer=bpe with a mixture in data.source: its sources need one tokenizer; prepare them as a "
                "list, then give the tokenizer.json of that folder, which lies in data.cache_dir"
            )
        for name in val_sources or {}:
            check_part_of_name(name, "data.val_sources")
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise ValueError(f"data.encoding={encoding!r}: unknown to Python; utf-8, latin-1, ... are known") from error
        ends = {r"\n": "\n", r"\t": "\t"}  # as they come from a command line
        separator = re.sub(r"\\[nt]", lambda found: ends[found[0]], document_separator or "") or None
        self.source, self.val_source, self.test_source = source, val_source, test_source
        self.val_sources = val_sources or {}
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

    def _corpus(self, *specs: Spec | None, val_fraction: float | None = None, tokenizer: str | None = None) -> Corpus:
        return Corpus(
            specs,
            tokenizer or self.tokenizer_name,
            self.form,
            self.val_fraction if val_fraction is None else val_fraction,
            self.bpe_vocab_size,
            self.cache_dir,
        )

    @property
    def corpora(self) -> dict[str, list[Corpus]]:
        """What each split, train, val or test, is made of; a corpus may be in several."""
        val, test = self.val_source, self.test_source
        if not isinstance(self.source, dict):
            whole = [self._corpus(self.source, val, test)]
            return {"train": whole, "val": whole, "test": whole}
        # Each source has a folder of its own, that of a run on it alone.
        parts = [self._corpus(source, None, None, val_fraction=None if val is None else 0.0) for source in self.source]
        return {
            "train": parts,
            "val": parts if val is None else [self._corpus(None, val, None, val_fraction=0.0)],
            "test": parts if test is None else [self._corpus(None, None, test, val_fraction=0.0)],
        }

    @property
    def named_corpora(self) -> dict[str, Corpus]:
        """Those of `val_sources`."""
        tokenizer = str(self.folder / "tokenizer.json") if self.tokenizer_name == "bpe" else None
        return {
            name: self._corpus(None, spec, None, val_fraction=0.0, tokenizer=tokenizer)
            for name, spec in self.val_sources.items()
        }

    @property
    def folder(self) -> Path:
        """Where the training tokens are; of a mixture, those of its first source."""
        return self.corpora["train"][0].folder

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the prepared tokens."""
        saved = self.folder / "tokenizer.json"
        return load_tokenizer(str(saved) if saved.exists() else self.tokenizer_name)

    def prepare_data(self) -> None:
        """Tokenize, unless it is done already. Tokens whose source is gone are used as they are, with a warning."""
        if self.trainer is not None and self.trainer.predicting and self.tokenizer_name != "bpe":
            return  # only the tokenizer is needed
        corpora = [corpus for split in self.corpora.values() for corpus in split]
        for corpus in dict.fromkeys([*corpora, *self.named_corpora.values()]):
            corpus.prepare(self.num_processes)

    def setup(self, stage: str) -> None:
        """Open the token files and check that they are long enough; `vocab_size` is the tokenizer's from here on."""
        if self.tokenizer_name == "bpe" and read_metadata(self.folder).get("whole_vocab"):
            self.vocab_size = self.tokenizer.vocab_size
        if stage == "predict":
            self.predict_ids = self._encode_predict_file()
            return
        corpora = self.corpora
        self.train, self.val = (Joined([c.tokens(split) for c in corpora[split]]) for split in ("train", "val"))
        test = [corpus for corpus in corpora["test"] if "test" in read_metadata(corpus.folder)["splits"]]
        self.test = Joined([corpus.tokens("test") for corpus in test]) if test else self.val
        self.named = {name: corpus.tokens("val") for name, corpus in self.named_corpora.items()}
        for corpus, file in zip(corpora["train"], self.train.files, strict=True):
            if stage == "fit" and len(file.ids) <= self.seq_len:
                raise ValueError(
                    f"the training text of {corpus.name} has {len(file.ids)} tokens, data.seq_len={self.seq_len} needs "
                    f"at least {self.seq_len + 1}: give more text or a smaller seq_len"
                )

    def order(self) -> dict[str, int | str]:
        """The token files, and how they are cut, mixed and shuffled."""
        tokens = ", ".join(f"{len(file.ids):,} with fingerprint {file.fingerprint()}" for file in self.train.files)
        order: dict[str, int | str] = {"training tokens": tokens}
        if self.shares is not None:
            order["weights in data.source"] = ", ".join(f"{share / BLOCK:g}" for share in self.shares)
        return order | {"data.seq_len": self.seq_len, "data.seed": self.seed}

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

    def train_dataloader(self) -> TrainLoader:
        """This rank's share of the shuffled stream."""
        rank, world_size = rank_and_world_size(self)
        loader = TrainLoader(
            self.train.texts,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            shares=self.shares,
            rank=rank,
            world_size=world_size,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            seed=self.seed,
            num_workers=self.num_workers,
        )
        if self.shares is not None:
            self._say_what_is_repeated(loader, self.shares)
        return loader

    def _say_what_is_repeated(self, loader: TrainLoader, shares: tuple[int, ...]) -> None:
        stream: Any = loader.dataset
        what, num_samples = "an epoch", stream.num_samples
        if self.trainer is not None and (steps := self.phase_steps or self.trainer.max_steps) > 0:
            what = f"{steps} steps"
            num_samples = steps * self.trainer.accumulate_grad_batches * stream.global_batch
        times = repeated(shares, stream.sizes, num_samples)
        names = [corpus.name for corpus in self.corpora["train"]]
        if told := ", ".join(f"{names[i]} {often:.3g} times" for i, often in times.items()):
            rank_zero_info(f"data.source: repeated, being smaller than their shares of {what}: {told}")

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Every token of the validation split once; after it those of `val_sources`."""
        return self._evaluated(self.val)

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Every token of the test split once; after it those of `val_sources`."""
        return self._evaluated(self.test)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every token of `predict_file` once."""
        return self._in_order([self.predict_ids])

    def _evaluated(self, main: Joined) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """A loader; with `val_sources` a list."""
        if not self.named:
            return self._in_order(main.texts)
        return [self._in_order(texts) for texts in (main.texts, *([file.ids] for file in self.named.values()))]

    def _in_order(self, texts: Texts) -> DataLoader[Batch]:
        return DataLoader(
            OrderedBatches(texts, self.seq_len, self.batch_size, *rank_and_world_size(self)), **loading(num_workers=0)
        )
