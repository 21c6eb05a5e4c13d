"""When a model grows, and how far."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from lit_modules.optim.schedule import LearningRate, check_schedule


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """A metric that no longer gets better.

    Attributes:
        monitor: name of a logged metric.
        mode: min for one that should fall, max for one that should rise, such as val/top1.
        patience: validations without a new best.
        min_delta: what a new best must be better by.
    """

    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"on_plateau.mode={self.mode!r}: choose min or max")
        if self.patience < 1:
            raise ValueError(f"on_plateau.patience={self.patience}: must be at least 1 validation")
        if not self.min_delta >= 0:
            raise ValueError(f"on_plateau.min_delta={self.min_delta}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """When to grow, and how far. Exactly one moment; counts or a factor.

    Attributes:
        at_step: before this optimizer step. 0 is the first: for a model that starts from `model.init_from`.
        at_phase: before the first step of this phase of the data (PhasedDataModule).
        at_tokens: at the first step that begins with so many training tokens behind it.
        on_plateau: after a validation, when a metric has stopped getting better.
        qkv: parameter tokens of each query, key and value projection afterwards.
        proj: of the output projections.
        ffn: of the feed-forward layers.
        factor: in place of counts: parameter tokens afterwards over those before.
        width: in place of both, for a Transformer baseline: channels afterwards over channels before (Net2Net), a whole
            number.
        lora: or, for it too, the rank of an update (LoRA) beside each linear projection.
    """

    at_step: int | None = None
    at_phase: str | None = None
    at_tokens: float | None = None
    on_plateau: Plateau | None = None
    qkv: int | None = None
    proj: int | None = None
    ffn: int | None = None
    factor: float | None = None
    width: int | None = None
    lora: int | None = None

    def __post_init__(self) -> None:
        moments = (self.at_step, self.at_phase, self.at_tokens, self.on_plateau)
        if sum(moment is not None for moment in moments) != 1:
            raise ValueError(f"stage {self}: give one of at_step, at_phase, at_tokens, on_plateau")
        counted = any(count is not None for count in self.counts.values())
        if sum([counted, self.factor is not None, self.width is not None, self.lora is not None]) != 1:
            raise ValueError(f"stage {self}: give a factor, or some of qkv, proj, ffn (for a baseline: width or lora)")
        if self.factor is not None and not 1 < self.factor < math.inf:
            raise ValueError(f"stage {self}: factor must be above 1, growth only adds")
        if self.at_step is not None and self.at_step < 0:
            raise ValueError(f"stage {self}: at_step must be at least 0")
        if self.at_tokens is not None and not self.at_tokens > 0:
            raise ValueError(f"stage {self}: at_tokens must be above 0; model.config has the size to begin with")

    @property
    def counts(self) -> dict[str, int | None]:
        """Tokens afterwards by kind of layer."""
        return {"qkv": self.qkv, "proj": self.proj, "ffn": self.ffn}

    @property
    def adds_tokens(self) -> bool:
        """Whether it is one of a TokenFormer."""
        return self.width is None and self.lora is None

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Stage":
        """From what a checkpoint or a script has."""
        known = [field.name for field in fields(cls)]
        if unknown := given.keys() - set(known):
            raise ValueError(f"stage {given}: {unknown.pop()!r} is not one of {', '.join(known)}")
        plateau = given.get("on_plateau")
        return cls(**given | {"on_plateau": Plateau(**plateau) if isinstance(plateau, dict) else plateau})

    def __str__(self) -> str:
        return "{" + ", ".join(f"{name}: {value}" for name, value in asdict(self).items() if value is not None) + "}"


def with_steps(stages: Sequence[Stage], data: Any) -> list[Stage]:
    """The stages, those of a phase with its first step, which the datamodule says.

    Raises:
        ValueError: for a phase that it does not have.
    """
    starts: dict[str, int] = getattr(data, "phase_starts", {})
    for stage in stages:
        if stage.at_phase is not None and stage.at_phase not in starts:
            known = f"choose one of {', '.join(starts)}" if starts else "the data have no phases"
            raise ValueError(f"stage {stage}: at_phase: {known}")
    return [replace(s, at_phase=None, at_step=starts[s.at_phase]) if s.at_phase else s for s in stages]


def phase_at(trainer: Any) -> dict[str, str]:
    """The phase in which a training is, for the record of a growth; empty where its data have none."""
    starts = getattr(getattr(trainer, "datamodule", None), "phase_starts", {})
    begun = [name for name, start in starts.items() if start <= trainer.global_step]
    return {"phase": begun[-1]} if begun else {}


def check_first(stage: Stage, init_from: str | None) -> None:
    """A growth at step 0 has something to keep.

    Raises:
        ValueError: when the model begins at random.
    """
    if stage.at_step == 0 and init_from is None:
        raise ValueError(
            f"stage 1 {stage}: grows a model that has learned nothing yet: give model.init_from, or let model.config "
            "have the size to begin with"
        )


def check_order(stages: Sequence[Stage], steps: Sequence[int | None], max_steps: int) -> None:
    """The stages are in order and come before the end; `steps` has None where a step is not known yet.

    Raises:
        ValueError: naming the first that is not.
    """
    last = -1
    for i, (stage, step) in enumerate(zip(stages, steps, strict=True)):
        if step is None:
            continue
        if step >= max_steps >= 0:
            raise ValueError(f"stage {i + 1} {stage} comes at step {step}, the run has {max_steps} steps")
        if step <= last:
            raise ValueError(f"stage {i + 1} {stage} comes at step {step}, not after {stages[i - 1]}")
        last = step


def check_room(
    steps: Sequence[int | None], max_steps: int, rate: LearningRate, restarts: bool, anneal_steps: int
) -> None:
    """Each stage has room for its warm-up, if the schedule restarts, and for the steps in which tau anneals.

    It begins anew with each phase of the data, too.

    Raises:
        ValueError: naming the first that has not.
    """
    known = [step for step in steps if step is not None]
    starts = known if 0 in known else [0, *known]
    for start, end in zip(starts, (*starts[1:], max_steps), strict=True):
        if end < 0:
            break
        if restarts:
            stop = min([end, *(phase for phase in rate.restarts if phase > start)])
            check_schedule(rate.config, stop - start, f"steps {start} to {stop}, a stage of schedule: restart")
        if start in known and anneal_steps > end - start:
            raise ValueError(f"anneal_steps={anneal_steps} don't fit into steps {start} to {end} of a stage")


def check_past(
    stages: Sequence[Stage], saved: list[dict[str, Any]], growths: list[dict[str, Any]], step: int, tokens: int
) -> None:
    """The past of a resumed run is the one that its stages ask for.

    Args:
        stages: of the run.
        saved: those that the checkpoint's run had.
        growths: its history.
        step: where it is resumed.
        tokens: training tokens until then.

    Raises:
        ValueError: if not, with both.
    """
    # From dictionaries, since those of older versions lack what came later.
    past = [Stage.from_dict(record["asked"]) for record in growths if record["stage"] is not None]
    before = [Stage.from_dict(stage) for stage in saved]
    agrees = list(stages[: len(past)]) == past
    for i, stage in enumerate(stages[len(past) :], len(past)):
        if [stage] != before[i : i + 1]:  # new: must not have been due before
            agrees &= stage.at_step is None or stage.at_step >= step
            agrees &= stage.at_tokens is None or stage.at_tokens >= tokens
    if not agrees:
        raise ValueError(
            f"the stages contradict the past of this run, at step {step} with {len(past)} of them done.\n"
            f"  of the checkpoint: {'; '.join(map(str, before or past)) or 'none'}\n"
            f"  of this config:    {'; '.join(map(str, stages))}\n"
            "Stages that are done must stay as they were; new ones must lie ahead."
        )
