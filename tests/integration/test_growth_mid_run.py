"""A model that grows while it trains: nothing is lost, and a run that was interrupted ends as one that was not."""

import csv
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from datamodules.text import TextDataModule
from lit_modules.callbacks import GrowParameterTokens, Throughput
from lit_modules.cli import main
from lit_modules.language import LanguageModule
from lit_modules.optim import OptimConfig, lr_factor
from tests.integration.processes import run_in_processes
from tests.integration.test_training import TINY, rows, write_config
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.interop import load_model, save_model

STAGES = [{"at_step": 6, "qkv": 32, "proj": 32, "ffn": 64}, {"at_step": 10, "factor": 2.0}]
COLUMNS = ("train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/flops", "train/stage_flops", "val/loss")


def config_of(folder, corpus, stages=STAGES, trainer=None, **growth):
    """A tiny config that grows at steps 6 and 10 of 14, and saves after every step."""
    path = write_config(folder, corpus, trainer={"max_steps": 14, "log_every_n_steps": 1} | (trainer or {}))
    config = yaml.safe_load(path.read_text())
    callback = {"class_path": "GrowParameterTokens", "init_args": {"stages": stages} | growth}
    config["trainer"]["callbacks"] = [callback]
    config["checkpoint"] = {"every_n_train_steps": 1, "save_top_k": -1}
    config["model"]["init_args"]["optim"]["warmup_steps"] = 1
    path.write_text(yaml.safe_dump(config))
    return path


def checkpoint_of(run, step):
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def contents(run, step=14):
    """All tensors of a checkpoint by name: weights, average, optimizer; whatever strategy wrote it."""
    path = checkpoint_of(run, step)
    if path.is_dir():
        whole = run / "whole.pt"
        dcp_to_torch_save(path, whole)
        saved = torch.load(whole, weights_only=True)
        states = saved["optimizer_0"]["state"]
    else:
        saved = torch.load(path, weights_only=True)
        (optimizer,) = saved["optimizer_states"]
        states = {
            name: optimizer["state"].get(number, {})
            for group in optimizer["param_groups"]
            for name, number in zip(group["param_names"], group["params"], strict=True)
        }
    tensors = dict(saved["state_dict"])
    tensors |= {f"current.{name}": tensor for name, tensor in saved.get("current_model_state", {}).items()}
    return tensors | {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def difference(one, other):
    """The largest between two runs' contents, infinite where their names differ."""
    a, b = contents(one), contents(other)
    if a.keys() != b.keys():
        return float("inf")
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def logged(run, first=0):
    return {column: [pair for pair in rows(run, column) if pair[0] >= first] for column in COLUMNS}


def fit(config, run, *options, resume=None):
    """The command line of a run; `resume` is a checkpoint."""
    command = ["fit", "--config", str(config), "--run_dir", str(run), *options]
    return [*command, *(["--ckpt_path", str(resume)] if resume else [])]


# (options of the command line, arguments of the callback)
VARIANTS = {
    "plain": ([], {}),
    "random values come from nowhere else": (["--model.config.init=scaled"], {"init": "segment_norm"}),
    "EMA, accumulation, bf16-mixed": (
        [
            "--trainer.callbacks+=EMA",
            "--trainer.callbacks.decay=0.9",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.precision=bf16-mixed",
        ],
        {"init": "split"},
    ),
    "bf16-true": (["--trainer.precision=bf16-true"], {}),
    "annealed tau": ([], {"scale": "anneal", "anneal_steps": 4, "schedule": "continue"}),
    "learned tau from growth on": ([], {"scale": "learned", "init": "pairs"}),
    "only the new": ([], {"train": "new"}),
    "old ones slowly": (
        [],
        {
            "old_lr_scale": 0.3,
            "layers": ["ffn", "query"],
            "stages": [{"at_step": 6, "qkv": 32}, {"at_step": 10, "factor": 2.0}],
        },
    ),
    # 128 tokens a batch, 2 batches a step: reached within steps 3 and 7, so before steps 3 and 8
    "by tokens, accumulating": (
        ["--trainer.accumulate_grad_batches=2"],
        {"stages": [{"at_tokens": 600, "factor": 2.0}, {"at_tokens": 2000, "ffn": 100}]},
    ),
    "on a plateau": (
        ["--trainer.val_check_interval=1"],
        {
            "stages": [{"on_plateau": {"patience": n, "min_delta": 1.0}, "factor": 2.0} for n in (2, 4)],
            "schedule": "continue",
        },
    ),
    "recomputed activations": (["--model.checkpoint_activations=true"], {}),
    "a wider baseline": (
        ["--model.config.baseline=width", "--trainer.callbacks+=EMA"],
        {"stages": [{"at_step": 6, "width": 2}]},
    ),
}


@pytest.mark.parametrize(("options", "growth"), VARIANTS.values(), ids=VARIANTS)
def test_resumed_equals_uninterrupted(corpus, tmp_path, options, growth):
    """From before, exactly at, between and after the growths."""
    config = config_of(tmp_path, corpus, **growth)
    main(fit(config, tmp_path / "whole", *options))
    grown = [int(row["step"]) for row in csv.DictReader((tmp_path / "whole/growth.csv").open())]
    stages = growth.get("stages", STAGES)
    if "at_tokens" in stages[0]:
        assert grown == [3, 8]
        spans = [(0, 3), (3, 8), (8, 14)]
        rates = [1e-3 * lr_factor(OptimConfig(warmup_steps=1), b - a)(i) for a, b in spans for i in range(b - a)]
        assert [rate for _, rate in rows(tmp_path / "whole", "train/lr")] == pytest.approx(rates)
    elif "on_plateau" in stages[0]:  # the first validation sets the best
        assert grown == [3, 8]
    else:
        assert grown == [stage["at_step"] for stage in stages]
    for step in sorted({grown[0] - 2, grown[0], grown[0] + 1, 12}):
        run = tmp_path / f"from-{step}"
        main(fit(config, run, *options, resume=checkpoint_of(tmp_path / "whole", step)))
        assert difference(tmp_path / "whole", run) == 0, step
        assert logged(run) == logged(tmp_path / "whole", step), step
        again = list(csv.DictReader((run / "growth.csv").open()))
        for row, expected in zip(again, csv.DictReader((tmp_path / "whole/growth.csv").open()), strict=True):
            assert row | {"seconds": ""} == expected | {"seconds": ""}
            moved = abs(float(row["loss_after"]) / float(row["loss_before"]) - 1)
            assert moved <= (1e-2 if "bf16" in str(options) else 1e-5)


TWO_DEVICES = ["--trainer.devices=2", "--data.batch_size=2"]
DDP = [*TWO_DEVICES, "--trainer.strategy=ddp"]
FSDP2 = [*TWO_DEVICES, "--trainer.strategy=fsdp2"]
FULL = [
    *TWO_DEVICES,
    "--trainer.strategy.class_path=FSDP2",
    "--trainer.strategy.save_distributed_checkpoint=false",
]
EMA = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9"]
TWO = {
    "ddp": (DDP, {}),
    "ddp, static graph": (
        [*TWO_DEVICES, "--trainer.strategy.class_path=DDPStrategy", "--trainer.strategy.static_graph=true"],
        {"init": "segment_norm"},
    ),
    "ddp, bucket views, EMA, accumulation, bf16-mixed": (
        [
            *TWO_DEVICES,
            "--trainer.strategy.class_path=DDPStrategy",
            "--trainer.strategy.gradient_as_bucket_view=true",
            *EMA,
            "--trainer.accumulate_grad_batches=2",
            "--trainer.precision=bf16-mixed",
        ],
        {},
    ),
    "ddp, only the new": (DDP, {"train": "new"}),
    "fsdp2": (FSDP2, {}),
    "fsdp2, recomputed activations, bf16-mixed": (
        [*FSDP2, "--model.checkpoint_activations=true", "--trainer.precision=bf16-mixed"],
        {"scale": "anneal", "anneal_steps": 4},
    ),
    "fsdp2, bf16-true": ([*FSDP2, "--trainer.precision=bf16-true"], {}),
    "fsdp2, EMA, old ones slowly": ([*FSDP2, *EMA], {"old_lr_scale": 0.3}),
    "fsdp2, only the new": ([*FSDP2, "--model.config.scale=learned"], {"train": "new", "init": "pairs"}),
    "fsdp2, full": (FULL, {}),
    "fsdp2, full, EMA": ([*FULL, *EMA], {}),
    "fsdp2, full, only the new": (FULL, {"train": "new"}),
}


@pytest.fixture(scope="module")
def in_two_processes(corpus, tmp_path_factory):
    """Folder of the runs of every strategy: whole, and resumed from steps 6 and 8; all in one pair of processes."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    commands = []
    for name, (options, growth) in TWO.items():
        (folder / name).mkdir(parents=True)
        config = config_of(folder / name, corpus, **growth)
        whole = folder / name / "whole"
        commands.append(fit(config, whole, *options))
        for step in (6, 8):
            commands.append(fit(config, folder / name / f"from-{step}", *options, resume=checkpoint_of(whole, step)))
    # a run goes on in another strategy
    config = folder / "ddp/tiny.yaml"
    for step in (6, 8):
        for name, options, source in (("ddp-to-fsdp2", FULL, "ddp"), ("fsdp2-to-ddp", DDP, "fsdp2, full")):
            resume = checkpoint_of(folder / source / "whole", step)
            commands.append(fit(config, folder / f"other/{name}-{step}", *options, resume=resume))
    # and one that was grown offline
    main(["grow", str(checkpoint_of(one_process(corpus, folder), 6)), "--factor", "2", "--out", f"{folder}/grown.ckpt"])
    later = config_of(folder, corpus, stages=STAGES[1:])
    commands.append(fit(later, folder / "offline", *FULL, resume=folder / "grown.ckpt"))
    run_in_processes(commands)
    return folder


def one_process(corpus, folder):
    """The run of the config without options, made once."""
    if not (folder / "one").exists():
        (folder / "one-config").mkdir()
        main(fit(config_of(folder / "one-config", corpus), folder / "one"))
    return folder / "one"


@pytest.mark.parametrize("name", TWO)
def test_two_processes_resume_exactly(in_two_processes, name):
    whole = in_two_processes / name / "whole"
    before, after = csv.DictReader((whole / "growth.csv").open())
    assert (before["ffn_before"], after["ffn_after"]) == ("32", "128")
    for step in (6, 8):
        run = in_two_processes / name / f"from-{step}"
        assert difference(whole, run) == 0, step
        assert logged(run) == logged(whole, step), step


def test_strategies_and_numbers_of_processes_agree(in_two_processes, corpus, tmp_path):
    """One process, DDP and FSDP2 train the same model on the same batches, and take over each other's checkpoints."""
    folder = in_two_processes
    one, config = one_process(corpus, folder), folder / "one-config/tiny.yaml"
    for source in ("ddp", "fsdp2, full"):
        for step in (6, 8):
            resume = checkpoint_of(folder / source / "whole", step)
            main(fit(config, folder / f"other/{source}-to-one-{step}", resume=resume))
    runs = [*(folder / "other").iterdir(), *(folder / name / "whole" for name in ("ddp", "fsdp2", "fsdp2, full"))]
    assert len(runs) == 11
    for run in [*runs, folder / "offline"]:
        assert difference(one, run) < 1e-5, run
        losses, expected = dict(rows(run, "train/loss")), dict(rows(one, "train/loss"))
        assert all(losses[step] == pytest.approx(expected[step], rel=1e-6) for step in losses), run

    main(fit(config, tmp_path / "one-EMA", *EMA))
    averaged = folder / "fsdp2, full, EMA/whole"
    assert difference(tmp_path / "one-EMA", averaged) < 1e-5
    both = contents(averaged)
    keys = "model.backbone.blocks.0.ffn.segments.1.keys"
    assert not torch.equal(both[keys], both[f"current.{keys}"])

    to_two = [fit(config, tmp_path / str(i), *o, resume=checkpoint_of(one, 8)) for i, o in enumerate((DDP, FSDP2))]
    run_in_processes(to_two)
    sharded = checkpoint_of(folder / "fsdp2/whole", 8)
    on_one = ["--trainer.strategy=fsdp2", "--trainer.devices=1"]
    run_in_processes([fit(config, tmp_path / "2", *on_one, resume=sharded)], 1)
    for run in ("0", "1", "2"):
        assert difference(one, tmp_path / run) < 1e-5, run


@pytest.mark.parametrize("average", [False, True])
def test_processes_that_differ_are_stopped(corpus, tmp_path, average):
    config = config_of(tmp_path, corpus, init="pairs")
    diverge = [*EMA, "--trainer.callbacks+=tests.integration.kill.Diverge", f"--trainer.callbacks.average={average}"]
    with pytest.raises(AssertionError, match=r"\d tensors differ between the processes, embedding\.weight first"):
        run_in_processes([fit(config, tmp_path / "run", *DDP, *diverge)])


def test_a_hash_sees_what_cancels_and_what_changes_places():
    from lit_modules.strategies import fingerprint

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        one, other = (torch.randn(64, 3, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
        pairs = [torch.cat((x, -x)) for x in (one, other)]
        tensors = [one, other, *pairs, one.flip(0), torch.zeros(64, 3, dtype=dtype), one.new_ones(1)]
        assert len({int(fingerprint(tensor)) for tensor in tensors}) == len(tensors)
        assert fingerprint(one) == fingerprint(one.clone())


class Watch(Callback):
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


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_old_state_is_untouched_to_the_bit(corpus, tmp_path, implementation):
    class Module(LanguageModule):
        def configure_optimizers(self):
            made = super().configure_optimizers()
            for group in made["optimizer"].param_groups:
                group["fused"], group["foreach"] = implementation == "fused", implementation == "foreach"
            return made

    module, data = module_and_data(corpus, tmp_path, Module)
    before, after = Watch(), Watch()
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
            assert before.moments[step + 1][name]["step"] == 1
    groups = module.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(name.endswith(("keys", "values", "embedding.weight")) for name in groups[0]["param_names"])
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_train_new_moves_no_old_bit(corpus, tmp_path):
    module, data = module_and_data(corpus, tmp_path, weight_decay=0.5, lr=1e-2)
    watch = Watch()
    train(module, data, tmp_path, GrowParameterTokens(stages=STAGES, train="new"), watch)
    at_growth, at_end = watch.weights[10], {name: p.detach() for name, p in module.named_parameters()}
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
        main(fit(config, tmp_path / schedule))
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
    many = [{"at_step": step, "factor": 1.5} for step in range(2, 12)]  # more sizes than dynamo's limit of 8
    config = config_of(tmp_path, corpus, stages=many, schedule="continue", trainer={"limit_val_batches": 0})
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, *_):
            seen.append(len(graphs))

    monkeypatch.setattr("tests.integration.kill.Count", Count, raising=False)
    main(
        fit(config, tmp_path / "compiled", "--model.compile=true", "--trainer.callbacks+=tests.integration.kill.Count")
    )
    new = [b - a for a, b in zip([0, *seen], seen, strict=False)]
    assert all(1 <= new[step] <= 2 for step in range(2, 12)), new  # never none: that would be eager, without a word
    assert not any(new[step] for step in (1, 12, 13))
    main(fit(config, tmp_path / "eager"))
    for (_, one), (_, other) in zip(
        *(rows(tmp_path / run, "train/loss") for run in ("compiled", "eager")), strict=True
    ):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_grown_checkpoint_needs_no_knowledge_of_its_schedule(corpus, tmp_path):
    config = config_of(tmp_path, corpus)
    main(fit(config, tmp_path / "run"))
    plain = write_config(tmp_path, corpus)  # no callback, small counts
    checkpoint = str(checkpoint_of(tmp_path / "run", 14))
    module = LanguageModule.load_from_checkpoint(checkpoint)
    assert module.model.num_params() == 57_440
    assert all(p.requires_grad for p in module.parameters())
    losses = {}
    for command, of in (("validate", plain), ("test", config)):
        more = ["--data.test_source", str(corpus[0])] if command == "test" else []
        run = tmp_path / command
        main([command, "--config", str(of), "--run_dir", str(run), "--ckpt_path", checkpoint, *more])
        losses[command] = rows(run, f"{command.replace('validate', 'val')}/loss")[0][1]
    assert losses["validate"] == pytest.approx(rows(tmp_path / "run", "val/loss")[-1][1], rel=0.2)
    text = tmp_path / "text.txt"
    text.write_text("the key grows and the value")
    main(
        [
            "predict",
            "--config",
            str(plain),
            "--run_dir",
            str(tmp_path / "p"),
            "--ckpt_path",
            checkpoint,
            "--data.predict_file",
            str(text),
        ]
    )
    assert len((tmp_path / "p/predictions.csv").read_text().splitlines()) == 1 + len(text.read_text())
    # Trained on without the callback, it stays at its size.
    main(fit(plain, tmp_path / "on", "--trainer.max_steps=16", "--model.optim.schedule=constant", resume=checkpoint))
    assert LanguageModule.load_from_checkpoint(checkpoint_of(tmp_path / "on", 16)).model.num_params() == 57_440


def test_a_resumed_schedule_may_be_extended_but_not_contradict_the_past(corpus, tmp_path):
    go_on = {"schedule": "continue"}
    main(fit(config_of(tmp_path, corpus, stages=STAGES[:1], **go_on), tmp_path / "run"))
    checkpoint = checkpoint_of(tmp_path / "run", 8)
    main(fit(config_of(tmp_path, corpus, **go_on), tmp_path / "extended", resume=checkpoint))
    main(fit(config_of(tmp_path, corpus, **go_on), tmp_path / "whole"))
    assert rows(tmp_path / "extended", "train/flops") == rows(tmp_path / "whole", "train/flops")[8:]
    for stages in (
        [{"at_step": 5, "qkv": 32, "proj": 32, "ffn": 64}, STAGES[1]],  # another past
        [STAGES[0], {"at_step": 7, "factor": 2.0}],  # a new one that should have come before
        [{"at_step": 10, "factor": 2.0}],  # the past is gone
    ):
        run = tmp_path / f"at-{stages[0]['at_step']}-{len(stages)}"
        past = r"contradict the past.*step 8 with 1 of them done(.|\n)*at_step: 6(.|\n)*of this config"
        with pytest.raises(ValueError, match=past) as error:
            main(fit(config_of(tmp_path, corpus, stages=stages, **go_on), run, resume=checkpoint))
        assert str(stages[0]["at_step"]) in str(error.value).partition("of this config")[2]


def test_what_is_trained_and_how_fast_may_change_on_resume(corpus, tmp_path):
    """At the next growth; and the run that changed is resumed exactly, too."""
    main(fit(config_of(tmp_path, corpus, train="new"), tmp_path / "run"))
    changed = config_of(tmp_path, corpus, old_lr_scale=0.5)
    main(fit(changed, tmp_path / "changed", resume=checkpoint_of(tmp_path / "run", 8)))
    main(fit(changed, tmp_path / "again", resume=checkpoint_of(tmp_path / "changed", 12)))
    assert difference(tmp_path / "changed", tmp_path / "again") == 0
    at_growth, end = contents(tmp_path / "changed", 10), contents(tmp_path / "changed")
    assert not torch.equal(at_growth["model.embedding.weight"], end["model.embedding.weight"])
    main(fit(config_of(tmp_path, corpus), tmp_path / "back", resume=checkpoint_of(tmp_path / "changed", 12)))


def test_tokens_are_counted_from_where_a_resumed_run_is(corpus, tmp_path):
    """With half the batch the stage comes later, and the schedule knows; a stage that is done stays done."""
    stages = [{"at_tokens": 768, "factor": 2.0}, {"at_tokens": 1280, "ffn": 100}]
    config = config_of(tmp_path, corpus, stages=stages)
    main(fit(config, tmp_path / "run"))
    main(fit(config, tmp_path / "half", "--data.batch_size=2", resume=checkpoint_of(tmp_path / "run", 8)))
    assert [row["step"] for row in csv.DictReader((tmp_path / "half/growth.csv").open())] == ["6", "12"]
    rates = [rate for _, rate in rows(tmp_path / "half", "train/lr")]
    factor = lr_factor(OptimConfig(warmup_steps=1), 6)
    assert rates == pytest.approx([1e-3 * factor(step) for step in range(2, 6)] + [0.5e-3, 1e-3])
    with pytest.raises(ValueError, match=r"comes at step 19: trainer.max_steps=14"):
        main(fit(config, tmp_path / "late", "--data.batch_size=1", resume=checkpoint_of(tmp_path / "run", 7)))


def test_back_to_a_checkpoint_from_before(corpus, tmp_path):
    """One module object may go from checkpoint to checkpoint, larger and smaller, wide and narrow."""
    for name, growth in (("tokens", {"train": "new"}), ("width", {"stages": [{"at_step": 6, "width": 2}]})):
        baseline = ["--model.config.baseline=width"] if name == "width" else []
        main(fit(config_of(tmp_path, corpus, **growth), tmp_path / name, *baseline))
        module = LanguageModule.load_from_checkpoint(checkpoint_of(tmp_path / name, 14))
        sizes = []
        for step in (4, 14, 6):
            checkpoint = torch.load(checkpoint_of(tmp_path / name, step), weights_only=True)
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
            sizes.append(module.model.num_params())
            assert all(p.requires_grad for p in module.parameters())
        assert sizes[0] == sizes[2] < sizes[1]


def test_growths_that_were_undone_leave_no_row(corpus, tmp_path):
    config, run = config_of(tmp_path, corpus), tmp_path / "run"
    main(fit(config, run))
    for checkpoint in (run / "checkpoints").iterdir():
        if "00000004" not in checkpoint.name:
            checkpoint.unlink()
    main(fit(write_config(tmp_path, corpus), run, "--model.optim.schedule=constant", resume=checkpoint_of(run, 4)))
    assert not (run / "growth.csv").exists()


def test_schedules_of_other_optimizers_are_not_promised(corpus, tmp_path):
    class Module(LanguageModule):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.param_groups(), lr=1e-3)

    for wrong in ({"schedule": "restart"}, {"schedule": "continue", "old_lr_scale": 0.5}):
        module, data = module_and_data(corpus, tmp_path, Module)
        with pytest.raises(ValueError, match="need the module's own optimizer"):
            train(module, data, tmp_path, GrowParameterTokens(stages=STAGES, **wrong))


WRONG = {
    "shrinks": ({"stages": [{"at_step": 6, "ffn": 16}]}, "32 parameter tokens, more than 16: growth only adds"),
    "out of order": ({"stages": [STAGES[1], STAGES[0]]}, "comes at step 6, not after .at_step: 10"),
    "past the end": ({"stages": [{"at_step": 14, "ffn": 64}]}, r"step 14: trainer\.max_steps=14"),
    "tokens past the end": ({"stages": [{"at_tokens": 1e6, "ffn": 64}]}, r"trainer\.max_steps=14"),
    "no moment": ({"stages": [{"ffn": 64}]}, "give one of at_step, at_tokens, on_plateau"),
    "two moments": ({"stages": [{"at_step": 2, "at_tokens": 5, "ffn": 64}]}, "give one of"),
    "no size": ({"stages": [{"at_step": 6}]}, "give a factor, or some of qkv"),
    "two sizes": ({"stages": [{"at_step": 6, "ffn": 64, "factor": 2.0}]}, "give a factor, or some of qkv"),
    "nothing new": ({"stages": [{"at_step": 6, "ffn": 32}]}, "adds no tokens"),
    "no stages": ({"stages": []}, "give at least one"),
    "random, verified": ({"init": "random"}, "init: random .* set verify: false"),
    "current, verified": ({"scale": "current"}, "scale: current .* set verify: false"),
    "zero keys and values": ({"init": "zeros"}, "init"),
    "unknown layer": ({"layers": ["fnn"]}, "'fnn' is none of the model's"),
    "new, divided": ({"train": "new", "init": "split"}, "split divides"),
    "no patience": ({"stages": [{"on_plateau": {"patience": 0}, "factor": 2.0}]}, "patience=0: must be at least 1"),
    "a metric that is not": (
        {"stages": [{"on_plateau": {"monitor": "val/los"}, "factor": 2.0}], "trainer": {"num_sanity_val_steps": 2}},
        "monitor='val/los' is not logged: choose one of .*val/loss",
    ),
    "no validation": (
        {"stages": [{"on_plateau": {}, "factor": 2.0}], "trainer": {"limit_val_batches": 0}},
        "on_plateau needs validations",
    ),
    "annealed for too long": ({"scale": "anneal"}, "anneal_steps=1000 don't fit into steps 6 to 10"),
    "annealed and learned": ({"scale": "anneal", "learned": True}, "choose one"),
    "not a factor": ({"stages": [{"at_step": 6, "factor": ".nan"}]}, "factor"),
    "no room for the warm-up": (
        {"stages": [{"at_step": 1, "factor": 2.0}]},
        "warmup_steps=1 don't fit into steps 0 to 1",
    ),
    "a width": ({"stages": [{"at_step": 6, "width": 2}]}, "grows by parameter tokens"),
}


@pytest.mark.parametrize(("growth", "message"), WRONG.values(), ids=WRONG)
def test_wrong_schedules_fail_before_training(corpus, tmp_path, growth, message, capsys):
    options = ["--model.config.scale=learned"] if "learned" in growth else []
    growth = {key: value for key, value in growth.items() if key != "learned"}
    config = config_of(tmp_path, corpus, **{"stages": STAGES} | growth)
    with pytest.raises((ValueError, SystemExit)) as error:
        main(fit(config, tmp_path / "run", *options))
    assert re.search(message, str(error.value) + capsys.readouterr().err)
    assert not (tmp_path / "run/metrics.csv").exists()


WRONG_MODELS = {
    "softmax": (["--model.config.score_norm=softmax"], "softmax.*not exact"),
    "current tau": (["--model.config.scale=current"], "scale: current"),
    "baseline": (["--model.config.baseline=width"], "baseline does not grow"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_models_that_cannot_grow_so_fail_before_training(corpus, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main(fit(config_of(tmp_path, corpus), tmp_path / "run", *options))


def test_fast_dev_run_ends_before_any_growth(corpus, tmp_path):
    main(fit(config_of(tmp_path, corpus), tmp_path / "run", "--trainer.fast_dev_run=true"))
    assert not (tmp_path / "run/growth.csv").exists()


def test_other_strategies_are_refused(corpus, tmp_path):
    strategy = ["--trainer.strategy.class_path=ModelParallelStrategy", "--trainer.devices=1"]
    with pytest.raises(ValueError, match="ModelParallelStrategy: a model grows on one device, in ddp, and in"):
        main(fit(config_of(tmp_path, corpus), tmp_path / "run", *strategy))


def test_growth_that_moves_the_loss_stops_the_run(corpus, tmp_path, monkeypatch):
    import tokenformer.growth

    exact = tokenformer.growth.append_tokens

    def spoiled(layer, *args):
        exact(layer, *args)
        if not layer.tau.is_meta:
            layer.segments[-1].keys.data.normal_()

    monkeypatch.setattr(tokenformer.growth, "append_tokens", spoiled)
    with pytest.raises(RuntimeError, match="verify: growth moved the loss of a batch by .* is allowed in 32-true"):
        main(fit(config_of(tmp_path, corpus), tmp_path / "run"))
    assert checkpoint_of(tmp_path / "run", 6).exists()
    main(fit(config_of(tmp_path, corpus, verify=False), tmp_path / "unverified"))
    (row, _) = csv.DictReader((tmp_path / "unverified/growth.csv").open())
    assert float(row["loss_after"]) != float(row["loss_before"])


def test_growth_is_logged(corpus, tmp_path, caplog):
    main(fit(config_of(tmp_path, corpus), tmp_path / "run"))
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


@pytest.mark.parametrize("options", [[], ["--trainer.callbacks=EMA"]], ids=["plain", "EMA"])
def test_grown_offline_and_trained_on_equals_grown_mid_run(corpus, tmp_path, options):
    """tokenformer grow: the same bits afterwards, optimizer, data and costs included."""
    whole = ["--trainer.callbacks+=EMA"] if options else []
    main(fit(config_of(tmp_path, corpus, stages=STAGES[:1], schedule="continue"), tmp_path / "whole", *whole))
    checkpoint, grown = checkpoint_of(tmp_path / "whole", 6), tmp_path / "grown.ckpt"
    sizes = ["--qkv", "32", "--proj", "32", "--ffn", "64"]
    main(["grow", str(checkpoint), *sizes, "--out", str(grown)])
    plain = config_of(tmp_path, corpus)
    config = yaml.safe_load(plain.read_text())
    del config["trainer"]["callbacks"]
    plain.write_text(yaml.safe_dump(config))
    main(fit(plain, tmp_path / "on", *options, resume=grown))
    assert difference(tmp_path / "whole", tmp_path / "on") == 0
    assert logged(tmp_path / "on") == logged(tmp_path / "whole", 6)
    with pytest.raises(ValueError, match="exists: choose another"):
        main(["grow", str(checkpoint), *sizes, "--out", str(grown)])


def test_an_exported_model_grows(tmp_path, capsys):
    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(**TINY["model"]["init_args"]["config"], vocab_size=257, scale="learned"))
    save_model(model, tmp_path / "small.safetensors")
    small, out = str(tmp_path / "small.safetensors"), str(tmp_path / "big/grown.safetensors")
    main(["grow", small, "--factor", "2", "--layers", "ffn", "--init", "segment_norm", "--out", out])
    assert "moved by 0.0e+00" in capsys.readouterr().out
    grown = load_model(out)
    ids = torch.randint(0, 257, (2, 16))
    assert torch.equal(grown(ids), model(ids))
    assert grown.backbone.blocks[0].ffn.num_tokens == 64
    for arguments, message in (
        ([small, "--factor", "2", "--out", str(tmp_path / "x.ckpt")], r"must end in \.safetensors"),
        ([str(tmp_path / "none.ckpt"), "--factor", "2", "--out", str(tmp_path / "x.ckpt")], "no such file"),
        ([small, "--ffn", "8", "--out", str(tmp_path / "x.safetensors")], "growth only adds"),
        ([small, "--out", str(tmp_path / "x.safetensors")], "give a factor, or some of"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["grow", *arguments])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed scales losses on a GPU only; there is none here")
def test_growth_in_16_mixed(corpus, tmp_path):
    config = config_of(tmp_path, corpus, trainer={"accelerator": "gpu"})
    main(fit(config, tmp_path / "run", "--trainer.precision=16-mixed"))
    assert len(list(csv.DictReader((tmp_path / "run/growth.csv").open()))) == 2
    assert Path(checkpoint_of(tmp_path / "run", 14)).exists()
