"""What a resumed run must have in common with the one that wrote its checkpoint. Rates and batches may change."""

from dataclasses import asdict
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging


def check_resumed(checkpoint: dict[str, Any], module: Any) -> None:
    """Compare a checkpoint with the run that is about to go on with it; does nothing outside of training.

    Raises:
        ValueError: when `model.config` is another one, or the checkpoint has an average (EMA) and the run has none.
    """
    if module._trainer is None or not module.trainer.training:
        return
    saved, now = checkpoint.get("hyper_parameters", {}).get("config", {}), asdict(module.config)
    changed = [name for name in now if saved.get(name, now[name]) != now[name]]
    if changed:
        shown = "; ".join(f"{name}: {saved[name]} then, {now[name]} now" for name in changed)
        raise ValueError(
            f"the checkpoint was trained with another model.config ({shown}): a resumed run has the same. To change it "
            "start a new run from the weights: `tokenformer export`, then model.init_from"
        )
    averages = any(isinstance(callback, WeightAveraging) for callback in module.trainer.callbacks)
    if "current_model_state" in checkpoint and not averages:  # the optimizer's state is of no use to their average
        raise ValueError("the checkpoint was trained with EMA, this run is not: add --trainer.callbacks+=EMA")
