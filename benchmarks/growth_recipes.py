"""What should new tokens start from, and what should tau do after growth? Small models on real bytes.

    python -m benchmarks.growth_recipes [--size small|medium] [--seeds 3]

A base model is trained, grown, and trained on with the schedule restarted. Every recipe runs at every stage rate of the
grid with seed 0, then at its best rate with the other seeds; all see the same batches of a seed. "Not grown" trains the
base on for as many steps. Validation: 46 k held-out bytes of the standard library, in nats a byte.

Rows that benchmarks/results/growth_recipes_SIZE.csv has are not measured again: an interrupted study goes on.
"""

import argparse
import copy
import csv
import statistics
from functools import cache
from itertools import islice

import torch
from torch import nn

from benchmarks.harness import RESULTS, write_csv
from datamodules.text import TextDataModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.groups import make_optimizer, param_groups
from lit_modules.optim.schedule import lr_scheduler
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.growth import anneal_taus, grow_layers, plan_growth
from tokenformer.matched_keys import matched_key_stds, measuring_scores

BASE_RATE = 4e-3
SEQ_LEN, BATCH_SIZE = 96, 12
# sizes of the base, factor of growth, steps of the base and of the stage after growth, rates of the stage
SIZES = {
    "small": (
        {"depth": 3, "dim": 96, "num_heads": 4, "qkv_tokens": 72, "proj_tokens": 72, "ffn_tokens": 288},
        4,
        400,
        (2e-3, 4e-3, 8e-3),
    ),
    "medium": (
        {"depth": 4, "dim": 128, "num_heads": 4, "qkv_tokens": 128, "proj_tokens": 128, "ffn_tokens": 512},
        2,
        300,
        (2e-3, 4e-3),
    ),
}
# tau of the base, how new tokens start, what tau does after growth
RECIPES = {
    "not grown, tau fixed": ("fixed", None, "fixed"),
    "zero_keys, tau fixed": ("fixed", "zero_keys", "fixed"),
    "zero_keys, tau annealed": ("fixed", "zero_keys", "anneal"),
    "zero_keys, tau current": ("fixed", "zero_keys", "current"),
    "zero_keys, tau learned from growth on": ("fixed", "zero_keys", "learned"),
    "random, tau current (paper)": ("fixed", "random", "current"),
    "not grown, tau learned": ("learned", None, "fixed"),
    "zero_keys, tau learned": ("learned", "zero_keys", "fixed"),
    "random, tau learned": ("learned", "random", "fixed"),
    "segment_norm, tau learned": ("learned", "segment_norm", "fixed"),
    "pairs, tau learned": ("learned", "pairs", "fixed"),
    "split, tau learned": ("learned", "split", "fixed"),
    "anchored, tau learned": ("learned", "anchored", "fixed"),
}


def train(model: nn.Module, rate: float, seed: int, steps: int, skip: int, anneal_steps: int = 0) -> None:
    """Warm-up and cosine over `steps`, on the batches of a seed after the first `skip`."""
    data = _data(seed)
    config = OptimConfig(lr=rate, warmup_steps=steps // 10)
    optimizer = make_optimizer(param_groups(model, config.weight_decay), config)
    scheduler = lr_scheduler(optimizer, config, steps)
    for step, batch in enumerate(islice(data.train_dataloader(), skip, skip + steps)):
        if step < anneal_steps:
            anneal_taus(model, anneal_steps - step)
        model.loss(*batch).backward()  # type: ignore[operator]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def validation_loss(model: TokenFormerLM) -> float:
    """Nats a byte on held-out text."""
    with torch.no_grad():
        batches = islice(_data(0).val_dataloader(), 40)
        return float(torch.stack([model.nats_and_entropy(*batch)[0].mean() for batch in batches]).mean())


@cache
def _data(seed: int) -> TextDataModule:
    data = TextDataModule(seq_len=SEQ_LEN, batch_size=BATCH_SIZE, seed=seed)
    data.prepare_data()
    data.setup("fit")
    return data


@cache
def trained_base(size: str, scale: str, seed: int) -> TokenFormerLM:
    """The model before growth."""
    sizes, _, steps, _ = SIZES[size]
    torch.manual_seed(seed)
    config = LMConfig(vocab_size=257, max_seq_len=SEQ_LEN, init="scaled", scale=scale, **sizes)  # type: ignore[arg-type]
    model = TokenFormerLM(config)
    train(model, BASE_RATE, seed, steps, skip=0)
    return model


def run(size: str, recipe: str, rate: float, seed: int) -> dict[str, object]:
    """Train, grow, train; a row of losses."""
    base_scale, init, scale = RECIPES[recipe]
    _, factor, steps, _ = SIZES[size]
    model = copy.deepcopy(trained_base(size, base_scale, seed))
    before = validation_loss(model)
    if init is not None:
        with measuring_scores(model) as sums, torch.no_grad():
            model.loss(*next(iter(_data(seed).train_dataloader())))
        planned, stds = plan_growth(model, {}, factor=factor), matched_key_stds(model, sums)
        grow_layers(model, planned, init=init, scale=scale, seed=seed, key_stds=stds)  # type: ignore[arg-type]
    after = validation_loss(model)
    train(model, rate, seed, steps, skip=steps, anneal_steps=steps // 2 if scale == "anneal" else 0)
    losses = {"before": before, "after": after, "end": validation_loss(model)}
    row: dict[str, object] = {"size": size, "recipe": recipe, "lr": f"{rate:g}", "seed": str(seed)}
    return row | {"params": model.num_params()} | {name: f"{loss:.4f}" for name, loss in losses.items()}


class Study:
    """The rows measured so far, in memory and in a file."""

    def __init__(self, size: str) -> None:
        self.size, self.name = size, f"growth_recipes_{size}"
        path = RESULTS / f"{self.name}.csv"
        self.rows: list[dict[str, object]] = list(csv.DictReader(path.open(newline=""))) if path.exists() else []

    def end(self, recipe: str, rate: float, seed: int) -> float:
        """Loss at the end of a run, measured now or before."""
        wanted = (recipe, f"{rate:g}", str(seed))
        found = next((row for row in self.rows if (row["recipe"], row["lr"], row["seed"]) == wanted), None)
        if found is None:
            found = run(self.size, recipe, rate, seed)
            self.rows.append(found)
            write_csv(self.name, self.rows)
        return float(str(found["end"]))


def main() -> None:
    """Run the grid and write benchmarks/results/growth_recipes_SIZE.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    study = Study(args.size)
    for recipe in RECIPES:
        tried = {rate: study.end(recipe, rate, 0) for rate in SIZES[args.size][3]}
        best = min(tried, key=lambda rate: tried[rate])
        ends = [study.end(recipe, best, seed) for seed in range(args.seeds)]
        grid = "  ".join(f"{rate:g}: {end:.4f}" for rate, end in tried.items())
        seeds = ", ".join(f"{end:.4f}" for end in ends)
        print(f"{recipe:<38} {grid}  best at {best:g}: mean {statistics.mean(ends):.4f} ({seeds})", flush=True)


if __name__ == "__main__":
    main()
