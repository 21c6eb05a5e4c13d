"""InstructionDataModule: questions and answers, of which a model learns the answers. B batch, T sequence length."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.corpus import Corpus, Spec
from datamodules.examples import Examples, hold_out, parts_of
from datamodules.loader import (
    IGNORE,
    Ordered,
    Stream,
    StreamDataModule,
    StreamLoader,
    check_sizes,
    loading,
    rank_and_world_size,
)
from datamodules.sampler import sample_at
from datamodules.sources import Source, TextFormat
from datamodules.tokenizer import VOCAB_SIZES, Tokenizer, load_tokenizer


class AnswerBatch(NamedTuple):
    """A batch to train on, an example a row, padded to the longest.

    Attributes:
        input_ids: (B, T).
        targets: (B, T), the ids one place further on where those are of an answer, else IGNORE.
        weight: of its mean loss, so that the mean over the batches of an optimizer step and over all processes is that
            over the answers' tokens.
        num_tokens: ids that are not padding.
    """

    input_ids: Tensor
    targets: Tensor
    weight: float
    num_tokens: int


def padded(examples: Examples, indices: NDArray[np.int64], rows: int, padding: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of examples, (rows, T); what only fills up has the target IGNORE."""
    length = max((len(examples.example(index)[0]) - 1 for index in indices), default=1)
    inputs = torch.full((rows, length), padding)
    targets = torch.full_like(inputs, IGNORE)
    for row, index in enumerate(indices):
        ids, is_answer = (torch.from_numpy(array) for array in examples.example(index))
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].long().where(is_answer[1:], IGNORE)
    return inputs, targets


class AnswerStream(Stream):
    """The shuffled stream of examples; `accumulate` batches of each process are an optimizer step."""

    def __init__(
        self, examples: Examples, padding: int, batch_size: int, rank: int, world_size: int, accumulate: int, seed: int
    ) -> None:
        self.examples, self.padding, self.seed = examples, padding, seed
        self.batches, self.start = world_size * accumulate, 0  # of a step; where the first one begins
        super().__init__(len(examples), batch_size, rank, world_size)

    def starts(self) -> Iterable[int]:
        """On from `position`, where a step begins."""
        self.start = self.position
        return super().starts()

    def batch_at(self, positions: NDArray[np.int64]) -> AnswerBatch:
        """The examples, and what they weigh in their step."""
        examples, step = self.examples, self.batches * self.batch_size
        first = self.start + (positions[0] - self.start) // step * step
        answers = examples.num_answers[sample_at(np.arange(first, first + step), len(examples), self.seed)]
        own = positions - first
        inputs, targets = padded(
            examples, samples := sample_at(positions, len(examples), self.seed), len(positions), self.padding
        )
        lengths = examples.starts[samples + 1] - examples.starts[samples] - 1
        weight = float(answers[own].sum() * self.batches / answers.sum())
        return AnswerBatch(inputs, targets, weight, int(lengths.sum()))


class OrderedAnswers(Ordered):
    """Every example exactly once."""

    def __init__(self, examples: Examples, padding: int, batch_size: int, rank: int, world_size: int) -> None:
        self.examples, self.padding = examples, padding
        super().__init__(len(examples), batch_size, rank, world_size)

    def batch_at(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        return padded(self.examples, positions[positions < self.num_samples], len(positions), self.padding)


class InstructionDataModule(StreamDataModule):
    """Questions and answers for fine-tuning: the loss is the mean over the tokens of the answers and their ends.

    A row has `instruction` (and `input`) and `output`, as Alpaca's and litgpt's; `prompt` and `response`; `prompt` and
    `completion`, which are taken as they are; or `messages`, each with `role` and `content`, of which all answers of
    the assistant are learned. :mod:`datamodules.examples` has the template.

    All examples are tokenized at the start and kept in memory, by every process: meant for up to a few 100,000.

    Args:
        source: .jsonl (.gz, .zst) or .parquet files, folders or globs of them, hf:NAME[:CONFIG][@SPLIT], or a list.
        tokenizer: that of the model: bytes, the path of a tokenizer.json, or hub:NAME.
        val_source: examples for validation. Default: the dataset's own validation split if there is one dataset, else
            `val_fraction` of the examples of `source`; those that ask the same are on one side.
        test_source: examples for `test`. Default: the dataset's own test split; without one, those for validation.
        seq_len: the most tokens of an example, T; more are cut off.
        batch_size: examples of a batch on each device, B; they are padded to the longest of them.
        val_fraction: share of the examples to hold out when there is no validation split.
        num_workers: processes that load batches; 0 is enough.
        seed: of the order of examples.

    Raises:
        ValueError: in `prepare_data` or `setup`, for missing files and for rows that are no examples, with their line.
    """

    def __init__(
        self,
        source: str | list[str],
        tokenizer: str,
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        seq_len: int = 1024,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(seq_len, batch_size, seed, val_fraction)
        if tokenizer == "bpe":
            raise ValueError("data.tokenizer=bpe: a trained model has a tokenizer: give the tokenizer.json beside it")
        self.specs: tuple[Spec | None, ...] = (source, val_source, test_source)
        self.tokenizer_name, self.seq_len, self.batch_size = tokenizer, seq_len, batch_size
        self.val_fraction, self.num_workers, self.seed = val_fraction, num_workers, seed
        self._read: dict[str, Examples] = {}
        self.vocab_size = VOCAB_SIZES.get(tokenizer) or self.tokenizer.vocab_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return load_tokenizer(self.tokenizer_name)

    def prepare_data(self) -> None:
        """Read and tokenize; a dataset of the hub is downloaded by one process."""
        corpus = Corpus(self.specs, self.tokenizer_name, TextFormat(), self.val_fraction, 0, Path())
        sources: dict[str, Source] = corpus.sources()
        found = {split: [parts_of(row, where) for where, row in source.rows()] for split, source in sources.items()}
        names = {split: source.name for split, source in sources.items()}
        if "val" not in found:
            found["train"], found["val"] = hold_out(found["train"], self.val_fraction)
            names |= {"train": f"{names['train']} (train)", "val": f"{names['train']} (val)"}
        self._read = {
            split: Examples(parts, self.tokenizer, self.seq_len, names[split]) for split, parts in found.items()
        }

    def setup(self, stage: str) -> None:
        """Every process has all examples."""
        if not self._read:
            self.prepare_data()
        self.train, self.val = self._read["train"], self._read["val"]
        self.test = self._read.get("test", self.val)

    def order(self) -> dict[str, int | str]:
        """The examples, and how they are cut and shuffled."""
        examples = f"{len(self.train):,} with fingerprint {self.train.fingerprint()}"
        return {"training examples": examples, "data.seq_len": self.seq_len, "data.seed": self.seed}

    def train_dataloader(self) -> StreamLoader:
        """This process's share of the shuffled stream.

        Raises:
            ValueError: when an epoch would end within an optimizer step, whose answers are counted together.
        """
        trainer: Any = self.trainer
        accumulate = trainer.accumulate_grad_batches if trainer else 1
        stream = AnswerStream(
            self.train, self._padding, self.batch_size, *rank_and_world_size(self), accumulate, self.seed
        )
        loader = StreamLoader(stream, accumulate, self.num_workers)
        limit = trainer.limit_train_batches if trainer and not trainer.fast_dev_run else 1.0
        if min(limit if isinstance(limit, int) else int(limit * len(loader)), len(loader)) % accumulate:
            raise ValueError(
                f"trainer.limit_train_batches={limit} (or overfit_batches) ends an epoch of {len(loader)} batches in "
                f"the middle of a step: give a multiple of trainer.accumulate_grad_batches={accumulate}"
            )
        return loader

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Every example of the validation split once."""
        return self._in_order(self.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Every example of the test split once."""
        return self._in_order(self.test)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The same: `predict` writes what each token of their answers costs."""
        return self._in_order(self.test)

    @property
    def _padding(self) -> int:
        return self.tokenizer.end_of_text

    def _in_order(self, examples: Examples) -> DataLoader[tuple[Tensor, Tensor]]:
        ordered = OrderedAnswers(examples, self._padding, self.batch_size, *rank_and_world_size(self))
        return DataLoader(ordered, **loading(num_workers=0))
