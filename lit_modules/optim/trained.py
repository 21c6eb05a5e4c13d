"""Which parameters are trained, `model.train`: all, those of the classifier, or those whose names match patterns."""

from collections.abc import Collection
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Train = str | list[str]


def as_patterns(train: Train) -> list[str]:
    """One or several, as a list."""
    return [train] if isinstance(train, str) else train


def trained_names(model: nn.Module, train: Train, what: str = "model.train") -> set[str]:
    """Names of the parameters that are trained.

    Args:
        model: whose parameters.
        train: all, head (the classifier) or a pattern of names, such as `backbone.blocks.11.*`; or several of these.
        what: the setting, for errors.

    Raises:
        ValueError: for a head that the model doesn't have, and for a pattern that matches nothing.
    """
    names, found = {p: name for name, p in model.named_parameters()}, set()
    for pattern in as_patterns(train):
        matched = {name for name in names.values() if pattern == "all" or fnmatchcase(name, pattern)}
        if pattern == "head":
            matched = {names[p] for p in _classifier(model, what).parameters()}
        if not matched and ".segments." not in pattern and ".lora." not in pattern:  # which growth may bring
            near = get_close_matches(pattern, names.values(), n=3, cutoff=0)
            raise ValueError(
                f"{what}={pattern!r}: no parameter has such a name; choose all, head or patterns of names such as "
                f"{', '.join(near)}"
            )
        found |= matched
    return found


def trained_after_growth(model: nn.Module, train: Train, new: Collection[str]) -> set[str]:
    """Names of the parameters that a growth leaves trained: all, or those that it has added and what is named beside.

    Args:
        model: after it.
        train: all, new, or a list of new with head and patterns of names.
        new: names of what it has added.

    Raises:
        ValueError: see :func:`trained_names`.
    """
    if train == "all":
        return set(dict(model.named_parameters()))
    others = [pattern for pattern in as_patterns(train) if pattern != "new"]
    return set(new) | trained_names(model, others, "train")


def check_grown(model: nn.Module, before: set[str], train: Train) -> set[str]:
    """Names of the parameters of a model that has grown, of which some new ones are trained.

    Raises:
        ValueError: when all of them are frozen.
    """
    names = set(dict(model.named_parameters()))
    if names != before and not trained_names(model, train) & (names - before):
        raise ValueError(f"model.train={train} freezes what growth adds: add '*.segments.[1-9]*', or '*.lora.*'")
    return names


def _classifier(model: Any, what: str) -> nn.ModuleList:
    if not hasattr(model, "get_classifier"):
        raise ValueError(f"{what}=head: only image models have a classifier; give patterns of parameter names")
    found = model.get_classifier()
    return nn.ModuleList(found if isinstance(found, (tuple, list)) else [found])  # a distilled DeiT has two


def freeze_modes(model: nn.Module, train: Train) -> None:
    """Put into eval mode, without dropout and drop path, what is not trained as a whole; the rest is in training mode.

    A module without parameters does as the one that it lies in.
    """
    trained = trained_names(model, train)
    for prefix, part in model.named_modules():  # from outside to inside
        if names := [name for name, _ in part.named_parameters(prefix)]:
            part.train(trained.issuperset(names))
