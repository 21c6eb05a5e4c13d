"""What the ways of training on several devices need when a model grows: DDP is wrapped anew, FSDP2 shards what is new.

Private names of Lightning and torch that this leans on: `DistributedDataParallel._remove_autograd_hooks`,
`DDPStrategy._pl_static_graph_delay_done`. The tests of growth in two processes cover them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.model_parallel import _is_sharded_checkpoint  # type: ignore[attr-defined]
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tokenformer.growth import pattention_layers

CURRENT = "current_model_state."  # begins the names of the weights in a sharded checkpoint that has their average


def check_strategy(strategy: Strategy) -> None:
    """Whether a model can grow in this strategy.

    Raises:
        ValueError: if not.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDP2)):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__}: a model grows on one device, in ddp, "
            "and in lit_modules.strategies.FSDP2"
        )


def adopt_growth(strategy: Strategy) -> None:
    """Let the strategy take up parameters that the model has now and had not before."""
    if isinstance(strategy, DDPStrategy):
        _wrap_anew(strategy)
    elif isinstance(strategy, FSDP2):
        strategy.shard_new_segments()


def _wrap_anew(strategy: DDPStrategy) -> None:
    """Give DDP buckets for the new parameters; without them these would differ between processes, silently."""
    old = strategy.model
    if isinstance(old, DistributedDataParallel):
        old._remove_autograd_hooks()
        strategy.model = strategy.lightning_module
        del old
        strategy.configure_ddp()
        strategy._pl_static_graph_delay_done = False


@torch.no_grad()
def require_equal_ranks(strategy: Strategy, models: Sequence[nn.Module]) -> None:
    """Compare a hash of every parameter that each process holds whole.

    Raises:
        RuntimeError: in all processes, when they differ.
    """
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return
    whole = [(name, p) for model in models for name, p in model.named_parameters() if not isinstance(p.data, DTensor)]
    hashes = torch.stack([torch.hash_tensor(p.detach()).view(torch.int64) for _, p in whole])
    everywhere = [torch.empty_like(hashes) for _ in range(strategy.world_size)]
    torch.distributed.all_gather(everywhere, hashes)
    differs = (torch.stack(everywhere) != hashes).any(dim=0).tolist()
    if any(differs):
        names = [name for (name, _), differ in zip(whole, differs, strict=True) if differ]
        raise RuntimeError(
            f"after growth {len(names)} parameters differ between the processes, {names[0]} first: they no longer "
            "train one model. Start again from the last checkpoint; if it comes back, report it"
        )


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: weights, gradients and optimizer state are divided among all devices.

    ModelParallelStrategy, for models that grow: a resumed run takes the size of the checkpoint before it loads, new
    tokens are sharded, and a full checkpoint has the form that one process writes, so that each reads the other's.

    Args:
        save_distributed_checkpoint: true: a folder to which each process writes its part; false: one file.
        process_group_backend: nccl, gloo; default by device.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Take all devices for data parallelism."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _modules(self) -> list[Any]:
        """The module in training and its averages."""
        assert self.lightning_module is not None
        callbacks = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        found = (getattr(callback, "_average_model", None) for callback in callbacks)
        return [self.lightning_module, *(average.module for average in found if average is not None)]

    def shard_new_segments(self) -> None:
        """Make every segment that is not part of a block's unit a unit of its own."""
        for module in self._modules():
            shard_segments(module, self.device_mesh["data_parallel"])

    def reshard(self) -> None:
        """Give back what a forward pass without a backward pass has left gathered."""
        for module in self._modules():
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def state_dict_of(self, module: nn.Module) -> dict[str, Any]:
        """As `lightning_module_state_dict`, of another module that is sharded."""
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        return get_model_state_dict(module, options=options)

    def load_weights(self, state: dict[str, Any]) -> None:
        """Load the module's weights, given whole or sharded as they are."""
        sharded = any(isinstance(tensor, DTensor) for tensor in state.values())
        options = StateDictOptions(full_state_dict=not sharded, broadcast_from_rank0=not sharded)
        assert self.lightning_module is not None
        set_model_state_dict(self.lightning_module, state, options=options)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; the weights beside an average (EMA) are sharded too."""
        if self._save_distributed_checkpoint and "current_model_state" in checkpoint:
            current = checkpoint.pop("current_model_state")
            checkpoint["state_dict"] |= {f"{CURRENT}{name}": tensor for name, tensor in current.items()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state to be saved: of a full checkpoint, as a single process has it."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        by_name = get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer), options=options)
        return _numbered(by_name) if self.global_rank == 0 else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Bring model and optimizer to the size of the checkpoint, then load it."""
        path = Path(self.broadcast(checkpoint_path))
        module: Any = self.lightning_module
        if _is_sharded_checkpoint(path):
            entries = FileSystemReader(path).read_metadata().state_dict_metadata
            start = "state_dict."
            saved = {
                name.removeprefix(start): torch.empty(entry.size, device="meta")
                for name, entry in entries.items()
                if name.startswith(start) and isinstance(entry, TensorStorageMetadata)
            }
            checkpoint = torch.load(path / "meta.pt", weights_only=True)
        else:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            saved = checkpoint["state_dict"]
        self.reshard()
        module.restore_growth(saved, checkpoint.get("growths", []))
        self.shard_new_segments()
        if self.optimizers:
            module.regroup_optimizer()
        if _is_sharded_checkpoint(path):
            checkpoint = super().load_checkpoint(path, weights_only=weights_only)
            if any(name.startswith(CURRENT) for name in saved):
                current = {f"{CURRENT}{name}": tensor.clone() for name, tensor in self.state_dict_of(module).items()}
                load_sharded({"state_dict": current}, checkpoint_id=path)
                checkpoint["current_model_state"] = {n.removeprefix(CURRENT): tensor for n, tensor in current.items()}
            return checkpoint
        self.load_weights(checkpoint.pop("state_dict"))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            set_optimizer_state_dict(module, optimizer, _named(state), options=options)
        return checkpoint


StrategyRegistry.register("fsdp2", FSDP2, description="fully sharded data parallelism, for models that grow")


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a model: each block is a unit, and what is outside the blocks is one."""
    for block in model.backbone.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("loss", "nats_and_entropy"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def shard_segments(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the segments that are not sharded yet."""
    for layer in pattention_layers(model).values():
        for segment in layer.segments:
            if not isinstance(segment.keys, DTensor):
                fully_shard(segment, mesh=mesh, reshard_after_forward=False)  # its tensors are read after its call


def _numbered(by_name: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state as a single process writes it: parameters are numbers, in the order of the groups."""
    groups: list[dict[str, Any]] = []
    number: dict[str, int] = {}
    for group in by_name["param_groups"]:
        names = list(group["params"])
        first = len(number)
        number |= {name: first + i for i, name in enumerate(names)}
        groups.append(group | {"params": [number[name] for name in names], "param_names": names})
    return {"state": {number[name]: state for name, state in by_name["state"].items()}, "param_groups": groups}


def _named(numbered: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_numbered`."""
    names: dict[int, str] = {}
    for group in numbered["param_groups"]:
        names |= dict(zip(group["params"], group["param_names"], strict=True))
    groups = [group | {"params": group["param_names"]} for group in numbered["param_groups"]]
    return {"state": {names[i]: state for i, state in numbered["state"].items()}, "param_groups": groups}
