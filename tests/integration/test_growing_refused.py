"""Growths that can't be done are refused before training."""

import re

import pytest

from lit_modules.cli import main
from tests.integration.growing import STAGES, config_of, fit

WRONG = {
    "shrinks": ({"stages": [{"at_step": 6, "ffn": 16}]}, "32 parameter tokens, more than 16: growth only adds"),
    "out of order": ({"stages": [STAGES[1], STAGES[0]]}, "comes at step 6, not after .at_step: 10"),
    "past the end": ({"stages": [{"at_step": 14, "ffn": 64}]}, "step 14, the run has 14 steps"),
    "tokens past the end": ({"stages": [{"at_tokens": 1e6, "ffn": 64}]}, "the run has 14 steps"),
    "no moment": ({"stages": [{"ffn": 64}]}, "give one of at_step, at_phase, at_tokens"),
    "two moments": ({"stages": [{"at_step": 2, "at_tokens": 5, "ffn": 64}]}, "give one of"),
    "no size": ({"stages": [{"at_step": 6}]}, "give a factor, or some of qkv"),
    "two sizes": ({"stages": [{"at_step": 6, "ffn": 64, "factor": 2.0}]}, "give a factor, or some of qkv"),
    "nothing new": ({"stages": [{"at_step": 6, "ffn": 32}]}, "adds no tokens"),
    "no stages": ({"stages": []}, "give at least one"),
    "random, verified": ({"init": "random"}, "init: random .* set verify: false"),
    "current, verified": ({"init": "zero_keys", "scale": "current"}, "scale: current .* set verify: false"),
    "zero keys and values": ({"init": "zeros"}, "init"),
    "unknown layer": ({"layers": ["fnn"]}, "'fnn' is none of the model's"),
    "nothing new trained": ({"train": "head"}, r"train='head': choose all, new, or new and .*: \[new, head\]"),
    "a name that is not": ({"train": ["new", "haed"]}, "train='haed': no parameter has such a name"),
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


ZERO_KEYS = ["--trainer.callbacks.init=zero_keys"]
WRONG_MODELS = {
    "softmax": (["--model.config.score_norm=softmax"], "init: anchored needs .* has softmax: choose segment_norm"),
    "softmax, zero keys": (["--model.config.score_norm=softmax", *ZERO_KEYS], "softmax.*not exact"),
    "current tau, zero keys": (["--model.config.scale=current", *ZERO_KEYS], "scale: current"),
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
