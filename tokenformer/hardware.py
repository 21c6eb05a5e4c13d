"""Accelerators as their vendors describe them: arithmetic, memory, links. For the MFU and for plans."""

import re
from typing import NamedTuple

import torch

from tokenformer.communication import Traffic

DEVICES_PER_NODE = 8

# Seconds that a message takes besides its bytes, within a node and between nodes: what NCCL's own cost model assumes
# (NVIDIA/nccl, src/graph/tuning.cc, `hwLat`, protocol Simple: NVLink 3.4 in a ring and 4.0 in a tree, network 14).
LATENCY_WITHIN, LATENCY_BETWEEN = 4e-6, 14e-6


class Device(NamedTuple):
    """An accelerator.

    Attributes:
        name: words of its name.
        half: dense matrix-product peak in 16 bits, TFLOP/s, without sparsity.
        single: the same in TF32.
        memory: GiB; data sheets call them GB. The largest, where it is sold with several.
        link: GB/s that it sends within a node: NVLink, else PCIe, which is the narrow place of a ring even if bridges
            join pairs.
        network: GB/s that it sends between nodes. No property of the device: what it usually comes with. 400 Gb/s each
            (B200, H200, H100), 200 (A100; half of it with PCIe: 4 ports for 8 devices), 100 (V100); others share
            100 Gb/s a node.
    """

    name: str
    half: float
    single: float
    memory: float
    link: float
    network: float


# From the vendors' data sheets. The first match counts, so longer names come first.
DEVICES = (
    Device("B200", 2250.0, 1125.0, 180, 900, 50),
    Device("H200", 989.0, 494.5, 141, 450, 50),
    Device("H100 PCIe", 756.0, 378.0, 80, 64, 25),
    Device("H100 NVL", 835.0, 417.5, 94, 64, 25),
    Device("H100", 989.0, 494.5, 80, 450, 50),
    Device("A100", 312.0, 156.0, 80, 300, 25),
    Device("A10G", 70.0, 35.0, 24, 32, 1.5625),
    Device("A10", 125.0, 62.5, 24, 32, 1.5625),
    Device("A40", 149.7, 74.8, 48, 32, 1.5625),
    Device("L40S", 362.0, 183.0, 48, 32, 1.5625),
    Device("L4", 121.0, 60.0, 24, 32, 1.5625),
    Device("RTX 4090", 165.2, 82.6, 24, 32, 1.5625),
    Device("RTX 3090", 71.0, 35.6, 24, 32, 1.5625),
    Device("V100", 125.0, 15.7, 32, 150, 12.5),
    Device("T4", 65.0, 8.1, 16, 16, 1.5625),
)


def find_device(device_name: str) -> Device | None:
    """The accelerator of that name, as `torch.cuda.get_device_name` tells it; None for an unknown one."""
    return next((device for device in DEVICES if re.search(rf"\b{device.name}\b", device_name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device can reach, or None where that is not known (CPUs, float64, float32 without TF32, ...).

    Args:
        device_name: as `torch.cuda.get_device_name` tells it.
        precision: Lightning's name: `bf16-mixed`, `16-true`, `32-true`, ...
    """
    device = find_device(device_name)
    if device is None:
        return None
    if precision.startswith(("16", "bf16")):
        return device.half * 1e12
    tf32 = precision.startswith("32") and torch.get_float32_matmul_precision() != "highest"
    return device.single * 1e12 if tf32 else None


def seconds(traffic: Traffic, device: Device, per_node: int) -> float:
    """Time on paper of what a device sends: bytes over bandwidth, and the latency of messages that wait for each other.

    A ring through several nodes enters and leaves each node once, over the ports of all its members there together.

    Args:
        traffic: of an optimizer step.
        device: whose links.
        per_node: members of the group in a node.
    """
    within, between = traffic.hops(per_node)
    bandwidth = min(device.link, per_node * device.network) if traffic.group > per_node else device.link
    return traffic.sent / (bandwidth * 1e9) + within * LATENCY_WITHIN + between * LATENCY_BETWEEN


def device_name(device: torch.device) -> str:
    """The accelerator's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
