"""What a resumed run must have in common with the one that wrote its checkpoint. Rates and batches may change."""

from dataclasses import asdict
from typing import Any

from lightning import Callback
from lightning.pytorch.callbacks import WeightAveraging


def check_resume(checkpoint: dict[str, Any], module: Any) -> None:
    """Compare a checkpoint with the run that loads it; outside of training only the kind of model has to agree.

    Raises:
        ValueError: for another kind of model; in training for another `model.config`, and for an average (EMA) that
            the run does not keep.
    """
    saved, now = checkpoint.get("hyper_parameters", {}).get("config", {}), asdict(module.config)
    kinds = ["vision" if "patch_size" in config else "language" for config in (saved, now)]
    if saved and kinds[0] != kinds[1]:
        raise ValueError(f"the checkpoint has a {kinds[0]} model, this run trains a {kinds[1]} model")
    if module._trainer is None:
        return
    if not module.trainer.training:
        _forget_idle_callbacks(checkpoint, module.trainer)
        return
    changed = [name for name in now if saved.get(name, now[name]) != now[name]]
    if changed:
        shown = "; ".join(f"{name}: {saved[name]} then, {now[name]} now" for name in changed)
        raise ValueError(
            f"the checkpoint was trained with another model.config ({shown}): a resumed run has the same. To change it "
            "start a new run from the weights: `tokenformer export`, then model.init_from"
        )
    used = checkpoint.get("hyper_parameters", {}).get("optim", {}).get("name", "adamw")  # of a run before Muon: AdamW
    if used != module.optim.name:
        raise ValueError(
            f"the checkpoint was trained with optim.name={used}, this run has optim.name={module.optim.name}: set "
            f"--model.optim.name={used}, or start a new run from the weights (`tokenformer export`, model.init_from)"
        )
    averages = any(isinstance(callback, WeightAveraging) for callback in module.trainer.callbacks)
    if "current_model_state" in checkpoint and not averages:  # the optimizer's state is of no use to their average
        raise ValueError("the checkpoint was trained with EMA, this run is not: add --trainer.callbacks+=EMA")


def _forget_idle_callbacks(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Outside of training nothing is lost without callbacks of ours and of Lightning, which would warn of each.

    What they do is done in training, and what came of it is in the weights. What the state of another one is for is
    not known here.
    """
    kinds: list[type] = [Callback]
    for kind in kinds:
        kinds += kind.__subclasses__()
    known = {kind.__qualname__ for kind in kinds if kind.__module__.startswith(("lit_modules.", "lightning."))}
    missing = checkpoint.get("callbacks", {}).keys() - {callback.state_key for callback in trainer.callbacks}
    for key in missing:
        if key.partition("{")[0] in known:  # behind it are the callback's settings
            del checkpoint["callbacks"][key]
