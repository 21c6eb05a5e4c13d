"""A model that grows while it trains: nothing is lost, what can't work is refused, what happens is written down."""

import csv
import re

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from datamodules.text import TextDataModule
from lit_modules.callbacks import GrowParameterTokens, Throughput
from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.schedule import lr_factor
from tests.integration.growing import STAGES, checkpoint_of, config_of, fit, saving
from tests.integration.tiny import TINY, rows
from tokenformer import LMConfig, TokenFormerLM, from_pretrained, save_pretrained


def test_a_hash_sees_what_cancels_and_what_changes_places():
    from lit_modules.strategies.ranks import fingerprint

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        one, other = (torch.randn(64, 3, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
        pairs = [torch.cat((x, -x)) for x in (one, other)]
        tensors = [one, other, *pairs, one.flip(0), torch.zeros(64, 3, dtype=dtype), one.new_ones(1)]
        assert len({int(fingerprint(tensor)) for tensor in tensors}) == len(tensors)
        assert fingerprint(one) == fingerprint(one.clone())


ADAM = {"step", "exp_avg", "exp_avg_sq"}


class Recorder(Callback):
    """Copies of weights and optimizer state at the start of each batch, before or after the growth."""

    def __init__(self):
        self.weights, self.moments = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = trainer.global_step
        self.weights[step] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        names = {p: name for name, p in pl_module.named_parameters()}
        state = trainer.optimizers[0].state
        self.moments[step] = {names[p]: {k: v.clone() for k, v in s.items()} for p, s in state.items() if p in names}


def module_and_data(corpus, folder, kind=LanguageModule, **optim):
    config = LMConfig(**TINY["model"]["init_args"]["config"], vocab_size=257, max_seq_len=32)
    data = TextDataModule(source=str(corpus[0]), cache_dir=str(folder / "tokens"), seq_len=32, batch_size=4)
    return kind(config, OptimConfig(**{"lr": 1e-3, "warmup_steps": 1} | optim)), data


def train(module, data, folder, *callbacks, steps=14):
    torch.manual_seed(0)
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*callbacks, Throughput()],
        logger=False,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        **quiet,
    )
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop", "Muon"])
def test_old_state_is_untouched_to_the_bit(corpus, tmp_path, implementation):
    class Module(LanguageModule):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            if implementation == "Muon":
                return made
            for group in made["optimizer"].param_groups:
                group["fused"], group["foreach"] = implementation == "fused", implementation == "foreach"
            return made

    muon = implementation == "Muon"
    module, data = module_and_data(corpus, tmp_path, Module, name="muon" if muon else "adamw")
    before, after = Recorder(), Recorder()
    train(module, data, tmp_path, before, GrowParameterTokens(stages=STAGES), after)
    for step in (6, 10):
        assert before.moments[step].keys() == after.moments[step].keys()  # the new have none yet
        for name, state in before.moments[step].items():
            assert torch.equal(before.weights[step][name], after.weights[step][name])
            for key, value in state.items():
                assert torch.equal(value, after.moments[step][name][key]), (name, key)
        new = after.weights[step].keys() - before.weights[step].keys()
        assert len(new) == 2 * 2 * 5
        for name in new:  # alive
            assert not torch.equal(after.weights[step][name], before.weights[step + 2][name]), name
            assert muon or before.moments[step + 1][name]["step"] == 1
            assert before.moments[step + 1][name].keys() == ({"momentum_buffer"} if muon else ADAM)
    groups = module.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [*([0.1] if muon else []), 0.1, 0.0]
    assert all(name.endswith(("keys", "values", "embedding.weight")) for name in groups[0]["param_names"])
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_train_new_moves_no_old_bit(corpus, tmp_path):
    module, data = module_and_data(corpus, tmp_path, weight_decay=0.5, lr=1e-2)
    recorder = Recorder()
    train(module, data, tmp_path, GrowParameterTokens(stages=STAGES, train="new"), recorder)
    at_growth, at_end = recorder.weights[10], {name: p.detach() for name, p in module.named_parameters()}
    moved = {name for name, tensor in at_growth.items() if not torch.equal(tensor, at_end[name])}
    assert moved == {name for name in at_end if ".segments.2." in name}
    assert len(moved) == 2 * 2 * 5


def test_old_parameters_have_their_own_rate(corpus, tmp_path):
    module, data = module_and_data(corpus, tmp_path, schedule="constant")
    growth = GrowParameterTokens(stages=STAGES, old_lr_scale=0.25)
    train(module, data, tmp_path, growth)
    new_matrices, new_vectors, old_matrices, old_vectors = module.trainer.optimizers[0].param_groups
    assert {name.split(".segments.")[1][0] for name in new_matrices["param_names"]} == {"2"}
    assert new_vectors["param_names"] == []
    assert "model.embedding.weight" in old_matrices["param_names"]
    assert "model.backbone.norm.weight" in old_vectors["param_names"]
    assert old_matrices["lr"] == pytest.approx(0.25 * new_matrices["lr"])
    assert (old_matrices["weight_decay"], old_vectors["weight_decay"]) == (0.1, 0.0)


def schedulers():
    """Name -> function of an optimizer; what users of Lightning write."""
    lrs = torch.optim.lr_scheduler
    return {
        "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 1 / (1 + step)),
        "cosine": lambda o: lrs.CosineAnnealingLR(o, 14),
        "OneCycle": lambda o: lrs.OneCycleLR(o, 1e-3, total_steps=20),
        "Sequential": lambda o: lrs.SequentialLR(
            o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.CosineAnnealingLR(o, 10)], milestones=[4]
        ),
    }


@pytest.mark.parametrize("name", schedulers())
def test_growth_disturbs_no_scheduler(corpus, tmp_path, name):
    class Module(LanguageModule):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.param_groups(), lr=1e-3)
            scheduler = {"scheduler": schedulers()[name](optimizer), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    class Rates(LearningRateMonitor):
        def on_train_batch_start(self, trainer, *args):
            super().on_train_batch_start(trainer, *args)
            rates[bool(growth)].append([group["lr"] for group in trainer.optimizers[0].param_groups])

    rates = {True: [], False: []}
    for growth in ([], [GrowParameterTokens(stages=STAGES, schedule="continue")]):
        module, data = module_and_data(corpus, tmp_path, Module)
        trainer = Trainer(
            default_root_dir=tmp_path / str(len(growth)),
            accelerator="cpu",
            max_steps=14,
            callbacks=[*growth, Throughput(), Rates("step")],
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, data)
    assert rates[True] == rates[False]
    assert len(rates[True]) == 14


def test_schedule_restarts_at_each_growth(corpus, tmp_path):
    for schedule in ("restart", "continue"):
        config = config_of(tmp_path, corpus, schedule=schedule)
        main(fit(config, tmp_path / schedule, *saving(every=14)))
    optim = OptimConfig(warmup_steps=1)
    starts = {"restart": [(0, 6), (6, 10), (10, 14)], "continue": [(0, 14)]}
    for schedule, spans in starts.items():
        expected = [1e-3 * lr_factor(optim, end - start)(step) for start, end in spans for step in range(end - start)]
        assert [rate for _, rate in rows(tmp_path / schedule, "train/lr")] == pytest.approx(expected)


def test_compiled_models_grow_with_a_bounded_number_of_graphs(corpus, tmp_path, monkeypatch):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_block(self, backend=count))
    many = [{"at_step": step, "factor": 1.5} for step in range(2, 11)]  # more sizes than dynamo's limit of 8
    config = config_of(tmp_path, corpus, stages=many, schedule="continue", trainer={"limit_val_batches": 0})
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, *_):
            seen.append(len(graphs))

    monkeypatch.setattr("tests.integration.kill.Count", Count, raising=False)
    counting = "--trainer.callbacks+=tests.integration.kill.Count"
    main(fit(config, tmp_path / "compiled", "--model.compile=true", counting, *saving(every=14)))
    new = [b - a for a, b in zip([0, *seen], seen, strict=False)]
    assert all(1 <= new[step] <= 2 for step in range(2, 11)), new  # never none: that would be eager, without a word
    assert not any(new[step] for step in (1, 11, 12, 13))
    main(fit(config, tmp_path / "eager", *saving(every=14)))
    for (_, one), (_, other) in zip(
        *(rows(tmp_path / run, "train/loss") for run in ("compiled", "eager")), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-5)


def test_schedules_of_other_optimizers_are_not_promised(corpus, tmp_path):
    class Module(LanguageModule):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.param_groups(), lr=1e-3)

    for wrong in ({"schedule": "restart"}, {"schedule": "continue", "old_lr_scale": 0.5}):
        module, data = module_and_data(corpus, tmp_path, Module)
        with pytest.raises(ValueError, match="need the module's own optimizer"):
            train(module, data, tmp_path, GrowParameterTokens(stages=STAGES, **wrong))


def test_growth_that_moves_the_loss_stops_the_run(corpus, tmp_path, monkeypatch):
    import tokenformer.growth

    exact = tokenformer.growth.append_tokens

    def spoiled(layer, *args):
        exact(layer, *args)
        if not layer.tau.is_meta:
            layer.segments[-1].values.data.normal_()

    monkeypatch.setattr(tokenformer.growth, "append_tokens", spoiled)
    with pytest.raises(RuntimeError, match="verify: growth moved the loss of a batch by .* is allowed in 32-true"):
        main(fit(config_of(tmp_path, corpus), tmp_path / "run"))
    assert checkpoint_of(tmp_path / "run", 6).exists()
    main(fit(config_of(tmp_path, corpus, verify=False), tmp_path / "unverified", *saving(every=14)))
    (row, _) = csv.DictReader((tmp_path / "unverified/growth.csv").open())
    assert float(row["loss_after"]) != float(row["loss_before"])


def test_growth_is_logged(corpus, tmp_path, caplog):
    main(fit(config_of(tmp_path, corpus), tmp_path / "run", *saving(every=14)))
    lines = re.findall(r"grown at step .*", caplog.text)
    assert "20,576 -> 32,864 parameters (qkv 16 -> 32, proj 16 -> 32, ffn 32 -> 64)" in lines[0]
    first, second = csv.DictReader((tmp_path / "run/growth.csv").open())
    assert (first["step"], first["tokens"], first["stage"]) == ("6", str(6 * 128), "1")
    assert (second["qkv_before"], second["qkv_after"], second["ffn_after"]) == ("32", "64", "128")
    assert (first["params_before"], second["params_after"]) == ("20576", "57440")
    flops = dict(rows(tmp_path / "run", "train/flops"))
    assert float(first["flops"]) == flops[5]
    # What a step costs is what the model of that size costs.
    for step, sizes in ((5, {}), (6, {"qkv": 32, "proj": 32, "ffn": 64}), (13, {"qkv": 64, "proj": 64, "ffn": 128})):
        config = TINY["model"]["init_args"]["config"] | {f"{kind}_tokens": n for kind, n in sizes.items()}
        assert flops[step] - flops[step - 1] == 3 * 128 * LMConfig(**config, vocab_size=257).flops_per_token(32)
    stages = dict(rows(tmp_path / "run", "train/stage"))
    assert [stages[step] for step in (5, 6, 9, 10)] == [0, 1, 1, 2]
    assert dict(rows(tmp_path / "run", "train/stage_tokens"))[6] == 128
    assert dict(rows(tmp_path / "run", "train/stage_flops"))[10] == flops[10] - float(second["flops"])


def test_an_exported_model_grows(tmp_path, capsys):
    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(**TINY["model"]["init_args"]["config"], vocab_size=257, scale="learned"))
    save_pretrained(model, tmp_path / "small")
    small, out = str(tmp_path / "small"), str(tmp_path / "models/grown")
    main(["grow", small, "--factor", "2", "--layers", "ffn", "--init", "segment_norm", "--out", out])
    assert "moved by 0.0e+00" in capsys.readouterr().out
    grown = from_pretrained(out)
    ids = torch.randint(0, 257, (2, 16))
    assert torch.equal(grown(ids), model(ids))
    assert grown.backbone.blocks[0].ffn.num_tokens == 64
    for arguments, message in (
        ([small, "--factor", "2", "--out", out], "exists: choose another"),
        (
            [str(tmp_path), "--factor", "2", "--out", str(tmp_path / "x")],
            "is neither a checkpoint nor an exported model",
        ),
        ([str(tmp_path / "none.ckpt"), "--factor", "2", "--out", str(tmp_path / "x.ckpt")], "no such file"),
        ([small, "--ffn", "8", "--out", str(tmp_path / "x")], "growth only adds"),
        ([small, "--out", str(tmp_path / "x")], "give a factor, or some of"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["grow", *arguments])


def test_a_baseline_widened_in_its_file_is_trained_on(corpus, tmp_path):
    config = config_of(tmp_path, corpus)
    options = ["--trainer.callbacks=[]", "--model.config.baseline=width", "--trainer.val_check_interval=null"]
    main(fit(config, tmp_path / "run", *options, "--trainer.max_steps=2"))
    small, wide = checkpoint_of(tmp_path / "run", 2), tmp_path / "wide.ckpt"
    main(["grow", str(small), "--width", "2", "--out", str(wide)])
    main(fit(config, tmp_path / "more", *options, "--trainer.max_steps=3", resume=wide))
    before, after = (torch.load(path, weights_only=True) for path in (wide, checkpoint_of(tmp_path / "more", 3)))
    shapes = [{name: t.shape for name, t in saved["state_dict"].items()} for saved in (before, after)]
    assert shapes[0] == shapes[1]
    (optimizer,) = after["optimizer_states"]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {1.0}  # it began afresh
