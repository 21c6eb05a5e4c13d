"""A Transformer baseline in whose run updates of low rank come: they alone are trained, and it resumes to the bit."""

import csv

import pytest
import torch

from lit_modules.cli import main
from lit_modules.modules.loading import load_model
from tests.integration.growing import checkpoint_of, config_of, contents, difference, fit, logged, saving
from tests.integration.processes import run_in_processes
from tokenformer import from_pretrained
from tokenformer.interop import load_trained

STAGES = [{"at_step": 3, "lora": 3}, {"at_step": 6, "lora": 2}]
OPTIONS = ["--model.config.baseline=width", "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5"]
IDS = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_alone_are_trained_and_a_run_resumes(corpus, tmp_path, optimizer):
    options = [*OPTIONS, f"--model.optim.name={optimizer}", "--trainer.limit_val_batches=0"]
    growth = {"stages": STAGES, "train": "new", "schedule": "continue"}
    config = config_of(tmp_path, corpus, trainer={"max_steps": 8}, **growth)
    main(fit(config, tmp_path / "run", *options))
    rows = list(csv.DictReader((tmp_path / "run/growth.csv").open()))
    assert [row["lora"] for row in rows] == ["3", "2"]
    assert all(row["loss_before"] == row["loss_after"] for row in rows)
    steps = {step: contents(tmp_path / "run", step) for step in (3, 6, 8)}
    frozen = [name for name in steps[3] if name.startswith("current.model.")]
    assert all(torch.equal(steps[3][name], steps[8][name]) for name in frozen)
    for name in (name for name in steps[6] if ".lora.0." in name and name.startswith("current.")):
        assert torch.equal(steps[6][name], steps[8][name])
        assert steps[8][name.replace(".lora.0.", ".lora.1.")].any()
        assert steps[8][name].any()
    for step in (4, 7):
        resumed = tmp_path / f"from-{step}"
        main(fit(config, resumed, *options, resume=checkpoint_of(tmp_path / "run", step)))
        assert difference(tmp_path / "run", resumed, 8) == 0
        assert logged(resumed) == logged(tmp_path / "run", step)


def test_two_processes_equal_one_and_resume(corpus, tmp_path):
    config = config_of(tmp_path, corpus, STAGES, {"max_steps": 8}, train="new", schedule="continue")
    options = [*OPTIONS, "--trainer.precision=64-true", "--trainer.limit_val_batches=0"]
    options += saving(every=4)
    main(fit(config, tmp_path / "one", *options, "--data.batch_size=4"))
    options += ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]
    run, resumed = tmp_path / "two", tmp_path / "from-4"
    run_in_processes([fit(config, run, *options), fit(config, resumed, *options, resume=checkpoint_of(run, 4))])
    assert difference(tmp_path / "one", run, 8) < 1e-9
    assert difference(run, resumed, 8) == 0


def test_a_resumed_run_may_train_all_of_it(corpus, tmp_path):
    growth = {"train": "new", "schedule": "continue"}
    options = [*OPTIONS[:1], "--trainer.limit_val_batches=0"]
    main(fit(config_of(tmp_path, corpus, STAGES[:1], {"max_steps": 4}, **growth), tmp_path / "run", *options))
    config = config_of(tmp_path, corpus, STAGES, {"max_steps": 8}, **growth | {"train": "all"})
    main(fit(config, tmp_path / "more", *options, resume=checkpoint_of(tmp_path / "run", 4)))
    before, after = (contents(tmp_path / run, step) for run, step in (("run", 4), ("more", 8)))
    assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("model."))


def test_export_and_a_new_start_have_them_merged(corpus, tmp_path):
    config = config_of(tmp_path, corpus, STAGES[:1], {"max_steps": 5}, train="new", schedule="continue")
    main(fit(config, tmp_path / "run", *OPTIONS))
    last = checkpoint_of(tmp_path / "run", 5)
    main(["export", str(last), "--out", str(tmp_path / "model")])
    assert "LoRA of rank 3, merged" in (tmp_path / "model/README.md").read_text()
    expected = load_model(last)(IDS)
    for words in (["of", "wiki"], ["0"], ["first", "1"]):
        with pytest.raises(ValueError, match=f"--segments {' '.join(words)}: .* is a baseline, which has no segments"):
            main(["generate", str(last), "--prompt", "a", "--segments", *words])
    torch.testing.assert_close(from_pretrained(tmp_path / "model")(IDS), expected)
    torch.testing.assert_close(load_trained(last)(IDS), expected)
    start = [*OPTIONS, f"--model.init_from={last}", "--trainer.callbacks=[]", "--trainer.max_steps=1"]
    main(fit(config, tmp_path / "more", *start, "--model.optim.lr=1e-9", "--model.optim.warmup_steps=0"))
    torch.testing.assert_close(load_model(checkpoint_of(tmp_path / "more", 1))(IDS), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ({"lora": 0}, OPTIONS, "lora=0: the rank must be at least 1"),
        (
            {"lora": 2, "width": 2},
            OPTIONS,
            "give a factor, or some .* .for a baseline: width or lora",
        ),
        ({"lora": 2}, [*OPTIONS[:1], "--trainer.callbacks.layers=[ffn]"], "layers=.'ffn'.: LoRA goes beside all"),
        ({"lora": 2}, [], "stage 1 .*lora: the model is no Transformer baseline"),
        ({"lora": 2}, [*OPTIONS, "--trainer.strategy=FSDP2"], "width, lora: a baseline can't grow in FSDP2; use ddp"),
    ],
)
def test_what_can_not_be_is_refused(corpus, tmp_path, stage, options, message):
    config = config_of(tmp_path, corpus, [{"at_step": 3} | stage])
    with pytest.raises(ValueError, match=message):
        main(fit(config, tmp_path / "run", *options))
