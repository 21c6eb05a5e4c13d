"""Muon for matrices inside blocks, AdamW for the rest: one optimizer, as Lightning wants it.

M matrices of one shape, R rows, C columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

NS_STEPS, NS_COEFFICIENTS, NS_EPS = 5, (3.4445, -4.7750, 2.0315), 1e-7  # torch.optim.Muon's
STACK = 2**25  # elements of matrices that a device orthogonalises at once, at most: 64 MiB each of a few buffers


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Nesterov, `match_rms_adamw`) on groups with `muon: True`, torch.optim.AdamW on the others.

    A step of Muon is the matrix with orthogonal rows (or columns) that is nearest to the momentum, with the RMS that
    AdamW's steps have, 0.2 of the rate. It takes whole matrices. Under FSDP2 and tensor parallelism, which divide each
    one's rows, devices exchange rows for whole matrices, an equal number each, and exchange the results back; momentum
    stays divided. In DDP each device does all matrices.

    Args:
        groups: of named parameters; those of Muon hold matrices alone.
        lr: learning rate.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's.
        fused: each AdamW group in one pass. Then a `found_inf` of the optimizer, float32 (), that is 1 makes the next
            step do nothing, and no step waits for the device.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
        fused: bool = True,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for alike in _stacks(params):
                    self._muon(alike, group)
            elif params:
                self._adamw(params, group)
        return loss

    def _adamw(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
                self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        moments, squares, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
        adamw(
            params,  # type: ignore[arg-type]
            [p.grad for p in params],  # type: ignore[misc]
            moments,
            squares,
            [],
            steps,
            fused=group["fused"],
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        """A step of matrices of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [_local(self.state[p]["momentum_buffer"]) for p in params]
        weights, gradients = [_local(p) for p in params], [_local(p.grad) for p in params]
        skipped = None if self.found_inf is None else self.found_inf.bool()
        if skipped is not None:  # a buffer takes itself in: it stays
            gradients = [torch.where(skipped, b, g) for b, g in zip(buffers, gradients, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
        stack = torch.stack([update.bfloat16() for update in updates])  # (M, R, C), R its own rows
        stack = _of_whole_matrices(stack, _meshes(params[0]), len(params[0]))
        lr = group["lr"]
        changed = torch._foreach_mul(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(changed, list(stack), alpha=-lr * 0.2 * math.sqrt(max(params[0].shape)))
        for w, new in zip(weights, changed, strict=True):
            w.copy_(new if skipped is None else torch.where(skipped, w, new))


def _stacks(params: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape and sharding, not too many at once; the same ones in every process."""
    alike: dict[Any, list[nn.Parameter]] = {}
    for p in params:
        alike.setdefault((p.shape, p.dtype, p.device, getattr(p, "device_mesh", None)), []).append(p)
    for same in alike.values():
        devices = math.prod(mesh.size() for mesh in _meshes(same[0]))
        number = max(1, STACK * devices // same[0].numel())
        yield from (same[i : i + number] for i in range(0, len(same), number))


def _local(tensor: Any) -> Tensor:
    """A device's rows of a parameter, its gradient or its state."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _meshes(p: Any) -> list[Any]:
    """The meshes among whose devices a parameter's rows are divided: first of all by the last of them."""
    mesh: Any = p.device_mesh if isinstance(p, DTensor) else None
    return [] if mesh is None else [mesh[name] for name in mesh.mesh_dim_names]


def _of_whole_matrices(stack: Tensor, meshes: Sequence[Any], rows: int) -> Tensor:
    """:func:`newton_schulz` of matrices of which a device has some rows, (M, R, C), and that have `rows` together."""
    if not meshes:
        return newton_schulz(stack) if stack.numel() else stack
    mesh, *others = meshes
    size = torch.Size((len(stack), rows // math.prod(other.size() for other in others), stack.shape[2]))
    stride = (size[1] * size[2], size[2], 1)
    its_rows = DTensor.from_local(stack, mesh, [Shard(1)], run_check=False, shape=size, stride=stride)
    whole = its_rows.redistribute(placements=[Shard(0)]).to_local()  # some of the matrices, with all rows
    done = _of_whole_matrices(whole, others, rows).contiguous()
    done = DTensor.from_local(done, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)
    return done.redistribute(placements=[Shard(1)]).to_local()


def newton_schulz(stack: Tensor) -> Tensor:
    """Bring all singular values of each matrix (M, R, C) close to 1: torch.optim.Muon's iteration, bit for bit."""
    a, b, c = NS_COEFFICIENTS
    tall = stack.shape[1] > stack.shape[2]
    X = stack.mT if tall else stack
    X = X / torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True).clamp(min=NS_EPS)
    for _ in range(NS_STEPS):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X
