"""FSDP2 for models that grow: what is new is sharded, and a checkpoint is loaded whatever size and form it has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.model_parallel import _is_sharded_checkpoint  # type: ignore[attr-defined]
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_modules.checkpoints.compatibility import check_resume
from lit_modules.checkpoints.sharded import CURRENT, ShardReader
from lit_modules.checkpoints.validation import checksums, write_manifest
from lit_modules.checkpoints.writing import AtomicCheckpointIO, discard, disk_error, partial_of, publish
from lit_modules.growth.structure import match_structure
from lit_modules.strategies.sharding import shard_segments


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism: weights, gradients and optimizer state are divided among all devices.

    ModelParallelStrategy, for models that grow: a resumed run takes the size of the checkpoint before it loads, new
    tokens are sharded, and a full checkpoint has the form that one process writes, so that each reads the other's.

    With `tensor_parallel_size` P the devices form groups of P neighbours, that train on the same samples: each has 1/P
    of every layer's parameter tokens, and does 1/P of the work on them. That lets a model train whose operators are too
    large for a device, but what is sent is waited for: keep a group within a node.

    Args:
        tensor_parallel_size: P; 1 is data parallelism alone. The number of devices and all token counts, before and
            after growth, have to be multiples of it.
        save_distributed_checkpoint: true: a folder to which each process writes its part; false: one file.
        process_group_backend: nccl, gloo; default by device.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Divide the devices into groups, and take those for data parallelism."""
        devices, size = self.num_nodes * self.num_processes, self.tensor_parallel_size
        if size < 1 or devices % size:
            raise ValueError(
                f"trainer.strategy.tensor_parallel_size={size}: {devices} devices can't be divided into such groups"
            )
        self._data_parallel_size = devices // size
        super().setup_environment()

    @property
    def tensor_parallel_size(self) -> int:
        """Devices that have the parameter tokens together."""
        assert isinstance(self._tensor_parallel_size, int)
        return self._tensor_parallel_size

    def _modules(self) -> list[Any]:
        """The module in training and its averages."""
        assert self.lightning_module is not None
        callbacks = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        found = (getattr(callback, "_average_model", None) for callback in callbacks)
        return [self.lightning_module, *(average.module for average in found if average is not None)]

    def shard_new_segments(self) -> None:
        """Make every segment that is not part of a block's unit a unit of its own."""
        for module in self._modules():
            shard_segments(module, self.device_mesh)

    def reshard(self) -> None:
        """Give back what a forward pass has left gathered that no backward pass gives back."""
        for module in self._modules():
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def post_backward(self, closure_loss: torch.Tensor) -> None:
        """Give back frozen segments: nothing of a backward pass reaches them."""
        module: Any = self.lightning_module
        if module.growths and (module.growths[-1]["train"] != "all" or getattr(module, "trained", "all") != "all"):
            self.reshard()

    def state_dict_of(self, module: nn.Module, sharded: bool | None = None) -> dict[str, Any]:
        """The state of a sharded module; whole, on the first process only, if checkpoints are."""
        full = not (self._save_distributed_checkpoint if sharded is None else sharded)
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=full, cpu_offload=True))

    def load_weights(self, state: dict[str, Any]) -> None:
        """Load the module's weights, given whole or sharded as they are."""
        sharded = any(isinstance(tensor, DTensor) for tensor in state.values())
        options = StateDictOptions(full_state_dict=not sharded, broadcast_from_rank0=not sharded)
        assert self.lightning_module is not None
        set_model_state_dict(self.lightning_module, state, options=options)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; of a sharded one also the weights beside an average (EMA) are sharded."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        current = checkpoint.pop("current_model_state", {})
        checkpoint["state_dict"] |= {f"{CURRENT}{name}": tensor for name, tensor in current.items()}
        checkpoint["param_groups"] = [state.pop("param_groups") for state in checkpoint.get("optimizer_states", [])]
        path = Path(self.broadcast(filepath))
        files: dict[str, Any] = {}
        problem: Exception | None = None
        try:
            super().save_checkpoint(checkpoint, partial_of(path), storage_options)
            files = checksums(partial_of(path), self.global_rank)
        except (Exception, CheckpointException) as error:  # the others have to hear of it, or they would wait
            problem = disk_error(error) or RuntimeError(f"process {self.global_rank}: {error}")
        everywhere: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everywhere, (problem, files))
        problem = next((problem for problem, _ in everywhere if problem is not None), None)
        if self.global_rank == 0 and problem is None:
            try:
                write_manifest(partial_of(path), [files for _, files in everywhere])
                publish(path)
            except OSError as error:
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            discard(partial_of(path))
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)  # the command line's
        self.checkpoint_io.finish_save(path, problem)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state to be saved: by names; of a full checkpoint by numbers, as a single process has it."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        named = [(name, p) for _, name, p in _parameters(optimizer)]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if self._save_distributed_checkpoint:
            return {"state": {n: optimizer.state[p] for n, p in named if p in optimizer.state}, "param_groups": groups}
        number = {name: i for i, (name, _) in enumerate(named)}
        state = {
            number[name]: {
                k: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for k, v in optimizer.state[p].items()
            }
            for name, p in named
            if p in optimizer.state
        }
        numbered = [group | {"params": [number[name] for name in group["param_names"]]} for group in groups]
        return {"state": state, "param_groups": numbered} if self.global_rank == 0 else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Bring model and optimizer to the size of the checkpoint, then load it."""
        path = Path(self.broadcast(checkpoint_path))
        if _is_sharded_checkpoint(path):
            return self._load_sharded(path)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        weights = checkpoint.pop("state_dict")
        self._match_structure(weights, checkpoint)
        self.load_weights(weights)
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            numbers = {n: i for g in saved["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
            for group, name, p in _parameters(optimizer):
                state = saved["state"].get(numbers.get(name), {})
                for key, value in state.items():
                    optimizer.state[p][key] = _shard_full_tensor(value, p, group)
            _load_groups(optimizer, saved["param_groups"])
        return checkpoint

    def _load_sharded(self, path: Path) -> dict[str, Any]:
        reader = ShardReader(path)
        entries = reader.read_metadata().state_dict_metadata
        shapes = {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        checkpoint: dict[str, Any] = torch.load(path / "meta.pt", weights_only=True)
        start = "state_dict."
        saved = {n.removeprefix(start): torch.empty(s, device="meta") for n, s in shapes.items() if n.startswith(start)}
        self._match_structure(saved, checkpoint)
        assert self.lightning_module is not None
        weights = self.state_dict_of(self.lightning_module, sharded=True)
        averaged = any(name.startswith(CURRENT) for name in saved)
        current = {f"{CURRENT}{name}": torch.zeros_like(tensor) for name, tensor in weights.items() if averaged}
        wanted: dict[str, Any] = {"state_dict": weights | current}
        for i, optimizer in enumerate(self.optimizers):
            states: dict[str, Any] = {}
            wanted[f"optimizer_{i}"] = {"state": states}
            for group, name, p in _parameters(optimizer):
                start = f"optimizer_{i}.state.{name}."
                for key in (n.removeprefix(start) for n in shapes if n.startswith(start)):
                    empty = (
                        torch.zeros_like(p) if shapes[start + key] else _shard_full_tensor(torch.zeros(()), p, group)
                    )
                    optimizer.state[p][key] = empty.detach()
                states[name] = dict(optimizer.state[p])
        load_sharded(wanted, storage_reader=reader)
        self.load_weights(weights)
        if averaged:
            loaded = wanted["state_dict"]
            checkpoint["current_model_state"] = {name: loaded[f"{CURRENT}{name}"] for name in weights}
        for i, optimizer in enumerate(self.optimizers):
            for _, name, p in _parameters(optimizer):
                optimizer.state[p].update(wanted[f"optimizer_{i}"]["state"][name])
            _load_groups(optimizer, checkpoint["param_groups"][i])
        return checkpoint

    def _match_structure(self, saved: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        module: Any = self.lightning_module
        check_resume(checkpoint, module)
        if any(record.get("lora") for record in checkpoint.get("growths", [])):
            raise ValueError("the checkpoint's model has grown by LoRA, which FSDP2 can't divide: resume it with ddp")
        self.reshard()
        match_structure(module, saved, checkpoint.get("growths", []))
        self.shard_new_segments()
        if self.optimizers:
            module.update_optimizer()


StrategyRegistry.register("fsdp2", FSDP2, description="fully sharded data parallelism, for models that grow")


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
    """(group, name, parameter) of all that it trains."""
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            yield group, name, p


def _shard_full_tensor(value: torch.Tensor, p: nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
    """A part of the optimizer's state of a parameter, given whole, where and as the optimizer wants it."""
    if value.ndim and isinstance(p.data, DTensor):
        mesh, placements = p.data.device_mesh, p.data.placements
        # Every process has it whole, so nothing is sent.
        return distribute_tensor(value.to(p.device), mesh, placements, src_data_rank=None)
    return value.clone().to(p.device if value.ndim or group.get("fused") or group.get("capturable") else "cpu")


def _load_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Rates and the like, if the groups are the same."""
    if len(saved) == len(optimizer.param_groups):
        for group, old in zip(optimizer.param_groups, saved, strict=True):
            group |= {key: value for key, value in old.items() if key not in ("params", "param_names")}
