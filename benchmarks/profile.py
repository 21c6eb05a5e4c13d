"""What a training step spends its time on: torch's profiler on a few steps of a config.

    python -m benchmarks.profile --config configs/language/quickstart.yaml [--KEY VALUE ...]

Takes the arguments of `tokenformer fit`. Prints the operators with the most time of their own, and writes a trace for
https://ui.perfetto.dev. The first steps warm up and are left out.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from lit_modules.cli import main as tokenformer

WARM_UP, STEPS = 3, 3
TRACE = Path("runs/trace.json")


class Profile(Callback):
    """Profiles STEPS steps after WARM_UP."""

    def on_train_start(self, *_: Any) -> None:
        """Lightning's hook."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        plan = schedule(wait=WARM_UP - 1, warmup=1, active=STEPS, repeat=1)
        self.profile = profile(activities=activities, schedule=plan)
        self.profile.start()

    def on_train_batch_end(self, *_: Any) -> None:
        """Lightning's hook."""
        self.profile.step()

    def on_train_end(self, *_: Any) -> None:
        """Lightning's hook."""
        self.profile.stop()
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(self.profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))
        TRACE.parent.mkdir(exist_ok=True)
        self.profile.export_chrome_trace(str(TRACE))
        print(f"{STEPS} steps; trace: {TRACE}")


def main() -> None:
    """Run a short fit."""
    if "--config" not in sys.argv:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        short = {
            "trainer.max_steps": WARM_UP + STEPS,
            "model.optim.warmup_steps": 1,
            "trainer.limit_val_batches": 0,
            "trainer.callbacks": "{class_path: benchmarks.profile.Profile}",
            "run_dir": f"{folder}/run",
        }
        tokenformer(["fit", *sys.argv[1:], *(f"--{key}={value}" for key, value in short.items())])


if __name__ == "__main__":
    main()
