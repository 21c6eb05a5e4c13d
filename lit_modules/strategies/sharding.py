"""A model sharded for FSDP2: blocks as units, parameter tokens divided for tensor parallelism."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tokenformer.backbone import blocks_of
from tokenformer.growth import pattention_layers


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model: each block is a unit, and what is outside the blocks is one.

    Args:
        model: whole, and the same in every process.
        mesh: with the dimensions data_parallel and tensor_parallel.

    Raises:
        ValueError: when its tokens can't be divided.
    """
    divide_tokens(model, mesh["tensor_parallel"])
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    for method in ("loss", "nats_and_entropy", "forward_features", "forward_head"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def divide_tokens(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave a process its share of the parameter tokens of each layer.

    Raises:
        ValueError: when they can't be divided.
    """
    check_divisible(model, mesh.size())
    for layer in pattention_layers(model).values():
        for segment in layer.segments:
            shard_tokens(segment, mesh)


def shard_segments(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the segments that are not sharded yet."""
    for layer in pattention_layers(model).values():
        for segment in layer.segments:
            if not isinstance(segment.keys, DTensor):
                shard_tokens(segment, mesh["tensor_parallel"])
                # Its tensors are read after its call.
                fully_shard(segment, mesh=mesh["data_parallel"], reshard_after_forward=False)


def check_divisible(model: nn.Module, size: int) -> None:
    """Whether every segment of a model can be divided into equal shares for tensor parallelism.

    Raises:
        ValueError: if not; or when a layer has a norm that is not made for it.
    """
    layers: dict[str, Any] = pattention_layers(model) if size > 1 else {}
    for name, layer in layers.items():
        if layer.score_norm != "l2_norm_gelu":
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size={size} needs model.config.score_norm=l2_norm_gelu, "
                f"not {layer.score_norm}"
            )
        for segment in layer.segments:
            if segment.num_tokens % size:
                raise ValueError(
                    f"{name} has (or gets by a growth) {segment.num_tokens} parameter tokens at once: "
                    f"no multiple of trainer.strategy.tensor_parallel_size={size}"
                )


def shard_tokens(segment: Any, mesh: DeviceMesh) -> None:
    """Leave a process its share of the tokens, in order: as many as each other one of the mesh has."""
    if mesh.size() == 1:
        return
    for part in ("keys", "values"):
        whole = getattr(segment, part)
        share = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)  # all processes have it whole
        setattr(segment, part, nn.Parameter(share, requires_grad=whole.requires_grad))
