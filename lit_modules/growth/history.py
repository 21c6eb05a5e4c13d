"""What is remembered of a model's growths: in its checkpoints, and as `growth.csv`."""

from pathlib import Path
from typing import Any

from lit_modules.runs.logs import write_if_possible
from lit_modules.runs.tables import write_rows
from tokenformer.growth import COUNT_OF


def count_by_kind(counts: dict[str, int]) -> dict[str, str]:
    """Tokens of the layers of each kind; two numbers, the smallest and the largest, where they differ."""
    by_kind: dict[str, set[int]] = {kind: set() for kind in dict.fromkeys(COUNT_OF.values())}
    for name, count in counts.items():
        by_kind[COUNT_OF[name.rsplit(".", 1)[-1]]].add(count)
    extremes = {kind: sorted({min(found), max(found)}) if found else [] for kind, found in by_kind.items()}
    return {kind: "-".join(map(str, ends)) for kind, ends in extremes.items()}


def measured_costs(checkpoint: dict[str, Any], source: Path) -> dict[str, Any]:
    """Step, tokens and FLOPs of the training until a checkpoint, for the record of what is done to it.

    Raises:
        ValueError: where it does not say them.
    """
    if "Throughput" not in checkpoint.get("callbacks", {}):
        raise ValueError(f"{source} does not say what its training has cost, so `tokenformer fit` has not written it")
    costs = checkpoint["callbacks"]["Throughput"]
    return {"step": checkpoint["global_step"], "tokens": costs["tokens"], "flops": costs["flops"]}


def write_growths(path: Path, growths: list[dict[str, Any]]) -> None:
    """A row of each growth of a model, as CSV; no file without any."""
    if not growths:
        path.unlink(missing_ok=True)  # of growths after the checkpoint from which the run is resumed
        return
    names = dict.fromkeys(name for record in growths for name in record)  # those of older versions lack some
    columns = [name for name in names if name not in ("key_stds", "asked", "new", "anneal_until")]
    write_if_possible(path, lambda: write_rows(path, columns, growths))


def describe(record: dict[str, Any]) -> str:
    """Sizes before and after, for a reader."""
    kinds = (kind for kind in ("qkv", "proj", "ffn") if record[f"{kind}_before"] != record[f"{kind}_after"])
    counts = ", ".join(f"{kind} {record[f'{kind}_before']} -> {record[f'{kind}_after']}" for kind in kinds)
    sizes = counts or (f"LoRA of rank {record['lora']}" if record.get("lora") else f"width x {record['width']}")
    return f"{record['params_before']:,} -> {record['params_after']:,} parameters ({sizes})"
