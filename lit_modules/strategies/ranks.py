"""The processes that train together: which of them a process is, and whether they still hold the same bits."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import nn
from torch.distributed.tensor import DTensor


def data_parallel_rank(trainer: Any) -> tuple[int, int]:
    """(rank, number) among the devices that train on different samples; in tensor parallelism a group counts once."""
    place = trainer.distributed_sampler_kwargs  # None on a single device
    return (place["rank"], place["num_replicas"]) if place else (0, 1)


@torch.no_grad()
def require_equal_ranks(strategy: Strategy, models: Sequence[nn.Module]) -> None:
    """Compare a hash of every tensor that each process holds whole.

    Raises:
        RuntimeError: in all processes, when they differ.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return
    whole = [(n, t) for model in models for n, t in model.state_dict().items() if not isinstance(t, DTensor)]
    prints = torch.stack([fingerprint(tensor) for _, tensor in whole])
    everywhere = [torch.empty_like(prints) for _ in range(strategy.world_size)]
    torch.distributed.all_gather(everywhere, prints)
    differs = (torch.stack(everywhere) != prints).any(dim=0).tolist()
    if any(differs):
        names = [name for (name, _), differ in zip(whole, differs, strict=True) if differ]
        raise RuntimeError(
            f"after growth {len(names)} tensors differ between the processes, {names[0]} first: they no longer "
            "train one model. Start again from the last checkpoint; if it comes back, report it"
        )


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A hash of a tensor's bits that depends on their places, one int64; computed where the tensor is."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for i, bits in enumerate(tensor.detach().flatten().view(integer).split(2**22)):
        places = torch.arange(len(bits), device=tensor.device) * 0x9E3779B97F4A7C1 + 2 * i + 1  # wraps around
        total += (bits.long() * (places ^ (places >> 29))).sum()
    return total
