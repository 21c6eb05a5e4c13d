"""A run that grows and is interrupted ends as one that was not; in two processes, in and between strategies."""

import csv

import pytest
import torch

from lit_modules.cli import main
from tests.integration.growing import MUON, STAGES, checkpoint_of, config_of, contents, difference, fit, logged, saving
from tests.integration.processes import run_in_processes
from tests.integration.tiny import rows

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


THREE = ("ddp", "fsdp2", "fsdp2, full")  # whose checkpoints the others go on from


def resumed_from(name):
    """After the first growth and before the second; of those without further options also at the first."""
    return (6, 8) if name in THREE else (8,)


@pytest.fixture(scope="module")
def in_two_processes(corpus, tmp_path_factory):
    """Folder of the runs of every strategy: whole, and resumed; all in one pair of processes."""
    folder = tmp_path_factory.mktemp("two") / "runs"
    commands = []
    for name, (options, growth) in TWO.items():
        (folder / name).mkdir(parents=True)
        config = config_of(folder / name, corpus, **growth)
        whole = folder / name / "whole"
        commands.append(fit(config, whole, *options, *saving(every=2 if name in THREE else 8)))
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
    main(fit(config_of(folder, corpus, init="zero_keys"), folder / "zero-keys", *saving(every=14), resume=resume))
    main(["grow", str(resume), "--init", "zero_keys", "--factor", "2", "--out", f"{folder}/grown.ckpt"])
    later = config_of(folder, corpus, stages=STAGES[1:], init="zero_keys")
    commands.append(fit(later, folder / "offline", *FULL, *saving(every=14), resume=folder / "grown.ckpt"))
    run_in_processes(commands)
    return folder


def one_process(corpus, folder):
    """The run of the config without options, made once."""
    if not (folder / "one").exists():
        (folder / "one-config").mkdir()
        main(fit(config_of(folder / "one-config", corpus), folder / "one", *saving(every=2)))
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
            main(fit(config, folder / f"other/{source}-to-one-{step}", *saving(every=14), resume=resume))
    runs = [*(folder / "other").iterdir(), *(folder / name / "whole" for name in THREE)]
    assert len(runs) == 11
    for whole, run in [*((one, run) for run in runs), (folder / "zero-keys", folder / "offline")]:
        assert difference(whole, run) < 1e-5, run
        losses, expected = dict(rows(run, "train/loss")), dict(rows(whole, "train/loss"))
        assert all(losses[step] == pytest.approx(expected[step], rel=1e-6) for step in losses), run

    new = config_of(tmp_path, corpus, train="new")
    main(fit(new, tmp_path / "one-Muon", *SHALLOW, *MUON, *DOUBLE, *saving(every=14)))
    assert difference(tmp_path / "one-Muon", folder / "ddp, Muon, only the new/whole") < 1e-12

    main(fit(config, tmp_path / "one-EMA", *EMA, *saving(every=14)))
    averaged = folder / "fsdp2, full, EMA/whole"
    assert difference(tmp_path / "one-EMA", averaged) < 1e-5
    both = contents(averaged)
    keys = "model.backbone.blocks.0.ffn.segments.1.keys"
    assert not torch.equal(both[keys], both[f"current.{keys}"])

    end, resume = saving(every=14), checkpoint_of(one, 8)
    run_in_processes([fit(config, tmp_path / str(i), *o, *end, resume=resume) for i, o in enumerate((DDP, FSDP2))])
    sharded = checkpoint_of(folder / "fsdp2/whole", 8)
    on_one = ["--trainer.strategy=fsdp2", "--trainer.devices=1"]
    run_in_processes([fit(config, tmp_path / "2", *on_one, *end, resume=sharded)], 1)
    for run in ("0", "1", "2"):
        assert difference(one, tmp_path / run) < 1e-5, run


def test_scores_are_matched_to_those_of_all_processes(in_two_processes, corpus, tmp_path):
    config = config_of(tmp_path, corpus, train="new", init="anchored")
    main(fit(config, tmp_path / "one", *SHALLOW, *saving(every=14)))
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
    main(fit(config, second, *singly, *saving(every=8), resume=checkpoint_of(folder / "ddp/whole", 2)))
    singly[1] = "--trainer.accumulate_grad_batches=2"
    run_in_processes([fit(config, third, *FULL, *singly, *saving(every=2), resume=checkpoint_of(second, 8))])
    main(fit(config, fourth, *saving(every=14), resume=checkpoint_of(third, 12)))
    assert difference(one, fourth) < 1e-5
    assert [row["step"] for row in csv.DictReader((fourth / "growth.csv").open())] == ["6", "10"]
    assert dict(rows(fourth, "train/loss")) == pytest.approx(dict(rows(one, "train/loss")[6:]), rel=1e-6)


@pytest.mark.parametrize("average", [False, True])
def test_processes_that_differ_are_stopped(corpus, tmp_path, average):
    config = config_of(tmp_path, corpus, init="pairs")
    diverge = [*EMA, "--trainer.callbacks+=tests.integration.kill.Diverge", f"--trainer.callbacks.average={average}"]
    with pytest.raises(AssertionError, match=r"\d tensors differ between the processes, embedding\.weight first"):
        run_in_processes([fit(config, tmp_path / "run", *DDP, *diverge)])
