"""The bytes of a plan against those that go over the wire between two processes of a real run."""

import json
import sys

import pytest
import torch

from tests.integration.growing import config_of, fit
from tests.integration.processes import run_in_processes
from tokenformer import LMConfig, TokenFormerLM, grow
from tokenformer.communication import ddp_traffic, fsdp_traffic
from tokenformer.sharding import Layout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which counts the bytes of each socket")

SIZES = {"depth": 2, "dim": 128, "num_heads": 2, "qkv_tokens": 65, "proj_tokens": 64, "ffn_tokens": 128}
GROWN = {"qkv": 96, "proj": 96, "ffn": 192}


@pytest.fixture(scope="module")
def steps(corpus, tmp_path_factory):
    """Bytes of six optimizer steps of two batches, by strategy. The model grows after three."""
    folder = tmp_path_factory.mktemp("wire")
    settings = {"max_steps": 6, "accumulate_grad_batches": 2, "precision": "bf16-mixed", "limit_val_batches": 0}
    config = config_of(folder, corpus, [{"at_step": 3} | GROWN], trainer=settings | {"logger": False})
    sizes = [f"--model.config.{name}={size}" for name, size in SIZES.items()]
    commands = []
    for strategy in ("ddp", "fsdp2"):
        wire = ["--trainer.callbacks+=tests.integration.wire.Wire", f"--trainer.callbacks.out={folder / strategy}"]
        options = [f"--trainer.strategy={strategy}", "--trainer.devices=2", *sizes, *wire]
        commands.append(fit(config, folder / f"run-{strategy}", *options, "--checkpoint.every_n_train_steps=100"))
    run_in_processes(commands)
    return {strategy: json.loads((folder / strategy).read_text()) for strategy in ("ddp", "fsdp2")}


def model(grown):
    with torch.device("meta"):
        model = TokenFormerLM(LMConfig(**SIZES, vocab_size=257))
    if grown:
        grow(model, **GROWN)
    return model


@pytest.mark.parametrize("grown", [False, True], ids=["before growth", "after growth"])
def test_ddp_sends_its_gradients_once_a_step(steps, grown):
    measured = steps["ddp"][4:6] if grown else steps["ddp"][1:3]
    assert measured == pytest.approx([ddp_traffic(model(grown), "bf16-mixed", 2).sent] * 2, rel=0.01)


@pytest.mark.parametrize("grown", [False, True], ids=["before growth", "after growth"])
def test_fsdp2_sends_weights_and_gradients_with_every_batch(steps, grown):
    """Weights in float32 in spite of bf16-mixed. Gloo reduce-scatters by all-reducing, which sends twice as much."""
    measured = steps["fsdp2"][4:6] if grown else steps["fsdp2"][1:3]
    trained, frozen = model(grown), model(grown).requires_grad_(False)
    both, gathered = (fsdp_traffic(Layout(m, 2), "bf16-mixed", batches=2).sent for m in (trained, frozen))
    assert measured == pytest.approx([gathered + 2 * (both - gathered)] * 2, rel=0.01)
