"""What a growth is: when it comes, how far it goes, how new tokens start; done to modules, and remembered by them."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lit_modules.module import TokenFormerModule
from tokenformer.growth import (
    COUNT_OF,
    Init,
    ScaleAfter,
    grow_layers,
    pattention_layers,
    plan_growth,
    why_not_exact,
    widen,
)


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
        at_step: before this optimizer step (0 is the first).
        at_tokens: at the first step that begins with so many training tokens behind it.
        on_plateau: after a validation, when a metric has stopped getting better.
        qkv: parameter tokens of each query, key and value projection afterwards.
        proj: of the output projections.
        ffn: of the feed-forward layers.
        factor: in place of counts: parameter tokens afterwards over those before.
        width: in place of both, for a Transformer baseline: channels afterwards over channels before (Net2Net), a whole
            number.
    """

    at_step: int | None = None
    at_tokens: float | None = None
    on_plateau: Plateau | None = None
    qkv: int | None = None
    proj: int | None = None
    ffn: int | None = None
    factor: float | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        moments = (self.at_step, self.at_tokens, self.on_plateau)
        if sum(moment is not None for moment in moments) != 1:
            raise ValueError(f"stage {self}: give one of at_step, at_tokens, on_plateau")
        counted = any(count is not None for count in self.counts.values())
        if sum([counted, self.factor is not None, self.width is not None]) != 1:
            raise ValueError(f"stage {self}: give a factor, or some of qkv, proj, ffn (for a baseline: width)")
        if self.factor is not None and not 1 < self.factor < math.inf:
            raise ValueError(f"stage {self}: factor must be above 1, growth only adds")
        if self.at_step is not None and self.at_step < 1:
            raise ValueError(f"stage {self}: at_step must be at least 1; model.config has the size to begin with")
        if self.at_tokens is not None and not self.at_tokens > 0:
            raise ValueError(f"stage {self}: at_tokens must be above 0; model.config has the size to begin with")

    @property
    def counts(self) -> dict[str, int | None]:
        """Tokens afterwards by kind of layer."""
        return {"qkv": self.qkv, "proj": self.proj, "ffn": self.ffn}

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Stage":
        """From what a checkpoint or a script has."""
        known = [field.name for field in fields(cls)]
        if unknown := given.keys() - set(known):
            raise ValueError(f"stage {given}: {unknown.pop()!r} is not one of {', '.join(known)}")
        plateau = given.get("on_plateau")
        return cls(**given | {"on_plateau": Plateau(**plateau) if isinstance(plateau, dict) else plateau})

    def __str__(self) -> str:
        return "{" + ", ".join(f"{name}: {value}" for name, value in asdict(self).items() if value is not None) + "}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How growth is done; the fields are those of :class:`lit_modules.callbacks.GrowParameterTokens`."""

    init: Init = "zero_keys"
    scale: ScaleAfter = "fixed"
    layers: str | list[str] = "all"
    seed: int = 0
    train: Literal["all", "new"] = "all"

    def __post_init__(self) -> None:
        for name, choices in (("init", Init), ("scale", ScaleAfter), ("train", Literal["all", "new"])):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {', '.join(get_args(choices))}")
        if self.train == "new" and self.init == "split":
            raise ValueError("train: new keeps the old tokens as they are, init: split divides their values")


def rehearse(model: Any, stages: Sequence[Stage], recipe: Recipe, verify: bool = False) -> Iterator[Any]:
    """Do all stages to a model without contents (on `meta`): the model after each, with what is frozen then.

    Raises:
        ValueError: for a stage that can't be done, or, with `verify`, one that is not exact.
    """
    for i, stage in enumerate(stages):
        try:
            if stage.width is not None:
                model = widen(model, stage.width)
            else:
                found = pattention_layers(model)
                layer = next(iter(found.values()), None)
                if layer is not None and layer.tau_gain is not None and recipe.scale == "anneal":
                    raise ValueError("scale: anneal moves a tau that model.config.scale: learned trains: choose one")
                if layer is not None and verify:
                    scale = "current" if layer.scale == "current" else recipe.scale
                    if reason := why_not_exact(recipe.init, scale, layer.score_norm):
                        raise ValueError(f"{reason}; it can't be verified: set verify: false, or choose an exact kind")
                old = dict(model.named_parameters())
                planned = _planned(model, stage, recipe)
                grow_layers(model, planned, init=recipe.init, scale=recipe.scale, seed=recipe.seed)
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(recipe.train == "all" or name not in old)
        except ValueError as error:
            raise ValueError(f"stage {i + 1} {stage}: {error}") from error
        yield model


def _planned(model: Any, stage: Stage, recipe: Recipe) -> dict[str, int]:
    """New tokens of each layer."""
    planned = plan_growth(model, stage.counts, recipe.layers, stage.factor)
    if not planned:
        raise ValueError(f"adds no tokens to the layers chosen (layers: {recipe.layers})")
    return planned


def grow_modules(modules: Sequence[TokenFormerModule], stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """Grow a module, and averages of it in the same way; say what happened, for the history and `growth.csv`."""
    model = modules[0].model
    params_before, old = model.num_params(), dict(model.named_parameters())
    before = {name: layer.num_tokens for name, layer in pattention_layers(model).items()}
    planned: dict[str, int] = {}
    if stage.width is None:
        planned = _planned(model, stage, recipe)
    for module in modules:
        if stage.width is None:
            grow_layers(module.model, planned, init=recipe.init, scale=recipe.scale, seed=recipe.seed)
        else:
            module.install(widen(module.model, stage.width, recipe.seed))
    after = before | {name: before[name] + added for name, added in planned.items()}
    return {
        "init": recipe.init,
        "scale": recipe.scale,
        "train": recipe.train,
        "width": stage.width or 1,
        **{f"{kind}_before": count for kind, count in count_by_kind(before).items()},
        **{f"{kind}_after": count for kind, count in count_by_kind(after).items()},
        "params_before": params_before,
        "params_after": modules[0].model.num_params(),
        "asked": asdict(stage),
        "new": [name for name, _ in modules[0].model.named_parameters() if name not in old],
    }


def count_by_kind(counts: dict[str, int]) -> dict[str, str]:
    """Tokens of the layers of each kind; two numbers, the smallest and the largest, where they differ."""
    by_kind: dict[str, set[int]] = {kind: set() for kind in dict.fromkeys(COUNT_OF.values())}
    for name, count in counts.items():
        by_kind[COUNT_OF[name.rsplit(".", 1)[-1]]].add(count)
    extremes = {kind: sorted({min(found), max(found)}) if found else [] for kind, found in by_kind.items()}
    return {kind: "-".join(map(str, ends)) for kind, ends in extremes.items()}


def write_growths(path: Path, growths: list[dict[str, Any]]) -> None:
    """A row of each growth of a model, as CSV; no file without any."""
    if not growths:
        path.unlink(missing_ok=True)  # of growths that a run had after the checkpoint from which it goes on
        return
    columns = [name for name in growths[0] if name not in ("asked", "new", "anneal_until")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(growths)


def describe(record: dict[str, Any]) -> str:
    """Sizes before and after, for a reader."""
    kinds = (kind for kind in ("qkv", "proj", "ffn") if record[f"{kind}_before"] != record[f"{kind}_after"])
    counts = ", ".join(f"{kind} {record[f'{kind}_before']} -> {record[f'{kind}_after']}" for kind in kinds)
    sizes = counts or f"width x {record['width']}"
    return f"{record['params_before']:,} -> {record['params_after']:,} parameters ({sizes})"
