"""A run that grows and is interrupted ends as one that was not; on one device."""

import csv

import pytest
import torch
import yaml

from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.schedule import lr_factor
from tests.integration.growing import MUON, STAGES, checkpoint_of, config_of, contents, difference, fit, logged, saving
from tests.integration.tiny import rows, write_config

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
    main(fit(config, tmp_path / "whole", *options, "--best.save_top_k=0"))
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
        main(fit(config, run, *options, *saving(every=14), resume=checkpoint_of(tmp_path / "whole", step)))
        assert difference(tmp_path / "whole", run) == 0, step
        assert logged(run) == logged(tmp_path / "whole", step), step
        again = list(csv.DictReader((run / "growth.csv").open()))
        for row, expected in zip(again, csv.DictReader((tmp_path / "whole/growth.csv").open()), strict=True):
            assert row | {"seconds": ""} == expected | {"seconds": ""}
            moved = abs(float(row["loss_after"]) / float(row["loss_before"]) - 1)
            assert moved <= (1e-2 if "bf16" in str(options) else 1e-5)


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
    main(fit(config_of(tmp_path, corpus, stages=STAGES[:1], **go_on), tmp_path / "run", *saving(every=8)))
    checkpoint = checkpoint_of(tmp_path / "run", 8)
    whole = config_of(tmp_path, corpus, **go_on)
    main(fit(whole, tmp_path / "extended", *saving(every=14), resume=checkpoint))
    main(fit(whole, tmp_path / "whole", *saving(every=14)))
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
    main(fit(config_of(tmp_path, corpus, train="new"), tmp_path / "run", *saving(every=8)))
    changed = config_of(tmp_path, corpus, old_lr_scale=0.5)
    main(fit(changed, tmp_path / "changed", *saving(every=2), resume=checkpoint_of(tmp_path / "run", 8)))
    main(fit(changed, tmp_path / "again", *saving(every=14), resume=checkpoint_of(tmp_path / "changed", 12)))
    assert difference(tmp_path / "changed", tmp_path / "again") == 0
    at_growth, end = contents(tmp_path / "changed", 10), contents(tmp_path / "changed")
    assert not torch.equal(at_growth["model.embedding.weight"], end["model.embedding.weight"])
    back = config_of(tmp_path, corpus)
    main(fit(back, tmp_path / "back", *saving(every=14), resume=checkpoint_of(tmp_path / "changed", 12)))


def test_tokens_are_counted_from_where_a_resumed_run_is(corpus, tmp_path):
    """With half the batch the stage comes later, and the schedule knows; a stage that is done stays done."""
    stages = [{"at_tokens": 768, "factor": 2.0}, {"at_tokens": 1280, "ffn": 100}]
    config = config_of(tmp_path, corpus, stages=stages)
    main(fit(config, tmp_path / "run"))
    half = ["--data.batch_size=2", *saving(every=14)]
    main(fit(config, tmp_path / "half", *half, resume=checkpoint_of(tmp_path / "run", 8)))
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
        main(fit(config_of(tmp_path, corpus, **growth), tmp_path / name, *baseline, *saving(every=2)))
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
    main(fit(config, run, *saving(every=4)))
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
    main(fit(config, tmp_path / "whole", *whole, *saving(every=2)))
    checkpoint, grown = checkpoint_of(tmp_path / "whole", 6), tmp_path / "grown.ckpt"
    sizes = ["--qkv", "32", "--proj", "32", "--ffn", "64"]
    main(["grow", str(checkpoint), *sizes, "--init", "zero_keys", "--out", str(grown)])
    plain = config_of(tmp_path, corpus)
    config = yaml.safe_load(plain.read_text())
    del config["trainer"]["callbacks"]
    plain.write_text(yaml.safe_dump(config))
    main(fit(plain, tmp_path / "on", *options, *saving(every=14), resume=grown))
    assert difference(tmp_path / "whole", tmp_path / "on") == 0
    assert logged(tmp_path / "on") == logged(tmp_path / "whole", 6)
    with pytest.raises(ValueError, match="exists: choose another"):
        main(["grow", str(checkpoint), *sizes, "--out", str(grown)])
