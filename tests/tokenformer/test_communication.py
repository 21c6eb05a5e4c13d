"""What devices send on paper: small cases by hand, and the collectives that FSDP2 really calls among eight devices."""

import math

import pytest
import torch
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils._python_dispatch import TorchDispatchMode

from tokenformer import LMConfig, TokenFormerLM, grow
from tokenformer.communication import Traffic, ddp_traffic, fsdp_traffic, muon_traffic, token_parallel_traffic
from tokenformer.cost import training_memory
from tokenformer.sharding import Layout

# A block: 3 x 2 x 18 + 2 x 20 + 2 x 64 = 276 rows of 32 numbers. The rest: 100 rows, and a norm's 2 x 32 numbers.
TINY = {"vocab_size": 100, "depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 18, "proj_tokens": 20, "ffn_tokens": 64}
BLOCK, REST = 276 * 32, 100 * 32 + 64
GROWN = {"qkv": 24, "ffn": 80}


def build(device="meta", **config):
    with torch.device(device):
        return TokenFormerLM(LMConfig(**TINY | config))


def test_ddp_by_hand():
    model, size = build(), 4 * (2 * BLOCK + REST)
    assert ddp_traffic(model, "bf16-mixed", 4) == Traffic(group=4, sent=2 * 3 * size // 4, all_reduces=1)
    assert ddp_traffic(model, "bf16-true", 4).sent == 3 * size // 4
    assert ddp_traffic(model, "bf16-mixed", 1).sent == 0
    model.embedding.requires_grad_(False)
    assert ddp_traffic(model, "bf16-mixed", 4).sent == 2 * 3 * (size - 4 * 100 * 32) // 4


def test_a_bucket_of_ddp_is_25_mib():
    model = build(vocab_size=2**20)  # 128 MiB
    assert ddp_traffic(model, "32-true", 2).all_reduces == math.ceil((128 * 2**20 + 4 * (2 * BLOCK + 64)) / 2**20 / 25)


def test_fsdp2_by_hand():
    """On 4 devices 18 rows are 5 for each, the others divide. Blocks are gathered twice, the rest once."""
    block, rest = (3 * 2 * 5 + 2 * 5 + 2 * 16) * 32, 25 * 32 + 2 * 8
    one = fsdp_traffic(Layout(build(), 4), "bf16-mixed", batches=1)
    assert one == Traffic(group=4, sent=3 * 4 * (3 * 2 * block + 2 * rest), gathers=2 * 3 + 2)
    three = fsdp_traffic(Layout(build(), 4), "bf16-true", batches=3)
    assert three == Traffic(group=4, sent=3 * one.sent // 2, gathers=3 * one.gathers)
    frozen = fsdp_traffic(Layout(build().requires_grad_(False), 4), "bf16-mixed", batches=1)
    assert frozen == Traffic(group=4, sent=3 * 4 * (2 * 2 * block + rest), gathers=2 * 2 + 1)


def test_fsdp2_of_shares_by_hand():
    """Two groups of 4 devices: 18 tokens are 5 for each, of which the two that have the same hold 3 and 2."""
    model = build()
    layout = Layout(model, 8, 4)
    assert layout.replicas == 2
    assert layout.whole(model.parameters()) == 2 * (3 * 2 * 5 + 2 * 5 + 2 * 16) * 32 + REST
    block, rest = (3 * 2 * 3 + 2 * 3 + 2 * 8) * 32, 50 * 32 + 2 * 16
    assert layout.share(model.parameters()) == 2 * block + rest
    assert fsdp_traffic(layout, "32-true", 1).sent == 4 * (3 * 2 * block + 2 * rest)
    assert layout.saved_flops_per_token() == 2 * 2 * (276 - (3 * 2 * 5 + 2 * 5 + 2 * 16)) * 32


def test_token_parallel_by_hand():
    """Ten layers, 64 tokens: forward and backward each a number (float32) and 32 channels (bfloat16) of each token."""
    traffic = token_parallel_traffic(build(), 64, "bf16-mixed", batches=3, devices=4)
    assert traffic == Traffic(group=4, sent=3 * 2 * 3 * 10 * 2 * 64 * (4 + 32 * 2) // 4, all_reduces=3 * 10 * 4)
    model = build()
    model.backbone.checkpoint_activations = True
    again = token_parallel_traffic(model, 64, "bf16-mixed", batches=3, devices=4)
    assert (again.sent, again.all_reduces) == (3 * traffic.sent // 2, 3 * traffic.all_reduces // 2)
    grow(model := build(), **GROWN, init="segment_norm")  # of all but the two output projections
    grown = token_parallel_traffic(model, 64, "bf16-mixed", batches=3, devices=4)
    assert grown.sent - traffic.sent == 3 * 2 * 3 * 8 * 2 * 64 * 4 // 4
    assert token_parallel_traffic(model, 64, "bf16-mixed", batches=3, devices=1).sent == 0


def test_muon_by_hand():
    """16 bits of all matrices in blocks, there and back: on 4 devices 5 rows each of 18, of which a quarter stays.

    In two groups of 4 a device has 3 rows. There are three shapes, of 18, 20 and 64 rows.
    """
    replicas, group = muon_traffic(build(), Layout(build(), 4))
    rows = 2 * (3 * 2 * 5 + 2 * 5 + 2 * 16)
    assert replicas == Traffic(group=4, sent=2 * 2 * 3 * rows * 32 // 4, gathers=2 * 3)
    assert (group.sent, group.gathers) == (0, 0)
    model = build()
    model.backbone.blocks[0].requires_grad_(False)
    replicas, group = muon_traffic(model, Layout(model, 8, 4))
    size = (3 * 2 * 3 + 2 * 3 + 2 * 8) * 32
    assert replicas == Traffic(group=2, sent=2 * 2 * size // 2, gathers=2 * 3)
    assert group == Traffic(group=4, sent=2 * 2 * 3 * size // 4, gathers=2 * 3)


def test_messages_go_around_a_ring_or_along_a_tree():
    assert Traffic(group=16, sent=0, gathers=3).hops(per_node=8) == (3 * 14, 3 * 1)
    assert Traffic(group=16, sent=0, gathers=3).hops(per_node=1) == (0, 3 * 15)
    assert Traffic(group=64, sent=0, all_reduces=5).hops(per_node=8) == (5 * 2 * 7, 5 * 2 * 3)
    assert Traffic(group=4, sent=0, all_reduces=5).hops(per_node=8) == (5 * 2 * 3, 0)
    assert Traffic(group=1, sent=0, all_reduces=5, gathers=3).hops(per_node=8) == (0, 0)


class Collectives(TorchDispatchMode):
    """Bytes that all devices but one have, of what is gathered and of what is reduced and scattered; and how many."""

    def __init__(self):
        super().__init__()
        self.sent = self.gathers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        whole = {"c10d._allgather_base_.default": 0, "c10d._reduce_scatter_base_.default": 1}.get(str(function))
        if whole is not None:
            self.sent += args[whole].nbytes * 7 // 8
            self.gathers += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grown", [False, True])
def test_fsdp2_calls_these_collectives(eight_processes, grown):
    """Sharded, and grown afterwards, as by `sharding.py`; on 8 devices most parameters have odd rows."""
    torch.manual_seed(0)
    model = build("cpu")
    for block in model.backbone.blocks:
        fully_shard(block, mesh=eight_processes)
    fully_shard(model, mesh=eight_processes)
    old = set(model.modules())
    if grown:
        grow(model, **GROWN)
    for segment in set(model.modules()) - old:
        fully_shard(segment, mesh=eight_processes, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")
    ids = torch.zeros(2, 16, dtype=torch.long)
    with Collectives() as counted:
        for _ in range(3):
            model.loss(ids, ids).backward()
    model = build()
    if grown:
        grow(model, **GROWN)
    expected = fsdp_traffic(Layout(model, 8), "32-true", batches=3)
    assert (counted.gathers, counted.sent) == (expected.gathers, expected.sent)


def test_shares_shrink_and_what_is_sent_grows():
    model = build()
    grow(model, **GROWN)
    counts = [2**i for i in range(11)]
    shares = [Layout(model, n).share(model.parameters()) for n in counts]
    assert shares == sorted(shares, reverse=True)
    for traffic in (
        [ddp_traffic(model, "32-true", n).sent for n in counts],
        [fsdp_traffic(Layout(model, n), "32-true", 2).sent for n in counts],
        [token_parallel_traffic(model, 64, "32-true", 2, n).sent for n in counts],
    ):
        assert traffic[0] == 0
        assert traffic == sorted(traffic)
    memory = [training_memory(model, 4, 16, "bf16-mixed", n, True, n) for n in counts]
    for part in ("weights", "gradients", "optimizer", "activations", "total"):
        sizes = [getattr(m, part) for m in memory]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] < sizes[0]
