"""A run that grows and is interrupted ends as one that was not; on one device, in two processes, in any strategy.

One file: the tests share the runs that are not interrupted, which takes seconds to make.
"""

import csv

import pytest
import torch
import yaml

from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.schedule import lr_factor
from tests.integration.growing import STAGES, checkpoint_of, config_of, contents, difference, fit, logged, saving
from tests.integration.processes import run_in_processes
from tests.integration.tiny import rows, write_config

MUON = ["--model.optim.name=muon", "--model.optim.lr_adamw=2e-3"]

# (options of the command line, arguments of the callback)
VARIANTS = {
    "plain": ([], {}),
    "random values come from nowhere else": (["--model.config.init=scaled"], {"init": "anchored"}),
    "EMA, accumulation, bf16-mixed": (
        [
            "--trainer.callbacks+=EMA",
            "--trainer.callbacks.decay=0.9",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.precision=bf16-mixed",
        ],
        {"init": "split"},
    ),
    "Muon, bf16-true": ([*MUON, "--trainer.precision=bf16-true"], {}),
    "annealed tau": ([], {"scale": "anneal", "anneal_steps": 4, "schedule": "continue"}),
    "learned tau from growth on": ([], {"scale": "learned", "init": "pairs"}),
    "Muon, only the new": (MUON, {"train": "new"}),
    "Muon, EMA, old ones slowly": (
        [*MUON, "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9"],
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
    """From exactly at and right after the first growth; without options from before it and after the second, too."""
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
    before_and_after = () if options or growth else (grown[0] - 2, 12)
    for step in (grown[0], grown[0] + 1, *before_and_after):
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
SHALLOW = ["--model.config.depth=1"]  # where one block shows as much as two
DOUBLE = ["--trainer.precision=64-true"]  # Muon rounds to 16 bits: the last bits of a sum must not matter
SAMPLE = ["--trainer.callbacks+=SampleText", "--trainer.callbacks.max_new_tokens=4"]
TWO = {
    "ddp": (DDP, {}),
    "ddp, static graph, bf16-true": (
        [
            *TWO_DEVICES,
            "--trainer.strategy.class_path=DDPStrategy",
            "--trainer.strategy.static_graph=true",
            "--trainer.precision=bf16-true",
            *SHALLOW,
        ],
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
            *SHALLOW,
        ],
        {},
    ),
    "ddp, only the new": ([*DDP, *SHALLOW], {"train": "new", "init": "anchored"}),
    "fsdp2": (FSDP2, {}),
    "fsdp2, recomputed activations, bf16-mixed": (
        [*FSDP2, *SHALLOW, "--model.checkpoint_activations=true", "--trainer.precision=bf16-mixed"],
        {"scale": "anneal", "anneal_steps": 4},
    ),
    "fsdp2, bf16-true": ([*FSDP2, *SHALLOW, *SAMPLE, "--trainer.precision=bf16-true"], {}),
    "fsdp2, EMA, old ones slowly": ([*FSDP2, *SHALLOW, *EMA], {"old_lr_scale": 0.3}),
    "fsdp2, EMA, only the new": (
        [*FSDP2, *SHALLOW, *EMA, "--model.config.scale=learned"],
        {"train": "new", "init": "pairs"},
    ),
    "ddp, Muon, only the new": ([*DDP, *SHALLOW, *MUON, *DOUBLE], {"train": "new"}),
    "fsdp2, Muon, only the new": ([*FSDP2, *SHALLOW, *MUON], {"train": "new"}),
    "fsdp2, full": (FULL, {}),
    "fsdp2, full, EMA": ([*FULL, *EMA], {}),
    "fsdp2, full, only the new": ([*FULL, *SHALLOW], {"train": "new", "init": "anchored"}),
}


def resumed_from(name):
    """After the first growth and before the second; of those without further options also at the first."""
    return (6, 8) if name in ("ddp", "fsdp2", "fsdp2, full") else (8,)


@pytest.fixture(scope="module")
def in_two_processes(corpus, tmp_path_factory):
    """Folder of the runs of every strategy: whole, and resumed; all in one pair of processes."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    commands = []
    for name, (options, growth) in TWO.items():
        (folder / name).mkdir(parents=True)
        config = config_of(folder / name, corpus, trainer={"limit_val_batches": 2}, **growth)
        whole = folder / name / "whole"
        commands.append(fit(config, whole, *options, *saving(every=2)))
        for step in resumed_from(name):
            run, resume = folder / name / f"from-{step}", checkpoint_of(whole, step)
            commands.append(fit(config, run, *options, *saving(every=14), resume=resume))
    # a run goes on in another strategy
    config = folder / "ddp/tiny.yaml"
    for step in (6, 8):
        for name, options, source in (("ddp-to-fsdp2", FULL, "ddp"), ("fsdp2-to-ddp", DDP, "fsdp2, full")):
            resume = checkpoint_of(folder / source / "whole", step)
            commands.append(fit(config, folder / f"other/{name}-{step}", *options, *saving(every=14), resume=resume))
    # and one that was grown offline, which has no batch to match keys to
    resume = checkpoint_of(one_process(corpus, folder), 6)
    main(fit(config_of(folder, corpus, init="zero_keys"), folder / "zero-keys", resume=resume))
    main(["grow", str(resume), "--init", "zero_keys", "--factor", "2", "--out", f"{folder}/grown.ckpt"])
    later = config_of(folder, corpus, stages=STAGES[1:], init="zero_keys")
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
    for step in resumed_from(name):
        run = in_two_processes / name / f"from-{step}"
        assert difference(whole, run) == 0, step
        assert logged(run) == logged(whole, step), step


def test_sharded_weights_write_a_text(in_two_processes):
    """Each process has a part of the weights, so all must take part, or they would wait for ever."""
    texts = {(run / "sample.txt").read_text() for run in (in_two_processes / "fsdp2, bf16-true").glob("*/")}
    assert len(texts) == 1
    assert len(texts.pop()) > len("def ")


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
    for whole, run in [*((one, run) for run in runs), (folder / "zero-keys", folder / "offline")]:
        assert difference(whole, run) < 1e-5, run
        losses, expected = dict(rows(run, "train/loss")), dict(rows(whole, "train/loss"))
        assert all(losses[step] == pytest.approx(expected[step], rel=1e-6) for step in losses), run

    main(fit(config_of(tmp_path, corpus, train="new"), tmp_path / "one-Muon", *SHALLOW, *MUON, *DOUBLE))
    assert difference(tmp_path / "one-Muon", folder / "ddp, Muon, only the new/whole") < 1e-12

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


def test_scores_are_matched_to_those_of_all_processes(in_two_processes, corpus, tmp_path):
    config = config_of(tmp_path, corpus, train="new", init="anchored")
    main(fit(config, tmp_path / "one", *SHALLOW))
    two = [in_two_processes / name / "whole" for name in ("ddp, only the new", "fsdp2, full, only the new")]
    stds = []
    for run in (tmp_path / "one", *two):
        assert difference(tmp_path / "one", run) < 1e-5
        stds.append([growth["key_stds"] for growth in torch.load(checkpoint_of(run, 14), weights_only=True)["growths"]])
    assert stds[0] == stds[1] == stds[2]
    assert len(stds[0][0]) == 5


def test_a_chain_of_strategies_ends_as_one_process(in_two_processes, corpus, tmp_path):
    """DDP to step 2, one process to 8, FSDP2 to 12, one process to 14: it grows in the second and in the third.

    A step has 1, 4, 2 and 1 batches; it is changed where it would end in the middle of an accumulation. Keys would be
    matched to the first of them.
    """
    folder, second, third, fourth = in_two_processes, *(tmp_path / name for name in ("second", "third", "fourth"))
    one, config = folder / "zero-keys", config_of(tmp_path, corpus, init="zero_keys")
    singly = ["--data.batch_size=1", "--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=16"]
    main(fit(config, second, *singly, resume=checkpoint_of(folder / "ddp/whole", 2)))
    singly[1] = "--trainer.accumulate_grad_batches=2"
    run_in_processes([fit(config, third, *FULL, *singly, *saving(every=2), resume=checkpoint_of(second, 8))])
    main(fit(config, fourth, resume=checkpoint_of(third, 12)))
    assert difference(one, fourth) < 1e-5
    assert [row["step"] for row in csv.DictReader((fourth / "growth.csv").open())] == ["6", "10"]
    assert dict(rows(fourth, "train/loss")) == pytest.approx(dict(rows(one, "train/loss")[6:]), rel=1e-6)


@pytest.mark.parametrize("average", [False, True])
def test_processes_that_differ_are_stopped(corpus, tmp_path, average):
    config = config_of(tmp_path, corpus, init="pairs")
    diverge = [*EMA, "--trainer.callbacks+=tests.integration.kill.Diverge", f"--trainer.callbacks.average={average}"]
    with pytest.raises(AssertionError, match=r"\d tensors differ between the processes, embedding\.weight first"):
        run_in_processes([fit(config, tmp_path / "run", *DDP, *diverge)])


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
    with pytest.raises(ValueError, match="comes at step 19, the run has 14 steps"):
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


@pytest.mark.parametrize("options", [[], ["--trainer.callbacks=EMA"]], ids=["plain", "EMA"])
def test_grown_offline_and_trained_on_equals_grown_mid_run(corpus, tmp_path, options):
    """tokenformer grow: the same bits afterwards, optimizer, data and costs included."""
    whole = ["--trainer.callbacks+=EMA"] if options else []
    config = config_of(tmp_path, corpus, stages=STAGES[:1], schedule="continue", init="zero_keys")
    main(fit(config, tmp_path / "whole", *whole))
    checkpoint, grown = checkpoint_of(tmp_path / "whole", 6), tmp_path / "grown.ckpt"
    sizes = ["--qkv", "32", "--proj", "32", "--ffn", "64"]
    main(["grow", str(checkpoint), *sizes, "--init", "zero_keys", "--out", str(grown)])
    plain = config_of(tmp_path, corpus)
    config = yaml.safe_load(plain.read_text())
    del config["trainer"]["callbacks"]
    plain.write_text(yaml.safe_dump(config))
    main(fit(plain, tmp_path / "on", *options, resume=grown))
    assert difference(tmp_path / "whole", tmp_path / "on") == 0
    assert logged(tmp_path / "on") == logged(tmp_path / "whole", 6)
    with pytest.raises(ValueError, match="exists: choose another"):
        main(["grow", str(checkpoint), *sizes, "--out", str(grown)])
