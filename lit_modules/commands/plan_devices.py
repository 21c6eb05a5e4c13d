"""The same training on 1 to 1,024 devices, on paper: memory, what is sent, and where more devices stop to pay."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenformer.communication import ddp_traffic, fsdp_traffic, muon_traffic, token_parallel_traffic
from tokenformer.cost import muon_flops, training_memory
from tokenformer.growth import pattention_layers
from tokenformer.hardware import DEVICES_PER_NODE, Device, seconds
from tokenformer.language import TokenFormerLM
from tokenformer.sharding import Layout

COUNTS = [2**i for i in range(11)]
DDP, FSDP2, TOKENS = STRATEGIES = ("DDP", "FSDP2", "FSDP2 + tokens")
PAYS = 0.5  # the efficiency below which a run takes more than twice the device hours that one device would take


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an optimizer step is made of, on any number of devices.

    Attributes:
        sequences: of all devices together.
        batch_size: sequences of a batch on one device, at most.
        seq_len: tokens of a sequence.
        precision: Lightning's name.
        flops_per_second: that a device reaches; None where nobody knows.
        optimizer: adamw or muon.
    """

    sequences: int
    batch_size: int
    seq_len: int
    precision: str
    flops_per_second: float | None
    optimizer: str = "adamw"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A strategy on a number of devices; what it needs is of one device and one optimizer step.

    Attributes:
        devices: of all nodes together.
        strategy: one of STRATEGIES.
        batches: one after the other.
        batch_size: sequences of a batch.
        memory_bytes: at the peak.
        fits: whether the device has so much.
        sent_bytes: to all others.
        communication_seconds: that sending takes.
        compute_seconds: that computing takes; None where the device's rate is not known.
        efficiency: the time that one device would take for the whole step, divided by the devices, over the step's.
    """

    devices: int
    strategy: str
    batches: int
    batch_size: int
    memory_bytes: int
    fits: bool
    sent_bytes: int
    communication_seconds: float
    compute_seconds: float | None
    efficiency: float | None


def scale_out(model: TokenFormerLM, step: Step, device: Device) -> list[Point]:
    """All strategies on 1 to 1,024 devices, as long as there is a sequence for each (by tokens: for each group).

    What FSDP2 sends travels while the device computes, what DDP sends during the backward pass of the last batch; a
    step is longer by what takes more time than that. What token parallelism sends within its group, a node, has to
    arrive before the device can go on; and all but the products with parameter tokens each device of a group computes.
    In DDP each device does all of Muon's work; FSDP2 divides it, and sends matrices before and after it.

    Args:
        model: as large as it is at that time, may be on `meta`.
        step: that is divided among the devices.
        device: whose memory and links.
    """
    points = []
    for strategy in STRATEGIES if pattention_layers(model) else (DDP, FSDP2):
        for devices in COUNTS:
            layout = Layout(model, devices, min(devices, DEVICES_PER_NODE) if strategy == TOKENS else 1)
            if layout.replicas <= step.sequences:
                points.append(_point(model, step, device, devices, strategy, layout))
    return points


def _point(model: TokenFormerLM, step: Step, device: Device, devices: int, strategy: str, layout: Layout) -> Point:
    sharded, group, precision = strategy != DDP, layout.tensor_parallel, step.precision
    sequences = -(-step.sequences // layout.replicas)
    batches = -(-sequences // step.batch_size)
    batch_size = -(-sequences // batches)
    memory = training_memory(model, batch_size, step.seq_len, precision, devices, sharded, group, step.optimizer)
    overlapping = fsdp_traffic(layout, precision, batches) if sharded else ddp_traffic(model, precision, devices)
    waited_for = token_parallel_traffic(model, batch_size * step.seq_len, precision, batches, group)
    beside = seconds(overlapping, device, DEVICES_PER_NODE // group)
    between, sent = seconds(waited_for, device, DEVICES_PER_NODE), overlapping.sent + waited_for.sent
    muon, own_muon = 0, 0
    if step.optimizer == "muon":
        muon, own_muon = muon_flops(model), muon_flops(model, devices if sharded else 1)
    if muon and sharded:
        replicas, neighbours = muon_traffic(model, layout)
        between += seconds(replicas, device, DEVICES_PER_NODE // group) + seconds(neighbours, device, DEVICES_PER_NODE)
        sent += replicas.sent + neighbours.sent
    computing = efficiency = None
    if step.flops_per_second is not None:
        per_token = model.flops_per_token(step.seq_len)
        own = batches * batch_size * (per_token - layout.saved_flops_per_token())
        model_seconds = 3 * step.seq_len * own / step.flops_per_second
        computing = model_seconds + own_muon / step.flops_per_second
        ideal = (3 * step.seq_len * step.sequences * per_token + muon) / devices / step.flops_per_second
        hides = model_seconds if sharded else 2 / 3 * model_seconds / batches
        efficiency = ideal / (computing + max(0, beside - hides) + between)
    return Point(
        devices=devices,
        strategy=strategy,
        batches=batches,
        batch_size=batch_size,
        memory_bytes=memory.total,
        fits=memory.total <= device.memory * 2**30,
        sent_bytes=sent,
        communication_seconds=beside + between,
        compute_seconds=computing,
        efficiency=efficiency,
    )


CELLS: dict[str, Callable[[Point], str]] = {
    "batches": lambda point: f"{point.batches} x {point.batch_size}",
    "comp ms": lambda point: _ms(point.compute_seconds),
    "GiB": lambda point: _number(point.memory_bytes / 2**30) + ("" if point.fits else "*"),
    "GB": lambda point: _number(point.sent_bytes / 1e9),
    "ms": lambda point: _ms(point.communication_seconds),
    "eff": lambda point: "-" if point.efficiency is None else f"{point.efficiency:.0%}",
}


def table(points: Sequence[Point], step: Step, device: Device) -> list[str]:
    """What it is about, a line for each number of devices, and one for each strategy: where it fits and pays."""
    by_strategy = {point.strategy: [p for p in points if p.strategy == point.strategy] for point in points}
    columns = [("", "", "devices"), ("", DDP, "batches"), ("", DDP, "comp ms")]
    own_time = (TOKENS, FSDP2) if step.optimizer == "muon" else (TOKENS,)  # else FSDP2's is DDP's
    for strategy in by_strategy:
        titles = ("GiB", "GB", "ms", *(["comp ms"] if strategy in own_time else []), "eff")
        columns += [(strategy, strategy, title) for title in titles]
    above: dict[str, int] = {}
    cells = []
    for group, strategy, title in columns:
        at = {point.devices: point for point in by_strategy.get(strategy, [])}
        column = [CELLS[title](at[n]) if n in at else f"{n:,}" if title == "devices" else "-" for n in COUNTS]
        width = max(map(len, [title, *column]))
        cells.append([f"{cell:>{width}}" for cell in (title, *column)])
        above[group] = above.get(group, -2) + 2 + width
    return [
        f"The last size on 1 to {COUNTS[-1]:,} devices, {DEVICES_PER_NODE} a node; a device sends {device.link:g} GB/s "
        f"within and {device.network:g} GB/s between nodes.",
        f"The step stays {step.sequences:,} sequences of {step.seq_len} tokens: the more devices, the fewer for each.",
        f"Of a device: GiB (* above {device.memory:g}), GB sent in a step, ms for that, ms computing (comp).",
        f"eff: ideal time of a step / its time. More devices pay while it is at least {PAYS:.0%}.",
        "",
        "  ".join(f"{f' {group} ' if group else '':{'-' if group else ' '}^{width}}" for group, width in above.items()),
        *("  ".join(row) for row in zip(*cells, strict=True)),
        "",
        *(_verdict(points, device) for points in by_strategy.values()),
    ]


def _verdict(points: Sequence[Point], device: Device) -> str:
    """Where a strategy fits, and where it stops to pay."""
    strategy = points[0].strategy
    if not points[-1].fits:
        return f"{strategy}: does not fit {device.memory:g} GiB"
    too_small = [i for i, point in enumerate(points) if not point.fits]
    fits_from = points[too_small[-1] + 1 if too_small else 0]
    text = f"{strategy}: fits from {_devices(fits_from)} on"
    if points[0].efficiency is None:
        return text
    num_paying = next((i for i, p in enumerate(points) if p.efficiency is None or p.efficiency < PAYS), len(points))
    text += f"; pays up to {_devices(points[num_paying - 1])}" if num_paying > 1 else "; does not pay"
    if num_paying == len(points):
        return text + ("" if points[-1].devices == COUNTS[-1] else ": more have no sequence each")
    stop = points[num_paying]
    return (
        f"{text}: {_devices(stop)} would compute {_ms(stop.compute_seconds)} ms and send for "
        f"{_ms(stop.communication_seconds)} ms"
    )


def _devices(point: Point) -> str:
    return f"{point.devices:,} device{'s' if point.devices > 1 else ''}"


def _ms(time: float | None) -> str:
    return "-" if time is None else _number(1000 * time)


def _number(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 0.01 <= value < 100 else f"{value:,.0f}"
