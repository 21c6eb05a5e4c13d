"""Training tokens/s of the quickstart model, at its last size, against its Transformer twin; both through the CLI.

    python -m benchmarks.training [--steps 60] [--rounds 5]

The two take turns; a run's figure is the median of its log, without the first entry. Validation is off.
"""

import argparse
import csv
import statistics
import tempfile
from pathlib import Path

from benchmarks.harness import write_csv
from lit_modules.cli import main as tokenformer

CONFIGS = {"tokenformer": "quickstart", "transformer": "quickstart-transformer"}


def tokens_per_second(config: str, steps: int, folder: str) -> float:
    """Median speed of a short run."""
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    length = [f"--trainer.max_steps={steps}", "--model.optim.warmup_steps=5", "--trainer.limit_val_batches=0"]
    quiet = [
        "--trainer.callbacks=null",
        "--trainer.enable_progress_bar=false",
        f"--checkpoint.every_n_train_steps={steps}",
    ]
    size = [f"--model.config.{name}" for name in ("qkv_tokens=128", "proj_tokens=128", "ffn_tokens=512")]
    path = f"configs/language/{config}.yaml"
    tokenformer(["fit", "--config", path, "--run_dir", str(run_dir / "run"), *size, *length, *quiet])
    with (run_dir / "run" / "metrics.csv").open(newline="") as file:
        speeds = [float(row["train/tokens_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(speeds[1:])


def main() -> None:
    """Run the comparison and write benchmarks/results/training.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in CONFIGS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, config in CONFIGS.items():
                speeds[name].append(tokens_per_second(config, args.steps, folder))
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    rows: list[dict[str, object]] = [
        {"round": i, **{name: f"{values[i]:.0f}" for name, values in speeds.items()}, "ratio": f"{ratios[i]:.3f}"}
        for i in range(args.rounds)
    ]
    for name, values in speeds.items():
        print(f"{name:<12} {statistics.median(values):,.0f} tokens/s")
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    print(f"rows in {write_csv('training', rows)}")


if __name__ == "__main__":
    main()
