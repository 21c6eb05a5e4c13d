"""How a growth is done: how new tokens start, what is trained; rehearsed without contents, and done to modules."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from lit_modules.growth.history import count_by_kind
from lit_modules.growth.stages import Stage
from lit_modules.optim.trained import Train, as_patterns, trained_after_growth
from tokenformer.baseline import add_lora
from tokenformer.growth import (
    Init,
    ScaleAfter,
    grow_layers,
    pattention_layers,
    plan_growth,
    why_not_exact,
)
from tokenformer.net2net import widen


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How growth is done; the fields are those of :class:`lit_modules.callbacks.GrowParameterTokens`."""

    init: Init = "anchored"
    scale: ScaleAfter = "fixed"
    layers: str | list[str] = "all"
    seed: int = 0
    train: Train = "all"

    def __post_init__(self) -> None:
        for name, choices in (("init", Init), ("scale", ScaleAfter)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {', '.join(get_args(choices))}")
        if self.train != "all" and "new" not in as_patterns(self.train):
            raise ValueError(f"train={self.train!r}: choose all, new, or new and what else is trained: [new, head]")
        if self.train != "all" and self.init == "split":
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
                old = dict(model.named_parameters())
                layer = next(iter(pattention_layers(model).values()), None)
                if layer is not None and layer.tau_gain is not None and recipe.scale == "anneal":
                    raise ValueError("scale: anneal moves a tau that model.config.scale: learned trains: choose one")
                if layer is not None and verify:
                    scale = "current" if layer.scale == "current" else recipe.scale
                    if reason := why_not_exact(recipe.init, scale, layer.score_norm):
                        raise ValueError(f"{reason}; it can't be verified: set verify: false, or choose an exact kind")
                if stage.lora is not None:
                    if recipe.layers != "all":
                        raise ValueError(f"layers={recipe.layers}: LoRA goes beside all projections: leave it out")
                    add_lora(model, stage.lora)
                else:
                    planned = _planned(model, stage, recipe)
                    grow_layers(model, planned, init=recipe.init, scale=recipe.scale, seed=recipe.seed)
                parameters = dict(model.named_parameters())
                trained = trained_after_growth(model, recipe.train, parameters.keys() - old.keys())
                for name, parameter in parameters.items():
                    parameter.requires_grad_(name in trained)
        except ValueError as error:
            raise ValueError(f"stage {i + 1} {stage}: {error}") from error
        yield model


def _planned(model: Any, stage: Stage, recipe: Recipe) -> dict[str, int]:
    """New tokens of each layer."""
    planned = plan_growth(model, stage.counts, recipe.layers, stage.factor)
    if not planned:
        raise ValueError(f"adds no tokens to the layers chosen (layers: {recipe.layers})")
    return planned


def grow_modules(
    modules: Sequence[Any], stage: Stage, recipe: Recipe, key_stds: dict[str, float] | None = None
) -> dict[str, Any]:
    """Grow a TokenFormerModule, and averages of it alike; say what happened, for the history and `growth.csv`.

    `key_stds` are those of :func:`tokenformer.matched_keys.matched_key_stds`, for ``init: anchored``.
    """
    model = modules[0].model
    params_before, old = model.num_params(), dict(model.named_parameters())
    before = {name: layer.num_tokens for name, layer in pattention_layers(model).items()}
    planned = _planned(model, stage, recipe) if stage.adds_tokens else {}
    for module in modules:
        if stage.width is not None:
            module.set_model(widen(module.model, stage.width, recipe.seed))
        elif stage.lora is not None:
            add_lora(module.model, stage.lora, recipe.seed)
        else:
            grow_layers(
                module.model, planned, init=recipe.init, scale=recipe.scale, seed=recipe.seed, key_stds=key_stds
            )
    after = before | {name: before[name] + added for name, added in planned.items()}
    return {
        "init": recipe.init if stage.adds_tokens else "",
        "scale": recipe.scale if stage.adds_tokens else "",
        "train": recipe.train,
        "width": stage.width or 1,
        "lora": stage.lora or 0,
        **{f"{kind}_before": count for kind, count in count_by_kind(before).items()},
        **{f"{kind}_after": count for kind, count in count_by_kind(after).items()},
        "params_before": params_before,
        "params_after": modules[0].model.num_params(),
        "key_stds": {name: std for name, std in (key_stds or {}).items() if name in planned},
        "asked": asdict(stage),
        "new": [name for name, _ in modules[0].model.named_parameters() if name not in old],
    }
