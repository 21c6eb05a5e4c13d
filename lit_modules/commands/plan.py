"""What a run would cost, before it starts: each size that the model grows to, and the last one on many devices."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch

from lit_modules.callbacks import GrowParameterTokens
from lit_modules.commands import plan_devices
from lit_modules.growth.history import count_by_kind
from lit_modules.growth.recipe import rehearse
from lit_modules.growth.stages import Stage, with_steps
from lit_modules.modules.language import LanguageModule
from lit_modules.optim.trained import trained_names
from tokenformer.cost import Memory, Phase, cumulative_flops, marginal_flops, muon_flops, training_memory
from tokenformer.growth import pattention_layers
from tokenformer.hardware import DEVICES, find_device, peak_flops
from tokenformer.language import TokenFormerLM

MEMORY = {"weights": "weight", "gradients": "grad", "optimizer": "optim", "activations": "activ", "total": "total"}

# Name in the CSV, title in the table, and what the table's numbers are divided by.
COLUMNS: list[tuple[str, str, float]] = [
    ("stage", "stage", 1),
    ("from_step", "from step", 1),
    ("tokens_per_layer", "qkv/proj/ffn", 1),
    ("params", "params M", 1e6),
    ("flops_per_token", "GFLOP/tok", 1e9),
    ("training_tokens", "tokens B", 1e9),
    ("cumulative_flops", "cum. FLOP", 1),
    *((f"{how}_{part}_bytes", title, 2**30) for how in ("ddp", "fsdp") for part, title in MEMORY.items()),
    ("hours", "hours", 1),
]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A size of the model, and what it costs to train it.

    Attributes:
        stage: base, the number of the growth, or scratch: the last size from the start, on the tokens of all stages.
        from_step: the optimizer step at which it begins, or `plateau` where that shows only in the training.
        tokens_per_layer: parameter tokens, qkv/proj/ffn.
        phase: parameters, FLOPs and training tokens.
        ddp: memory per device, replicated.
        fsdp: memory per device, sharded.
    """

    stage: str
    from_step: int | str
    tokens_per_layer: str
    phase: Phase
    ddp: Memory
    fsdp: Memory


def plan(
    model: LanguageModule,
    datamodule: Any,
    trainer: Any,
    *,
    devices: int = 1,
    mfu: float = 0.4,
    device: str = "H100",
    network: float | None = None,
    out: str | None = None,
) -> str:
    """What a run would cost, as two tables of text: its sizes, and the last of them on 1 to 1,024 devices.

    Training FLOPs are counted as in the log (`train/flops`), memory as in :func:`tokenformer.cost.training_memory`,
    what devices send as in `tokenformer.communication`, its time as in :func:`tokenformer.hardware.seconds`.

    Args:
        model: the configured one; it is measured, not built.
        datamodule: `batch_size` and `seq_len` count.
        trainer: `max_steps`, `accumulate_grad_batches`, `precision` and the growth among `callbacks` count.
        devices: of all machines together. Each takes `batch_size` sequences: more devices train on more tokens.
        mfu: share of the device's peak that the training reaches.
        device: whose peak, memory and links: a name in `tokenformer.hardware.DEVICES`.
        network: GB/s that a device sends between nodes. Default: what such devices usually come with.
        out: a CSV file for the numbers of the first table, in bytes, FLOPs and hours. Those of the second go beside it:
            `plan-devices.csv` for `plan.csv`, in bytes and seconds.

    Raises:
        ValueError: for settings that can't be, and for stages that can't come or can't be grown.
    """
    hardware = find_device(device)
    if hardware is None:
        names = ", ".join(known.name for known in DEVICES)
        raise ValueError(f"device={device!r}: its peak is not known; choose one of {names}")
    if network is not None and not network > 0:
        raise ValueError(f"network={network}: must be above 0 GB/s; 50 are a port of 400 Gb/s for each device")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu}: must be above 0 and at most 1; 0.4 is 40 % of the peak")
    if devices < 1:
        raise ValueError(f"devices={devices}: must be at least 1")
    precision, peak = str(trainer.precision), peak_flops(device, str(trainer.precision))
    rows = plan_rows(model, datamodule, trainer, devices)
    flops_per_hour = None if peak is None else 3600 * peak * mfu * devices
    records = _records(rows, flops_per_hour)
    step = plan_devices.Step(
        sequences=devices * trainer.accumulate_grad_batches * datamodule.batch_size,
        batch_size=datamodule.batch_size,
        seq_len=datamodule.seq_len,
        precision=precision,
        flops_per_second=None if peak is None else peak * mfu,
        optimizer=model.optim.name,
    )
    *_, largest = _sizes(model, _growth(trainer))
    hardware = hardware if network is None else hardware._replace(network=network)
    points = plan_devices.scale_out(largest, step, hardware)
    if out is not None:
        _write(Path(out), records)
        _write(Path(out).with_stem(f"{Path(out).stem}-devices"), [asdict(point) for point in points])
    rate = "no peak known" if peak is None else f"{100 * mfu:g} % of {peak / 1e12:g} TFLOP/s"
    batches = f"{devices} x {trainer.accumulate_grad_batches} batches of {datamodule.batch_size} x {datamodule.seq_len}"
    head = f"{devices} x {device} ({rate}), {precision}; a step trains on {batches} tokens"
    tables = [head, "", *_table(records), "", *_comparison(rows, flops_per_hour)]
    if model.optim.name == "muon":
        own = 3 * rows[-1].phase.flops_per_token * step.sequences * step.seq_len / devices
        ddp, fsdp = (f"{muon_flops(largest, n) / own:.2%}" for n in (1, devices))
        more = f"a device's step at the last size has {ddp} more FLOPs in DDP, {fsdp} in FSDP2"
        tables.append(f"Muon: {_cell(muon_flops(largest))} FLOPs to orthogonalise; {more}")
    return "\n".join([*tables, "", *plan_devices.table(points, step, hardware)])


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def num_devices(devices: list[int] | str | int, num_nodes: int) -> int:
    """How many devices `trainer.devices` and `trainer.num_nodes` ask for; what is left to the machine counts as one."""
    if isinstance(devices, str):
        devices = 1 if devices == "auto" else devices.strip(",").count(",") + 1 if "," in devices else int(devices)
    return (len(devices) if isinstance(devices, list) else max(1, devices)) * num_nodes


def plan_rows(model: LanguageModule, datamodule: Any, trainer: Any, devices: int) -> list[Row]:
    """A row for the model as configured and for each growth; after a growth, one for the last size from scratch."""
    if not isinstance(model, LanguageModule):
        raise ValueError(f"plan knows language models, not {type(model).__name__}")
    if trainer.max_steps < 1:
        given = f"trainer.max_steps={trainer.max_steps}"
        raise ValueError(f"{given}: plan needs the number of steps; those of epochs depend on the data")
    growth = _growth(trainer)
    stages = with_steps(growth.stages, datamodule) if growth else []
    per_step = datamodule.batch_size * datamodule.seq_len * devices * trainer.accumulate_grad_batches
    bounds = [*_starts(stages, per_step, trainer.max_steps), trainer.max_steps]

    def row(net: TokenFormerLM, stage: str, from_step: int | None, num_tokens: int | None) -> Row:
        flops = net.flops_per_token(datamodule.seq_len)
        phase = Phase(num_params=net.num_params(), flops_per_token=flops, num_tokens=num_tokens)
        ddp, fsdp = (
            training_memory(
                net,
                datamodule.batch_size,
                datamodule.seq_len,
                str(trainer.precision),
                devices,
                sharded=sharded,
                optimizer=model.optim.name,
            )
            for sharded in (False, True)
        )
        start = "plateau" if from_step is None else from_step
        return Row(stage=stage, from_step=start, tokens_per_layer=_tokens(net), phase=phase, ddp=ddp, fsdp=fsdp)

    rows = []
    for i, (net, (start, end)) in enumerate(zip(_sizes(model, growth), pairwise(bounds), strict=True)):
        known = start is not None and end is not None and None not in bounds[:i]
        rows.append(row(net, str(i or "base"), start, (end - start) * per_step if known else None))
    if growth:
        for parameter in net.parameters():
            parameter.requires_grad_(True)
        for layer in pattention_layers(net).values():
            layer.match({"segments.0.keys": torch.Size((layer.num_tokens, layer.in_features))})
        rows.append(row(net, "scratch", 0, trainer.max_steps * per_step))
    return rows


def _growth(trainer: Any) -> GrowParameterTokens | None:
    return next((c for c in trainer.callbacks if isinstance(c, GrowParameterTokens)), None)


def _sizes(model: LanguageModule, growth: GrowParameterTokens | None) -> Iterator[TokenFormerLM]:
    """The model as configured and after each growth, without contents. Each is changed into the next."""
    with torch.device("meta"):
        net = model.build_model()
    for size in chain([net], rehearse(net, growth.stages, growth.recipe) if growth else ()):
        size.backbone.checkpoint_activations = model.checkpoint_activations
        size.backbone.recompute_scores(model.recompute_scores)
        trained = trained_names(size, model.trained)
        for name, parameter in size.named_parameters():
            if name not in trained:
                parameter.requires_grad_(False)
        yield size


def _starts(stages: Sequence[Stage], per_step: int, max_steps: int) -> list[int | None]:
    """The step at which each size begins, the first at 0; None where a plateau decides."""
    starts: list[int | None] = [0]
    for i, stage in enumerate(stages, 1):
        step = stage.at_step if stage.at_tokens is None else math.ceil(stage.at_tokens / per_step)
        last = max((start for start in starts[1:] if start is not None), default=-1)
        if step is not None and not last < step < max_steps:
            raise ValueError(
                f"stage {i} {stage} comes at step {step}: must be after step {max(last, 0)} and before "
                f"trainer.max_steps={max_steps}"
            )
        starts.append(step)
    return starts


def _tokens(net: TokenFormerLM) -> str:
    """Parameter tokens of each layer, qkv/proj/ffn; least and most where layers of a kind differ."""
    counts = count_by_kind({name: layer.num_tokens for name, layer in pattention_layers(net).items()})
    return "/".join(counts.values()) if any(counts.values()) else f"width {net.config.dim}"


def _records(rows: Sequence[Row], flops_per_hour: float | None) -> list[dict[str, Any]]:
    """The numbers of a table or CSV; None for what nobody knows."""
    stages = [row.phase for row in rows if row.stage != "scratch"]
    so_far = [*cumulative_flops(stages), rows[-1].phase.training_flops]
    records = []
    for row, cumulative in zip(rows, so_far, strict=False):
        flops = row.phase.training_flops
        record: dict[str, Any] = {
            "stage": row.stage,
            "from_step": row.from_step,
            "tokens_per_layer": row.tokens_per_layer,
            "params": row.phase.num_params,
            "flops_per_token": row.phase.flops_per_token,
            "training_tokens": row.phase.num_tokens,
            "cumulative_flops": cumulative,
        }
        for strategy, memory in (("ddp", row.ddp), ("fsdp", row.fsdp)):
            sizes = asdict(memory) | {"total": memory.total}
            record |= {f"{strategy}_{part}_bytes": size for part, size in sizes.items()}
        record["hours"] = None if flops is None or flops_per_hour is None else flops / flops_per_hour
        records.append(record)
    return records


def _table(records: Sequence[dict[str, Any]]) -> list[str]:
    columns = [[title, *(_cell(record[name], unit) for record in records)] for name, title, unit in COLUMNS]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    ]
    left = [name for name, *_ in COLUMNS].index("ddp_weights_bytes")
    above = [" " * (sum(widths[:left]) + 2 * left - 2)]
    for i, how in enumerate(("DDP", "FSDP2")):
        group = widths[left + i * len(MEMORY) :][: len(MEMORY)]
        above.append(f"{f' GiB per device, {how} ':-^{sum(group) + 2 * len(MEMORY) - 2}}")
    return ["  ".join(above), *lines]


def _cell(value: float | str | None, unit: float = 1) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int) and unit == 1 and value < 1e9:
        return f"{value:,}"
    return f"{value / unit:,.1f}" if 100 <= value / unit < 1e6 else f"{value / unit:.3g}"


def _comparison(rows: Sequence[Row], flops_per_hour: float | None) -> list[str]:
    """Both ways of counting, beside the last size from scratch."""
    *stages, scratch = (row.phase for row in rows)
    if len(stages) < 2:
        return []
    whole = scratch.training_flops
    assert whole is not None
    lines = [f"from scratch: the last size on the tokens of all stages together, {_cell(scratch.num_tokens, 1e9)} B"]
    for name, what, flops in (
        ("marginal", "the growths alone, the base model as given (how the paper counts)", marginal_flops(stages)),
        ("cumulative", "the base model's training included", cumulative_flops(stages)[-1]),
    ):
        hours = "" if flops is None or flops_per_hour is None else f", {_cell(flops / flops_per_hour)} hours"
        cost = "not known before a plateau" if flops is None else f"{_cell(flops)} FLOPs{hours}"
        share = "" if flops is None else f", {flops / whole:.1%} of from scratch"
        lines.append(f"{name}: {cost}{share}; {what}")
    return lines
