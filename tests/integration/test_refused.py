"""What can't work is refused before the training, in a line that names the setting and the remedy."""

import re
import subprocess
import sys

import pytest

from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from tests.conftest import ROOT
from tests.integration.tiny import write_config

RECOMPUTE = ["--model.recompute_scores=true"]
BAD = [
    (["--data.source", "no/such.txt"], ValueError, "no such file"),
    (
        ["--data.seq_len", "100000", "--model.config.max_seq_len=100000"],
        ValueError,
        "data.seq_len=100000 needs at least 100001",
    ),
    (["--model.config.num_heads", "5"], ValueError, "num_heads=5 does not divide dim=32: the nearest that does is 4"),
    (["--model.config.rotary_fraction", "0.2"], ValueError, "rotary_fraction=0.2 of head_dim=16.*even number"),
    (["--model.optim.warmup_steps", "8"], ValueError, "optim.warmup_steps=8 don't fit into trainer.max_steps=8"),
    (["--model.config.vocab_size", "100"], ValueError, "vocab_size=100, but the data has 257: leave it out"),
    (["--data.seq_len", "64", "--model.config.max_seq_len", "32"], ValueError, "data.seq_len=64 is longer than"),
    (["--model.optim.lr", "0"], ValueError, "optim.lr=0"),
    ([*RECOMPUTE, "--model.checkpoint_activations=true"], ValueError, "model.checkpoint_activations=true.*choose one"),
    ([*RECOMPUTE, "--model.config.baseline=width"], ValueError, "config.baseline='width' has no scores"),
    ([*RECOMPUTE, "--model.config.score_norm=softmax"], ValueError, "config.score_norm=l2_norm_gelu, not softmax"),
    (["--trainer.callbacks=EMA", "--trainer.precision=bf16-true"], ValueError, "use bf16-mixed"),
    (
        ["--trainer.max_steps=-1", "--trainer.max_time=00:01:00:00"],
        ValueError,
        "trainer.max_steps=-1: optim.schedule=cosine",
    ),
    (["--ckpt_path", "nowhere.ckpt"], ValueError, "ckpt_path=nowhere.ckpt: no such file"),
    (["--ckpt_path", "last"], ValueError, "there is no valid checkpoint in"),
    (["--model.optim.lrr", "1"], SystemExit, "'model.optim.lrr' of LanguageModule: did you mean 'model.optim.lr'"),
    (["--data.sed_len", "1"], SystemExit, "'data.sed_len' of TextDataModule: did you mean 'data.seq_len'"),
    (["--trainer.max_step", "1"], SystemExit, "unknown key 'trainer.max_step': did you mean 'trainer.max_steps'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[" ".join(options) for options, _, _ in BAD])
def test_bad_input_is_refused_before_training(corpus, tmp_path, monkeypatch, capsys, options, error, message):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, corpus)
    with pytest.raises(error) as caught:
        main(["fit", "--config", str(config), *options])
    chain, texts = caught.value, [capsys.readouterr().err]
    while chain is not None:
        texts.append(str(chain))
        chain = chain.__cause__
    assert re.search(message, "\n".join(texts))
    assert not list(tmp_path.glob("**/*.ckpt"))


GROWTH = "{class_path: GrowParameterTokens, init_args: {stages: [{at_step: %s, factor: 2.0}]}}"
BEFORE_DATA = [
    (["--trainer.gradient_clip_algorithm=value"], "trainer.gradient_clip_algorithm=value: only 'norm' is supported"),
    (["--trainer.callbacks", f"[{GROWTH % 4},{GROWTH % 4}]"], "has GrowParameterTokens twice, .* with all stages"),
    (["--trainer.callbacks", "[EMA,EMA]"], "has EMA twice, .*give it once"),
    (["--trainer.callbacks", f"[{GROWTH % 9}]"], "comes at step 9, the run has 8 steps"),
    (["--trainer.callbacks", f"[{GROWTH % 1}]"], "warmup_steps=2 don't fit into steps 0 to 1"),
    (["--trainer.callbacks", f"[{GROWTH % 4}]", "--model.config.score_norm=softmax"], "softmax"),
    (["--trainer.callbacks=EMA", "--trainer.precision=bf16-true"], "use bf16-mixed"),
    (["--trainer.val_check_interval=3", "--trainer.accumulate_grad_batches=2"], "in the middle of a step"),
    (["--model.optim.warmup_steps=8"], "optim.warmup_steps=8 don't fit into trainer.max_steps=8"),
    (["--data.seq_len=64", "--model.config.max_seq_len=32"], "data.seq_len=64 is longer than"),
]


@pytest.mark.parametrize(("options", "message"), BEFORE_DATA, ids=[message for _, message in BEFORE_DATA])
def test_settings_are_refused_before_data_is_touched(corpus, tmp_path, monkeypatch, options, message):
    def touched(self):
        raise AssertionError("the data is touched")

    monkeypatch.setattr("datamodules.text.TextDataModule.prepare_data", touched)
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config", str(write_config(tmp_path, corpus)), "--run_dir", str(tmp_path / "run"), *options])


def test_a_config_that_is_no_file_is_refused(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").symlink_to("/dev/null")
    command = ["fit", "--config", str(write_config(tmp_path, corpus)), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="its config.yaml is a folder or a device: move it away"):
        main([*command, "--ckpt_path=auto"])


def test_unknown_keys_in_a_file_are_refused(corpus, tmp_path, capsys):
    config = write_config(tmp_path, corpus)
    config.write_text(config.read_text().replace("depth:", "dept:"))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config)])
    assert "'model.config.dept' of LanguageModule: did you mean 'model.config.depth'?" in capsys.readouterr().err


def test_token_ids_outside_the_vocabulary_are_refused():
    from datamodules.text import TextDataModule
    from lit_modules.optim.config import OptimConfig
    from tokenformer import LMConfig

    module = LanguageModule(LMConfig(vocab_size=100, depth=1, dim=16, num_heads=2), OptimConfig())

    class FakeTrainer:
        datamodule = TextDataModule()

    module._trainer = FakeTrainer()  # for validate: `fit` has settings of its own to check
    with pytest.raises(
        ValueError, match="vocab_size=100 but the tokenizer makes ids up to 256: set it to at least 257"
    ):
        module.setup("validate")


def test_a_mistake_is_one_line_and_not_a_traceback(corpus, tmp_path):
    config = write_config(tmp_path, corpus)
    command = [sys.executable, "-m", "lit_modules.cli", "fit", "--config", str(config), "--model.config.num_heads=5"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert "error: num_heads=5 does not divide dim=32: the nearest that does is 4" in result.stderr
    assert "Traceback" not in result.stderr
