"""What text and images share: an endless shuffled stream for training, every sample once for evaluation. B batch."""

import re
import signal
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

IGNORE = -100  # a target that the loss passes over


class _Batches(IterableDataset[Any], ABC):
    """Positions cut into global batches, each of them into one batch a rank; worker w of W takes every W-th."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples, self.batch_size, self.rank = num_samples, batch_size, rank
        self.global_batch = batch_size * world_size

    @abstractmethod
    def batch_at(self, positions: NDArray[np.int64]) -> Any:
        """The batch of these positions, (B): a pure function of them."""

    @abstractmethod
    def starts(self) -> Iterable[int]:
        """The first position of each global batch."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        skip, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for start in islice(self.starts(), skip, None, stride):
            first = start + self.rank * self.batch_size
            try:
                batch = self.batch_at(np.arange(first, first + self.batch_size))
            except (ValueError, OSError) as error:
                if worker is None:
                    raise
                error.add_note(f"in process {worker.id} of those that load data:\n{traceback.format_exc()}")
                batch = error  # torch would hide its one line behind forty
            yield batch


class Stream(_Batches):
    """Batches from `position` on, without end. Each `num_samples` positions are an epoch."""

    position = 0

    def starts(self) -> Iterable[int]:
        """On from `position`."""
        return count(self.position, self.global_batch)


class Ordered(_Batches):
    """Every position below `num_samples` exactly once over all ranks.

    Every rank gets the same number of equally shaped batches, as collective operations need: `batch_at` fills up the
    rows of positions from `num_samples` on with what nobody counts.
    """

    def __len__(self) -> int:
        return len(self.starts())

    def starts(self) -> range:
        """Until all samples have come."""
        return range(0, self.num_samples, self.global_batch)


class Loader(DataLoader[Any]):
    """DataLoader, which raises what a user can cause in a worker as it was raised there."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(_checked, super().__iter__())


def _checked(batch: Any) -> Any:
    """The batch, if it is none of a worker's errors."""
    if isinstance(batch, Exception):
        raise batch
    return batch


class StreamLoader(Loader):
    """The shuffled stream. Its state is one integer: how many samples all ranks have had.

    Batches run over from one epoch into the next, so no sample is lost or comes twice, whatever the number of ranks
    and workers. `len` is the number of batches that an epoch takes, in whole optimizer steps; one iteration hands out
    as many, from wherever the stream is (a trainer that resumes in the middle of an epoch takes fewer). Workers live
    on from one iteration to the next.

    Attributes:
        waited: seconds that the consumer has spent waiting for batches so far.
    """

    def __init__(self, stream: Stream, accumulate: int = 1, num_workers: int = 0) -> None:
        self._stream, self.waited = stream, 0.0
        self._length = -(-stream.num_samples // (stream.global_batch * accumulate)) * accumulate
        super().__init__(stream, **loading(num_workers))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._iterator is None:  # DataLoader's own name: the trainer ends the workers through it
            self._iterator = self._get_iterator()
        for _ in range(self._length):
            start = time.perf_counter()
            batch = _checked(next(self._iterator))
            self.waited += time.perf_counter() - start
            self._stream.position += self._stream.global_batch  # counts what was handed out, not what was prefetched
            yield batch

    def stop(self) -> None:
        """End the workers; what they have prepared is prepared again when it is wanted."""
        self._iterator = None

    def state_dict(self) -> dict[str, int]:
        """The position in the stream."""
        return {"position": self._stream.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position, with any number of ranks and any batch size.

        Raises:
            ValueError: for one in data with phases.
        """
        if "position" not in state:
            raise ValueError(
                "the checkpoint was trained in phases: resume it with its PhasedDataModule, or start a new run from "
                "it, model.init_from"
            )
        self._stream.position = state["position"]
        self.stop()


class StreamDataModule(LightningDataModule, ABC):
    """Data whose training stream a resumed run continues: the same samples in the same order.

    Attributes:
        phase_steps: optimizer steps of the phase that it is for; None for a whole run.
    """

    phase_steps: int | None = None

    @abstractmethod
    def order(self) -> dict[str, int | str]:
        """What decides which sample comes where in the stream, by the names that a user knows."""

    def __str__(self) -> str:  # Lightning's opens all the data to say how much there is; the config parser asks for it
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self.order()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the checkpoint's, in training.

        Raises:
            ValueError: when the stream is another one: samples would be lost and repeated.
        """
        if self.trainer is None or not self.trainer.training:
            return
        now = self.order()
        if changed := [f"{name}: {state[name]} then, {now[name]} now" for name in now if state.get(name) != now[name]]:
            raise ValueError(
                f"the checkpoint was trained on other data ({'; '.join(changed)}): a resumed run goes on with the same "
                "samples in the same order. For other data start a new run from the weights: `tokenformer export`, "
                "then model.init_from"
            )


def loading(num_workers: int) -> dict[str, Any]:
    """DataLoader's settings for a dataset that makes whole batches."""
    return {
        "batch_size": None,
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _leave_signals_to_the_trainer,
        "generator": torch.Generator(),  # DataLoader seeds its workers: not out of the global generator
    }


def _leave_signals_to_the_trainer(worker: int) -> None:
    """All processes of a job, or of a terminal, get these; the trainer still needs batches until its step is done."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def rank_and_world_size(data: LightningDataModule) -> tuple[int, int]:
    """(rank, number of ranks) among those that train on different samples."""
    place = data.trainer.distributed_sampler_kwargs if data.trainer else None
    return (place["rank"], place["num_replicas"]) if place else (0, 1)


def check_sizes(seq_len: int, batch_size: int, seed: int, val_fraction: float) -> None:
    """Refuse settings of a text data module that are too small, and a fraction that is none.

    Raises:
        ValueError: naming the first of them.
    """
    for name, value, least in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"data.{name}={value}: must be at least {least}")
    if not 0 < val_fraction < 1:
        raise ValueError(f"data.val_fraction={val_fraction}: must lie between 0 and 1")


def check_part_of_name(name: str, where: str) -> None:
    """Refuse a name that can't be a part of a metric's, `val/NAME/loss`.

    Raises:
        ValueError: for one with other characters than letters, digits, _ and -.
    """
    if not re.fullmatch(r"(?!raw_)\w[\w-]*", name):  # EMA's metrics begin with val/raw_
        raise ValueError(
            f"{where}: {name!r} is to be a part of a metric's name: give letters, digits, _ or -, and not raw_ first"
        )
