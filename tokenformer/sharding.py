"""How a model is divided among devices, on paper: the units of FSDP2, and a device's share of each parameter."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from torch import nn

from tokenformer.growth import pattention_layers
from tokenformer.language import TokenFormerLM


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters that FSDP2 gathers together.

    Attributes:
        parameters: all of them.
        resharded: given back after the forward pass, and gathered again for the backward pass.
    """

    parameters: list[nn.Parameter]
    resharded: bool

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those that get a gradient."""
        return [p for p in self.parameters if p.requires_grad]


class Layout:
    """A model on several devices.

    A unit each are every block, every segment that has come by growth, and the rest; only blocks are resharded. Of each
    parameter FSDP2 divides the rows, as many for each device as for the first: 10 rows on 4 devices are 3 for each.
    Before that, token parallelism divides the rows of keys and values among the devices of a group.

    Args:
        model: may be on `meta`.
        devices: of all groups together.
        tensor_parallel: devices of a group; the groups train on different data.
    """

    def __init__(self, model: TokenFormerLM, devices: int = 1, tensor_parallel: int = 1) -> None:
        self.replicas, self.tensor_parallel = devices // tensor_parallel, tensor_parallel
        segments = [list(chain(*layer.norm_groups())) for layer in pattention_layers(model).values()]
        self._tokens = {t for segment in chain(*segments) for t in (segment.keys, segment.values)}
        grown = [list(segment.parameters()) for _, *others in segments for segment in others]
        elsewhere = set(chain(*grown))
        self.units = []
        for block in model.backbone.blocks:
            self.units.append(Unit(parameters=[p for p in block.parameters() if p not in elsewhere], resharded=True))
            elsewhere.update(block.parameters())
        self.units += [Unit(parameters=parameters, resharded=False) for parameters in grown]
        rest = [p for p in model.parameters() if p not in elsewhere]
        self.units.append(Unit(parameters=rest, resharded=False))

    def whole(self, parameters: Iterable[nn.Parameter]) -> int:
        """Elements that a device works with: all, but of keys and values the group's share."""
        return sum(self._rows(p) * p[0].numel() for p in parameters)

    def share(self, parameters: Iterable[nn.Parameter]) -> int:
        """Elements that a device keeps under FSDP2."""
        return sum(-(-self._rows(p) // self.replicas) * p[0].numel() for p in parameters)

    def saved_flops_per_token(self) -> int:
        """FLOPs of a forward pass per token that the others of its group do for a device."""
        return 2 * sum((len(p) - self._rows(p)) * p[0].numel() for p in self._tokens)

    def _rows(self, p: nn.Parameter) -> int:
        return -(-len(p) // self.tensor_parallel) if p in self._tokens else len(p)
