"""Which initialisation, and what should tau do? Small models on real bytes, each at its own best learning rate.

    python -m benchmarks.initialisation [--steps 200] [--seeds 3]

Every variant trains at every rate of the grid with seed 0, then at its best rate with the other seeds. All see the same
batches of a seed: 16 sequences of 128 bytes of the standard library a step. Validation: 82 k held-out bytes.
"""

import argparse
import math
import statistics
from itertools import islice

import torch

from benchmarks.harness import write_csv
from datamodules.text import TextDataModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.groups import make_optimizer, param_groups
from lit_modules.optim.schedule import lr_scheduler
from tokenformer import LMConfig, TokenFormerLM

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
VARIANTS = {
    "official, tau fixed": {"init": "official", "scale": "fixed"},
    "official, tau learned": {"init": "official", "scale": "learned"},
    "scaled, tau fixed": {"init": "scaled", "scale": "fixed"},
    "scaled, tau learned": {"init": "scaled", "scale": "learned"},
    "Transformer baseline": {"baseline": "parameters"},
}
SIZE = {"depth": 4, "dim": 128, "num_heads": 4, "qkv_tokens": 128, "proj_tokens": 128, "ffn_tokens": 512}


def validation_bits(variant: str, rate: float, seed: int, steps: int) -> float:
    """Train one model; bits per token (a byte or an end of text) on held-out text."""
    data = TextDataModule(seq_len=128, batch_size=16, seed=seed)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(seed)
    model = TokenFormerLM(LMConfig(vocab_size=data.vocab_size, max_seq_len=128, **SIZE, **VARIANTS[variant]))
    config = OptimConfig(lr=rate, warmup_steps=steps // 10)
    optimizer = make_optimizer(param_groups(model, config.weight_decay), config)
    scheduler = lr_scheduler(optimizer, config, steps)
    for batch in islice(data.train_dataloader(), steps):
        model.loss(*batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    batches = islice(data.val_dataloader(), 40)
    nats = torch.stack([model.nats_and_entropy(*batch)[0].mean() for batch in batches])
    return float(nats.mean()) / math.log(2)


def main() -> None:
    """Run the grid and write benchmarks/results/initialisation.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for variant in VARIANTS:
        bits = {}
        for rate in RATES:
            bits[rate] = validation_bits(variant, rate, 0, args.steps)
            rows.append({"variant": variant, "lr": rate, "seed": 0, "bits": f"{bits[rate]:.3f}"})
        best = min(bits, key=lambda rate: bits[rate])
        at_best = [bits[best]]
        for seed in range(1, args.seeds):
            at_best.append(validation_bits(variant, best, seed, args.steps))
            rows.append({"variant": variant, "lr": best, "seed": seed, "bits": f"{at_best[-1]:.3f}"})
        grid = "  ".join(f"{rate:g}: {value:.3f}" for rate, value in bits.items())
        seeds = ", ".join(f"{value:.3f}" for value in at_best)
        print(f"{variant:<22} {grid}  best at {best:g}: mean {statistics.mean(at_best):.3f} ({seeds})", flush=True)
    print(f"rows in {write_csv('initialisation', rows)}")


if __name__ == "__main__":
    main()
