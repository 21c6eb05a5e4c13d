"""Peak arithmetic rates of accelerators, for the model FLOPs utilisation (MFU)."""

import re

import torch

# Dense matrix-product peaks in TFLOP/s, without sparsity, from the vendors' data sheets: (words of the device's name,
# 16-bit, tf32). The first match counts, so longer names come first.
PEAKS = (
    ("B200", 2250.0, 1125.0),
    ("H200", 989.0, 494.5),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.0, 417.5),
    ("H100", 989.0, 494.5),
    ("A100", 312.0, 156.0),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 62.5),
    ("A40", 149.7, 74.8),
    ("L40S", 362.0, 183.0),
    ("L4", 121.0, 60.0),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s that a device can reach, or None where that is not known (CPUs, float64, float32 without TF32, ...).

    Args:
        device_name: as `torch.cuda.get_device_name` tells it.
        precision: Lightning's name: `bf16-mixed`, `16-true`, `32-true`, ...
    """
    for name, half, single in PEAKS:
        if re.search(rf"\b{name}\b", device_name):
            if precision.startswith(("16", "bf16")):
                return half * 1e12
            tf32 = precision.startswith("32") and torch.get_float32_matmul_precision() != "highest"
            return single * 1e12 if tf32 else None
    return None


def device_name(device: torch.device) -> str:
    """The accelerator's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
