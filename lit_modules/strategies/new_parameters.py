"""What the ways of training on several devices need when a model grows: DDP is wrapped again, FSDP2 shards what is new.

Private names of Lightning and torch that this leans on: `DistributedDataParallel._remove_autograd_hooks`,
`DDPStrategy._pl_static_graph_delay_done`. The tests of growth in two processes cover them.
"""

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from lit_modules.strategies.fsdp2 import FSDP2


def check_strategy(strategy: Strategy) -> None:
    """Whether a model can grow in this strategy.

    Raises:
        ValueError: if not.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDP2)):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__}: a model grows on one device, in ddp, and in fsdp2"
        )


def register_new_parameters(strategy: Strategy) -> None:
    """Let the strategy take up parameters that the model has now and had not before."""
    if isinstance(strategy, DDPStrategy):
        _rewrap_ddp(strategy)
    elif isinstance(strategy, FSDP2):
        strategy.shard_new_segments()


def _rewrap_ddp(strategy: DDPStrategy) -> None:
    """Give DDP buckets for the new parameters; without them these would differ between processes, silently."""
    old = strategy.model
    if isinstance(old, DistributedDataParallel):
        old._remove_autograd_hooks()
        strategy.model = strategy.lightning_module
        del old
        strategy.configure_ddp()
        strategy._pl_static_graph_delay_done = False
