"""PhasedDataModule: data that change in the course of a run, phase after phase."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate as sums_of
from typing import Any

from torch.utils.data import DataLoader

from datamodules.loader import StreamDataModule, StreamLoader, check_part_of_name

# What all phases have alike: one model sees them.
SHARED = ("vocab_size", "tokenizer_name", "seq_len", "batch_size", "class_names", "preprocessing")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with data of its own.

    Attributes:
        name: of its metrics, `val/NAME/loss`, and for `at_phase` of a growth.
        steps: optimizer steps. 0: only evaluated.
        data: what it is trained on and validated by.
    """

    name: str
    steps: int
    data: StreamDataModule


class PhasedLoader:
    """The streams of all phases one after the other, each for its steps; one iteration hands out what is left of them.

    Its state is how many steps were handed out, and where each stream is: samples of it that all ranks have had. So a
    run goes on in its phase with any number of ranks, and any batch size.
    """

    def __init__(self, loaders: list[StreamLoader], steps: list[int], accumulate: int = 1) -> None:
        self._loaders, self._accumulate = loaders, accumulate
        self._ends = [accumulate * end for end in sums_of(steps)]  # in batches
        self._batches = 0  # handed out

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def waited(self) -> float:
        """Seconds that the consumer has spent waiting for batches so far."""
        return sum(loader.waited for loader in self._loaders)

    def __iter__(self) -> Iterator[Any]:
        for loader, end in zip(self._loaders, self._ends, strict=True):
            while self._batches < end:
                for batch in loader:  # an epoch of it
                    self._batches += 1
                    yield batch
                    if self._batches == end:
                        break
            loader.stop()

    def state_dict(self) -> dict[str, Any]:
        """The step, and the position in each stream."""
        positions = [loader.state_dict()["position"] for loader in self._loaders]
        return {"step": self._batches // self._accumulate, "positions": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; without a step from the beginning.

        Raises:
            ValueError: for a position in data without phases.
        """
        if state.get("position"):
            raise ValueError(
                "the checkpoint was trained on data without phases: start a new run from it, model.init_from"
            )
        self._batches = state.get("step", 0) * self._accumulate
        for i, loader in enumerate(self._loaders):
            loader.load_state_dict({"position": [*state.get("positions", ()), *[0] * (i + 1)][i]})


class PhasedDataModule(StreamDataModule):
    """A run in phases: each trains on its own data for its own steps, and all of them are validated throughout.

    `trainer.max_steps` is the sum of the steps. The learning rate has its schedule in each phase, warm-up and decay. A
    phase is a number of steps, so a run that is resumed, on other devices too, is in the phase in which it was; it may
    have other phases ahead.

    Args:
        phases: in order: a name, steps, and a data module, all of one class, with the same tokenizer, sequence length,
            classes, image size and batch size.

    Raises:
        ValueError: for phases of one name or of different kinds; in `prepare_data` and `setup`, when
            `trainer.max_steps` is another number than all of them.
    """

    def __init__(self, phases: list[Phase]) -> None:
        super().__init__()
        self.phases = [Phase(**phase) if isinstance(phase, dict) else phase for phase in phases]
        names = [phase.name for phase in self.phases]
        for name in names:
            check_part_of_name(name, "data.phases")
        if len(set(names)) < len(names):
            raise ValueError(f"data.phases: {', '.join(names)}: give each a name of its own")
        if any(phase.steps < 0 for phase in self.phases) or not self.trained:
            raise ValueError(
                f"data.phases: steps {', '.join(str(phase.steps) for phase in self.phases)}: one at least needs steps, "
                "and 0 of the others mean that they are evaluated only"
            )
        first = self.phases[0].data
        for phase in self.phases:
            if type(phase.data) is not type(first):
                kinds = f"{type(phase.data).__name__} in {phase.name}, {type(first).__name__} in {names[0]}"
                raise ValueError(f"data.phases: {kinds}: all phases have data of one kind")
            for key in SHARED:
                if (one := getattr(first, key, None)) != (other := getattr(phase.data, key, None)):
                    raise ValueError(
                        f"data.phases: {key.removesuffix('_name')} is {other} in {phase.name}, {one} in {names[0]}: "
                        "one model sees all phases"
                    )
            if getattr(phase.data, "tokenizer_name", None) == "bpe":
                raise ValueError(
                    "data.phases: tokenizer bpe would train another one on the text of each phase: prepare one, then "
                    "give its tokenizer.json"
                )
            if getattr(phase.data, "val_sources", None):
                raise ValueError(
                    f"data.phases: {phase.name} has val_sources: what is validated beside the phases is a phase of "
                    "steps: 0"
                )
            phase.data.phase_steps = phase.steps

    def __getattr__(self, name: str) -> Any:  # of what is not found here: what all phases share
        if name.startswith("_") or "phases" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.phases[0].data, name)

    @property
    def trained(self) -> list[Phase]:
        """Those with steps."""
        return [phase for phase in self.phases if phase.steps]

    @property
    def phase_starts(self) -> dict[str, int]:
        """The step before which each of them begins."""
        ends = sums_of(phase.steps for phase in self.trained)
        return {phase.name: end - phase.steps for phase, end in zip(self.trained, ends, strict=True)}

    def _join(self) -> None:
        """Let the phases' data know the trainer."""
        trainer, steps = self.trainer, sum(phase.steps for phase in self.phases)
        if trainer is not None and trainer.training and not trainer.fast_dev_run and trainer.max_steps != steps:  # type: ignore[attr-defined]
            raise ValueError(
                f"trainer.max_steps={trainer.max_steps}, but the steps of data.phases are {steps} together: set it so"
            )
        for phase in self.phases:
            phase.data.trainer = trainer

    def prepare_data(self) -> None:
        """That of all phases."""
        self._join()
        for phase in self.phases:
            phase.data.prepare_data()

    def setup(self, stage: str) -> None:
        """That of all phases."""
        if stage == "predict":
            raise ValueError("predict takes data of one kind, not phases: give --config of a run with one")
        self._join()
        for phase in self.phases:
            phase.data.setup(stage)

    def order(self) -> dict[str, int | str]:
        """The order of each phase."""
        return {
            f"phase {phase.name}": "; ".join(f"{key}: {value}" for key, value in phase.data.order().items())
            for phase in self.trained
        }

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        step = self.trainer.global_step if self.trainer else 0
        return {"step": step, "steps": {phase.name: phase.steps for phase in self.trained}, "order": self.order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the checkpoint's, in training: what has begun must be the same.

        Raises:
            ValueError: when it is not.
        """
        if self.trainer is None or not self.trainer.training:
            return
        now, order, step, start = self.trained, self.order(), state["step"], 0
        for i, (name, steps) in enumerate(state["steps"].items()):
            if start >= step:
                return
            known = i < len(now) and now[i].name == name and order[key := f"phase {name}"] == state["order"][key]
            goes_on = known and start + steps >= step <= start + now[i].steps  # in this phase, which may end elsewhere
            if not known or (now[i].steps != steps and not goes_on):
                phases = ", ".join(f"{phase.name} {phase.steps}" for phase in now)
                raise ValueError(
                    f"the checkpoint, of step {step}, was trained in other phases: its phase {name} of {steps} steps "
                    f"({state['order'][f'phase {name}']}) has begun, and data.phases are {phases}: what has begun "
                    "stays as it was. For other data start a new run from the weights: model.init_from"
                )
            start += steps

    def num_images(self, split: str) -> int:
        """Of all phases."""
        return sum(phase.data.num_images(split) for phase in self.phases)  # type: ignore[attr-defined]

    def some_classes(self, split: str) -> list[int] | None:
        """The classes of all phases' images, where a class map names more; None for all."""
        found = [phase.data.some_classes(split) for phase in self.phases]  # type: ignore[attr-defined]
        return None if None in found else sorted(set().union(*found))

    def set_class_order(self, names: list[str]) -> None:
        """Take the order of a model that knows the same classes."""
        for phase in self.phases:
            phase.data.set_class_order(names)  # type: ignore[attr-defined]

    @property
    def unreadable(self) -> int:
        """Images that could not be read so far, with `skip_unreadable`."""
        return sum(phase.data.unreadable for phase in self.phases)  # type: ignore[attr-defined]

    def train_dataloader(self) -> PhasedLoader:
        """This rank's share of the streams."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        loaders = [phase.data.train_dataloader() for phase in self.trained]
        return PhasedLoader(loaders, [phase.steps for phase in self.trained], accumulate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Each phase's validation data once."""
        return [phase.data.val_dataloader() for phase in self.phases]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Each phase's test data once."""
        return [phase.data.test_dataloader() for phase in self.phases]
