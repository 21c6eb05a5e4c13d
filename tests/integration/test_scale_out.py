"""Tensor parallelism of Pattention equals one device, in training, growth and resume; the strategy configs run."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Callback

from lit_modules.callbacks import GrowParameterTokens
from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from lit_modules.optim.config import OptimConfig
from lit_modules.strategies.fsdp2 import FSDP2
from lit_modules.strategies.sharding import check_divisible
from tests.conftest import ROOT
from tests.integration.growing import checkpoint_of, config_of, contents, difference, fit, logged, saving
from tests.integration.processes import run_in_processes
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.growth import pattention_layers

STRATEGIES = ROOT / "configs" / "strategy"
EXACT = ["--model.config.scale=learned", "--trainer.precision=32-true"]
CHECK = "--trainer.callbacks+=tests.integration.test_scale_out.CheckMuon"
MUON = ["--model.optim.name=muon", "--model.config.depth=1"]
EMA = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9"]


def strategy(name, num_devices):
    """Options that add a strategy's config, for this machine."""
    return ["--config", str(STRATEGIES / f"{name}.yaml"), f"--trainer.devices={num_devices}"]


SHARED = strategy("fsdp2-tensor-parallel", 4)
ONE_FILE = [*SHARED, "--trainer.strategy.save_distributed_checkpoint=false"]
# Six steps are enough where nothing is compared with one device.
SHORT = {"trainer": {"max_steps": 6}}
SHORT |= {"stages": [{"at_step": 2, "qkv": 32, "proj": 32, "ffn": 64}, {"at_step": 4, "factor": 2.0}]}
BATCHES = ["--data.batch_size=2"]  # on each of two groups of two devices; one device takes 4 sequences


class WriteShares(Callback):
    """Writes how many tokens of each segment a process has, at the end."""

    def on_train_end(self, trainer, pl_module):
        layers = pattention_layers(pl_module.model)
        shares = {name: [len(s.keys.to_local()) for s in layer.segments] for name, layer in layers.items()}
        path = f"{trainer.default_root_dir}/shares-{trainer.global_rank}.json"
        with open(path, "w") as file:
            json.dump(shares, file)


class CheckMuon(Callback):
    """Compares step 5, after two growths, with torch's Muon on whole matrices, to the bit."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 5:
            (group,) = (group for group in optimizer.param_groups if group["muon"])
            self.matrices = [(p, torch.nn.Parameter(p.full_tensor().detach().clone())) for p in group["params"]]
            whole = [q for _, q in self.matrices]
            self.peer = torch.optim.Muon(whole, group["lr"], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            for p, q in self.matrices:
                self.peer.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].full_tensor().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6:
            for p, q in self.matrices:
                q.grad = p.grad.full_tensor()
            self.peer.step()
            same = sum(torch.equal(p.full_tensor(), q) for p, q in self.matrices)
            with open(f"{trainer.default_root_dir}/same-{trainer.global_rank}", "w") as file:
                file.write(f"{same} of {len(self.matrices)}")


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Folder of runs on one device, and on four in groups of two."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "short").mkdir()
    # What is compared with one device starts from zero keys, whose rounding the bound fits.
    config, short = config_of(folder, corpus, init="zero_keys"), config_of(folder / "short", corpus, **SHORT)
    main(fit(config, folder / "one", *EXACT, *EMA, *saving(every=8)))
    write = "--trainer.callbacks+=tests.integration.test_scale_out.WriteShares"
    accumulated = [*SHARED, "--data.batch_size=1", "--trainer.accumulate_grad_batches=2", *MUON]
    exact = [*ONE_FILE, *BATCHES, *EXACT, *EMA]
    one, half = checkpoint_of(folder / "one", 8), checkpoint_of(folder / "bf16", 3)
    run_in_processes(
        [
            fit(config, folder / "shared", *exact, write, *saving(every=8)),
            fit(config, folder / "from-one", *exact, *saving(every=14), resume=one),
            fit(short, folder / "Muon", *ONE_FILE, *BATCHES, *EXACT, *MUON, CHECK, *saving(every=6)),
            fit(short, folder / "bf16", *accumulated, *saving(every=3)),
            fit(short, folder / "bf16-resumed", *accumulated, *saving(every=6), resume=half),
        ],
        num_processes=4,
    )
    resume = checkpoint_of(folder / "shared", 8)
    main(fit(config, folder / "to-one", *EXACT, *EMA, *saving(every=14), resume=resume))
    return folder


@pytest.mark.parametrize("run", ["shared", "from-one", "to-one"])
def test_shared_tokens_equal_one_device(runs, run):
    """Weights, average and Adam's moments, after training and two growths."""
    assert difference(runs / "one", runs / run) < 1e-6
    first = 0 if run == "shared" else 8
    for column, pairs in logged(runs / "one", first).items():
        got = dict(logged(runs / run, first)[column])
        assert got == pytest.approx(dict(pairs), rel=1e-6), column
    moved = contents(runs / "one")["model.backbone.blocks.0.ffn.tau_gain"]
    assert moved.abs() > 1e-4  # so its gradient was right too


def test_a_step_of_muon_on_shared_tokens_is_torchs(runs):
    """Not compared after a training, since rounding to 16 bits lets the last bit of a gradient grow."""
    assert [(runs / f"Muon/same-{rank}").read_text() for rank in range(4)] == ["30 of 30"] * 4


def test_shared_tokens_resume_to_the_bit(runs):
    assert difference(runs / "bf16", runs / "bf16-resumed", step=6) == 0
    assert logged(runs / "bf16", 3) == logged(runs / "bf16-resumed", 3)


def test_growth_keeps_the_shares_equal(runs):
    shares = [json.loads((runs / f"shared/shares-{rank}.json").read_text()) for rank in range(4)]
    assert all(share == shares[0] for share in shares)
    assert shares[0]["backbone.blocks.0.ffn"] == [8, 8, 16]  # of 32, 32, 64 tokens
    assert shares[0]["backbone.blocks.1.attention.query"] == [4, 4, 8]


def test_counts_that_cant_be_divided_are_refused_before_training(corpus, tmp_path):
    config = config_of(tmp_path, corpus)
    share = ["--trainer.devices=1", "--trainer.strategy=FSDP2", "--trainer.strategy.tensor_parallel_size=2"]
    with pytest.raises(ValueError, match="tensor_parallel_size=2: 1 devices can't be divided"):
        main(fit(config, tmp_path / "run", *share))
    sizes = {"vocab_size": 64, "depth": 1, "dim": 16, "num_heads": 2, "qkv_tokens": 16, "ffn_tokens": 16}
    module = LanguageModule(LMConfig(**sizes, proj_tokens=16, max_seq_len=8), OptimConfig(warmup_steps=1))
    trainer = SimpleNamespace(
        strategy=FSDP2(tensor_parallel_size=2), fast_dev_run=False, precision="32-true", max_steps=9
    )
    GrowParameterTokens([{"at_step": 6, "qkv": 18}]).check_settings(trainer, module)
    with pytest.raises(ValueError, match=r"gets by a growth\) 3 parameter tokens at once: no multiple"):
        GrowParameterTokens([{"at_step": 6, "qkv": 19}]).check_settings(trainer, module)
    softmax = TokenFormerLM(LMConfig(**sizes, proj_tokens=16, score_norm="softmax"))
    with pytest.raises(ValueError, match="needs model.config.score_norm=l2_norm_gelu, not softmax"):
        check_divisible(softmax, 2)


def test_strategy_configs_compose_with_an_experiment(corpus, tmp_path):
    """(fsdp2-tensor-parallel: above.)"""
    config = config_of(tmp_path, corpus)
    commands = {}
    for name, num_devices in (("one-device", 1), ("ddp", 2), ("fsdp2", 2)):
        short = ["--trainer.max_steps=2", "--model.optim.schedule=constant", "--trainer.callbacks=null"]
        options = [*strategy(name, num_devices), f"--data.batch_size={4 // num_devices}", *short]
        commands[name] = fit(config, tmp_path / name, *options)
    main(commands.pop("one-device"))
    run_in_processes([*commands.values()])
    losses = {name: logged(tmp_path / name)["train/loss"] for name in ("one-device", *commands)}
    for name, pairs in losses.items():
        assert checkpoint_of(tmp_path / name, 2).exists()
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["name"] == "tiny"
        assert dict(pairs) == pytest.approx(dict(losses["one-device"]), rel=1e-2)  # fsdp2 is in bfloat16
