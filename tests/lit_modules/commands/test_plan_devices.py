"""The table of devices by hand: times, shares of a step, where a strategy fits and stops to pay."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lit_modules.commands.plan import plan
from lit_modules.commands.plan_devices import COUNTS, DDP, FSDP2, TOKENS, Step, scale_out, table
from lit_modules.growth.stages import Stage
from tests.lit_modules.commands.test_plan import TINY, module, run_of
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.communication import Traffic, ddp_traffic, fsdp_traffic, muon_traffic, token_parallel_traffic
from tokenformer.cost import muon_flops, training_memory
from tokenformer.growth import grow
from tokenformer.hardware import Device, find_device, seconds
from tokenformer.sharding import Layout

DEVICE = Device("D", 100.0, 50.0, 80, 400, 40)
STEP = Step(sequences=64, batch_size=4, seq_len=16, precision="bf16-mixed", flops_per_second=1e9)


@pytest.fixture(scope="module")
def net():
    with torch.device("meta"):
        return TokenFormerLM(LMConfig(**TINY))


def test_time_is_bytes_over_bandwidth_and_latency_of_hops():
    assert seconds(Traffic(group=8, sent=400 * 10**9, gathers=10), DEVICE, 8) == pytest.approx(1 + 70 * 4e-6)
    # Two nodes of 8: a ring leaves a node over all 8 ports, 320 GB/s together. 14 hops within nodes, one between.
    assert seconds(Traffic(group=16, sent=320 * 10**9, gathers=1), DEVICE, 8) == pytest.approx(1 + 14 * 4e-6 + 14e-6)
    # A member in each node has a port of its own.
    assert seconds(Traffic(group=16, sent=40 * 10**9, all_reduces=1), DEVICE, 1) == pytest.approx(1 + 8 * 14e-6)
    assert seconds(Traffic(group=1, sent=0, all_reduces=3, gathers=2), DEVICE, 8) == 0


def test_points_by_hand(net):
    """64 sequences: on 4 devices 16 each, 4 batches of 4; on 32 devices a batch of 2, in groups of 8 4 batches of 4."""
    points = {(p.strategy, p.devices): p for p in scale_out(net, STEP, DEVICE)}
    flops, tokens_flops = net.flops_per_token(16), 2 * 2 * 2 * 32 * (3 * 24 + 20 + 64)
    ideal = 3 * 64 * 16 * flops / 1e9
    ddp, fsdp, tokens = (points[strategy, 32] for strategy in (DDP, FSDP2, TOKENS))
    assert [(p.batches, p.batch_size) for p in (points[DDP, 4], ddp, fsdp, tokens)] == [(4, 4), (1, 2), (1, 2), (4, 4)]
    traffic = ddp_traffic(net, "bf16-mixed", 32)
    assert (ddp.sent_bytes, ddp.communication_seconds) == (traffic.sent, seconds(traffic, DEVICE, 8))
    assert ddp.memory_bytes == training_memory(net, 2, 16, "bf16-mixed", 32).total
    assert ddp.compute_seconds == fsdp.compute_seconds == pytest.approx(ideal / 32)
    assert fsdp.sent_bytes == fsdp_traffic(Layout(net, 32), "bf16-mixed", 1).sent
    assert fsdp.memory_bytes == training_memory(net, 2, 16, "bf16-mixed", 32, sharded=True).total
    within = token_parallel_traffic(net, 4 * 16, "bf16-mixed", 4, 8)
    beside = fsdp_traffic(Layout(net, 32, 8), "bf16-mixed", 4)
    assert tokens.sent_bytes == within.sent + beside.sent
    waits = seconds(within, DEVICE, 8)
    assert tokens.communication_seconds == pytest.approx(waits + seconds(beside, DEVICE, 1))
    padded = 2 * 2 * 2 * 32 * 8 * (3 * 3 + 3 + 8)  # of 20 tokens each of 8 devices has 3
    assert tokens.compute_seconds == pytest.approx(3 * 16 * 16 * (flops - tokens_flops + padded / 8) / 1e9)
    assert tokens.memory_bytes == training_memory(net, 4, 16, "bf16-mixed", 32, True, 8).total
    assert tokens.efficiency == pytest.approx(ideal / 32 / (waits + tokens.compute_seconds))


def test_what_hides_behind_computing(net):
    """A slow network: FSDP2 hides behind the whole step, DDP behind two thirds of its last batch."""
    slow = DEVICE._replace(link=0.014)
    points = {(p.strategy, p.devices): p for p in scale_out(net, STEP, slow)}
    ddp, fsdp = points[DDP, 8], points[FSDP2, 8]
    assert ddp.communication_seconds < ddp.compute_seconds < fsdp.communication_seconds  # two batches
    longer = ddp.communication_seconds - ddp.compute_seconds / 3
    assert ddp.efficiency == pytest.approx(ddp.compute_seconds / (ddp.compute_seconds + longer))
    assert fsdp.efficiency == pytest.approx(fsdp.compute_seconds / fsdp.communication_seconds)


def test_muon_by_hand(net):
    """In DDP each device does all of its work, in FSDP2 a share, for which it waits; it keeps one moment less."""
    points, muons = (
        {(p.strategy, p.devices): p for p in scale_out(net, replace(STEP, optimizer=name), DEVICE)}
        for name in ("adamw", "muon")
    )
    flops = muon_flops(net)
    for strategy, devices, group in ((DDP, 32, 1), (FSDP2, 32, 1), (TOKENS, 32, 8)):
        point, muon = points[strategy, devices], muons[strategy, devices]
        own = flops if strategy == DDP else muon_flops(net, devices)
        assert muon.compute_seconds == pytest.approx(point.compute_seconds + own / 1e9)
        assert muon.memory_bytes < point.memory_bytes
        replicas, neighbours = muon_traffic(net, Layout(net, devices, group))
        sent = 0 if strategy == DDP else replicas.sent + neighbours.sent
        waits = 0 if strategy == DDP else seconds(replicas, DEVICE, 8 // group) + seconds(neighbours, DEVICE, 8)
        assert muon.sent_bytes == point.sent_bytes + sent
        assert muon.communication_seconds == pytest.approx(point.communication_seconds + waits)
    whole = 3 * 64 * 16 * net.flops_per_token(16)
    ideal = (whole + flops) / 32 / 1e9
    gathers = seconds(muon_traffic(net, Layout(net, 32))[0], DEVICE, 8)
    expected = ideal / (whole / 32 / 1e9 + muon_flops(net, 32) / 1e9 + gathers)  # all else that FSDP2 sends hides
    assert muons[FSDP2, 32].efficiency == pytest.approx(expected)


def test_devices_without_a_sequence_are_left_out(net):
    points = scale_out(net, STEP, DEVICE)
    assert max(p.devices for p in points if p.strategy == DDP) == 64
    assert max(p.devices for p in points if p.strategy == TOKENS) == 512
    lines = table(points, STEP, DEVICE)
    (last,) = (line for line in lines if line.startswith("  1,024"))
    assert set(last.split()[1:]) == {"-"}


def verdicts(points, device=DEVICE):
    return table(points, STEP, device)[-len({p.strategy for p in points}) :]


def test_verdicts(net):
    points = [p for p in scale_out(net, replace(STEP, sequences=1024), DEVICE) if p.strategy == DDP]
    assert [p.devices for p in points] == COUNTS

    def line(fits, efficiency):
        given = zip(points, fits, efficiency, strict=True)
        return verdicts([replace(p, fits=f, efficiency=e) for p, f, e in given])[0]

    ends = points[3]
    why = f"would compute {1000 * ends.compute_seconds:,.0f} ms and send for {1000 * ends.communication_seconds:.4f} ms"
    assert line([True] * 11, [1.0] * 11) == "DDP: fits from 1 device on; pays up to 1,024 devices"
    text = line([True, False, *[True] * 9], [1.0, 0.9, 0.5, *[0.49] * 8])
    assert text == f"DDP: fits from 4 devices on; pays up to 4 devices: 8 devices {why}"
    assert line([True] * 11, [1.0, *[0.4] * 10]).startswith("DDP: fits from 1 device on; does not pay: 2 devices would")
    assert line([True] * 10 + [False], [1.0] * 11) == "DDP: does not fit 80 GiB"
    assert line([True] * 11, [None] * 11) == "DDP: fits from 1 device on"
    assert verdicts(points[:4])[0] == "DDP: fits from 1 device on; pays up to 8 devices: more have no sequence each"


def test_what_does_not_fit_has_a_star(net):
    half = sorted(p.memory_bytes for p in scale_out(net, STEP, DEVICE))[10]
    small = DEVICE._replace(memory=half / 2**30)
    points = scale_out(net, STEP, small)
    assert [p.fits for p in points] == [p.memory_bytes <= half for p in points]
    stars = sum(line.count("*") for line in table(points, STEP, small)[5:])
    assert 0 < stars == sum(not p.fits for p in points) < len(points)


def test_plan_scales_out_the_last_size(tmp_path):
    """With growth that is the grown model, its segments gathered one by one; a Transformer has no tokens to divide."""
    data, run = SimpleNamespace(batch_size=4, seq_len=16), run_of([Stage(at_step=60, factor=2.0)], accumulate=2)
    text = plan(module(), data, run, devices=8, device="H100", network=7.0, out=str(tmp_path / "plan.csv"))
    assert "sends 450 GB/s within and 7 GB/s between nodes" in text
    assert "The step stays 64 sequences of 16 tokens" in text
    with (tmp_path / "plan-devices.csv").open() as file:
        rows = {(row["strategy"], int(row["devices"])): row for row in csv.DictReader(file)}
    net = module().build_model().to("meta")
    grow(net, qkv=48, proj=40, ffn=128)
    device = find_device("H100")._replace(network=7.0)
    for point in scale_out(net, replace(STEP, flops_per_second=0.4 * 989e12), device):
        row = rows.pop((point.strategy, point.devices))
        assert int(row["sent_bytes"]) == point.sent_bytes
        assert int(row["memory_bytes"]) == point.memory_bytes
        assert float(row["communication_seconds"]) == point.communication_seconds
        assert float(row["efficiency"]) == point.efficiency
    assert not rows
    baseline = plan(module(TINY | {"baseline": "width"}), data, run_of())
    assert "FSDP2: fits" in baseline
    assert TOKENS not in baseline
