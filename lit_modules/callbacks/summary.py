"""What a run ends with: the best validation, where things are, what to type next."""

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_modules.growth.history import write_growths
from lit_modules.modules.language import LanguageModule
from lit_modules.runs.length import ended_by, num_steps
from lit_modules.runs.logs import purge_from


class Summary(Callback):
    """Prints the size of the model before training and a short summary after it; keeps logs true on a resume.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self._start: int | None = None  # where the training began
        self.best: tuple[float, int] | None = None  # of the validations: accuracy or else loss, step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sizes = {
            trained: sum(p.numel() for p in pl_module.parameters() if p.requires_grad >= trained) for trained in (0, 1)
        }
        part = f" ({sizes[1]:,} of them trained)" if sizes[0] != sizes[1] else ""
        rank_zero_info(f"{sizes[0]:,} parameters{part}, run folder {self.run_dir}")
        self._start = trainer.global_step
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_growths(Path(self.run_dir) / "growth.csv", pl_module.growths)  # type: ignore[arg-type]
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    purge_from(logger, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        found = [name for name in ("val/top1", "val/loss") if name in metrics]
        if trainer.sanity_checking or not found:
            return
        value = float(metrics[found[0]])
        if self.best is None or (value > self.best[0] if found[0] == "val/top1" else value < self.best[0]):
            self.best = (value, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        step, steps = trainer.global_step, num_steps(trainer)
        lines = [f"\nfinished at step {step}" + (f" of {steps}" if steps >= 0 else "")]
        if step != steps:
            lines[0] += f", ended by {ended_by(trainer)}"
            decays = steps >= 0 and pl_module.optim.schedule != "constant"
            lines += [f"the learning rate was to decay until step {steps}: it is higher than planned"] * decays
        if self.best is not None:
            value, step = self.best
            classifies = "val/top1" in trainer.callback_metrics
            what = f"accuracy {value:.2%} (top-1)" if classifies else f"loss {value:.4f} nats a token"
            lines.append(f"best validation {what}, at step {step}")
        saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path]
        for callback in saved:
            lines.append(f"checkpoint ({callback.monitor}): {shorten(callback.best_model_path)}")
        if saved:
            config = f"{shorten(self.run_dir)}/config.yaml"
            best = shorten(saved[-1].best_model_path)
            asks = pl_module.predict_option  # where the data has that key
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            asks = f" {asks}" if hasattr(data, asks.split()[0].removeprefix("--data.")) else ""
            lines += ["next:", f"  tokenformer validate --config {config} --ckpt_path {best}"]
            if not hasattr(data, "phases"):
                lines.append(f"  tokenformer predict --config {config} --ckpt_path {best}{asks}")
            if isinstance(pl_module, LanguageModule):
                lines.append(f"  tokenformer generate {best} --prompt TEXT")
            if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
                lines.append(f"  tensorboard --logdir {shorten(Path(self.run_dir).parent)}")
        rank_zero_info("\n".join(lines))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start in (None, trainer.global_step):
            rank_zero_info(
                f"nothing was trained: the checkpoint is of step {trainer.global_step}, where the run ends by "
                f"{ended_by(trainer)}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def shorten(path: str | Path) -> str:
    """A path relative to the working directory where it lies inside, to be read and copied."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
