"""Whether keeping no scores for the backward pass would save anything."""

from lit_modules.modules.base import TokenFormerModule


def check_recomputing(module: TokenFormerModule) -> None:
    """Refuse `recompute_scores` where it would do nothing.

    Raises:
        ValueError: with the reason.
    """
    if not module.recompute_scores:
        return
    if module.checkpoint_activations:
        raise ValueError(
            "model.recompute_scores=true, model.checkpoint_activations=true: the second keeps no scores; choose one"
        )
    if module.config.baseline is not None:
        raise ValueError(f"model.recompute_scores=true: config.baseline={module.config.baseline!r} has no scores")
    if module.config.score_norm != "l2_norm_gelu":
        raise ValueError(
            f"model.recompute_scores=true: needs config.score_norm=l2_norm_gelu, not {module.config.score_norm}"
        )
