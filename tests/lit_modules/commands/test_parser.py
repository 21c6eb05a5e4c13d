"""What is given on the command line or in a later file wins as a whole; what is wrong is said in a line."""

import re
from fnmatch import fnmatchcase
from itertools import pairwise

import pytest
import yaml

from lit_modules.cli import main
from lit_modules.commands.parser import FOREIGN
from tests.conftest import ROOT

LANGUAGE, VISION = (str(ROOT / f"configs/{task}/quickstart.yaml") for task in ("language", "vision"))
TYPED = "[{at_step: 5, ffn: 64}, {at_step: 8, proj: 24}]"
STAGES = [{"at_step": 5, "ffn": 64}, {"at_step": 8, "proj": 24}]
FILE = """
model:
  class_path: LanguageModule
  init_args: {config: {depth: 1, dim: 32, num_heads: 2, qkv_tokens: 8, proj_tokens: 8, ffn_tokens: 16}}
data: {class_path: TextDataModule, init_args: {seq_len: 32, batch_size: 4}}
trainer:
  max_steps: 60
  callbacks:
    - class_path: GrowParameterTokens
      init_args:
        stages: [{at_step: 20, qkv: 16, proj: 16, ffn: 32}, {at_step: 40, qkv: 32, ffn: 64}]
        schedule: continue
"""
GROWING = f"{{class_path: GrowParameterTokens, init_args: {{stages: {TYPED}}}}}"


def printed(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *map(str, args), "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def stages_of(callback):
    return [
        {key: value for key, value in stage.items() if value is not None} for stage in callback["init_args"]["stages"]
    ]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "first.yaml").write_text(FILE)
    return tmp_path / "first.yaml"


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        (["--trainer.callbacks.init_args.stages", TYPED], "continue"),
        (["--trainer.callbacks.stages", TYPED], "continue"),
        (["--trainer.callbacks", f"[{GROWING}]"], "restart"),
        (["--trainer", f"{{callbacks: [{GROWING}]}}"], "restart"),
        (["--config", f"{{trainer: {{callbacks: [{GROWING}]}}}}"], "restart"),
        (["--config", "second.yaml"], "restart"),
        (["--trainer.callbacks=GrowParameterTokens", "--trainer.callbacks.stages", TYPED], "restart"),
    ],
)
def test_a_list_wins_as_a_whole(config, given, schedule, capsys, monkeypatch):
    monkeypatch.chdir(config.parent)
    (config.parent / "second.yaml").write_text(f"trainer: {{callbacks: [{GROWING}]}}")
    found = printed(capsys, "--config", config, *given)["trainer"]["callbacks"]
    (growth,) = found if isinstance(found, list) else [found]
    assert stages_of(growth) == STAGES
    assert growth["init_args"]["schedule"] == schedule


def test_what_is_appended_or_one_key_leaves_the_rest(config, capsys):
    more = "--trainer.callbacks.stages+=[{at_step: 50, ffn: 128}]", "--trainer.callbacks.anneal_steps=5"
    growth, ema = printed(capsys, "--config", config, *more, "--trainer.callbacks+=EMA")["trainer"]["callbacks"]
    before = yaml.safe_load(FILE)["trainer"]["callbacks"][0]["init_args"]["stages"]
    assert stages_of(growth) == [*before, {"at_step": 50, "ffn": 128}]
    assert (growth["init_args"]["schedule"], growth["init_args"]["anneal_steps"]) == ("continue", 5)
    assert ema["class_path"] == "lit_modules.callbacks.EMA"


def test_arguments_of_a_class_are_merged_and_a_dict_is_replaced(tmp_path, capsys):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {init_args: {timm_model: test_vit, timm_args: {depth: 4, sizes: {a: 1, b: 2}}}}")
    second.write_text("model: {init_args: {config: {depth: 3}, timm_args: {sizes: {a: 3}}}}")
    before = printed(capsys, "--config", VISION)["model"]["init_args"]
    for later in (["--config", second], ["--model.config.depth=3", "--model.timm_args", "{sizes: {a: 3}}"]):
        model = printed(capsys, "--config", VISION, "--config", first, *later)["model"]["init_args"]
        assert model["timm_args"] == {"sizes": {"a": 3}}
        assert model["config"] == before["config"] | {"depth": 3}
        assert model["timm_model"] == "test_vit"


def test_the_run_has_what_is_printed(config, capsys):
    main(["plan", "--config", str(config), "--trainer.callbacks.init_args.stages", TYPED])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = [line[1:3] for line in lines if line[2:] and re.fullmatch(r"\d+/\d+/\d+", line[2])][:3]
    assert sizes == [["0", "8/8/16"], ["5", "8/8/64"], ["8", "8/24/64"]]


def refusal(capsys, *args, config=LANGUAGE):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", config, *args])
    message, *rest = capsys.readouterr().err.splitlines()
    assert rest == ["(`tokenformer COMMAND --help.all` lists all keys)"]
    return message.removeprefix("error: ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "--model.config.n_layer=3",
            "unknown key 'model.config.n_layer' of LanguageModule: did you mean '*.config.depth'?",
        ),
        ("--model.config.dropout=0.1", "unknown key 'model.config.dropout' of LanguageModule"),
        ("--model.config.block_size=8", "unknown key '*' of LanguageModule: did you mean 'model.config.max_seq_len'?"),
        ("--model.learning_rate=1", "unknown key '*' of LanguageModule: did you mean 'model.optim.lr'?"),
        ("--learning_rate=1", "unknown key 'learning_rate': did you mean 'model.optim.lr'?"),
        ("--max_steps=1", "unknown key 'max_steps': did you mean 'trainer.max_steps'?"),
        ("--modle.config.depth=3", "unknown key 'modle.config.depth': did you mean 'model.config.depth'?"),
        ("--data.image_size=3", "unknown key 'data.image_size' of TextDataModule"),
        ("--trainer.max_iters=3", "unknown key 'trainer.max_iters': did you mean 'trainer.max_steps'?"),
        ("--trainer.strategy.foo=3", "unknown key 'trainer.strategy.foo'"),
        ("--trainer.callbacks.deca=3", "unknown key 'trainer.callbacks.deca' of LossCurve"),
        ("stray", "unknown argument 'stray': give --KEY VALUE"),
        ("--trainer.precision=bf16-mixd", "trainer.precision='bf16-mixd': must be *; did you mean 'bf16-mixed'?"),
        ("--trainer.callbacks+=EMMA", "trainer.callbacks='EMMA': no such class; did you mean 'EMA'?"),
        ("--trainer.logger=WandbLoger", "trainer.logger='WandbLoger': no such class; did you mean 'WandbLogger'?"),
        ("--model=LanguageModul", "model='LanguageModul': no such class; did you mean 'LanguageModule'?"),
        ("--model.config.init=zerokeys", "model.config.init='zerokeys': must be official or scaled"),
        ("--model.config.depth=x", "model.config.depth='x': must be int"),
        ("--model.config=3", 'model.config: *: Unable to load config "3"'),
        ("--model.optim.betas=[1,2,3]", "model.optim.betas='[[]1, 2, 3[]]': must be tuple with 2 elements"),
        ("--data.source=[1]", "data.source='1': must be str or dict"),
        ("--trainer.max_steps=many", "trainer.max_steps='many': must be int"),
        ("--trainer.callbacks=mine.Own", "trainer.callbacks: mine.Own: No module named 'mine'"),
        ("--config=nowhere.yaml", "config: File does not exist: '*nowhere.yaml'"),
    ],
)
def test_a_mistake_is_said_in_a_line_with_the_key_that_was_meant(given, message, capsys):
    found = refusal(capsys, given)
    assert fnmatchcase(found, message), found


# Ten zeros, ten times those, and so on: 10^9 in nine lines.
BOMB = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  a: [1\n  b: 2\n", "no YAML: while parsing a flow sequence in line 2, column 6 did not find *"),
        (BOMB, "stands for 1,234,567,909 values by aliases (*NAME): write out what is needed"),
        ("trainer:\n\tmax_steps: 3\n", "no YAML: while scanning for the next token * in line 2, column 1"),
        ("text\n", "holds no keys and values"),
    ],
)
def test_a_file_that_is_no_config_is_named(text, message, tmp_path, capsys):
    (file := tmp_path / "own.yaml").write_text(text)
    found = refusal(capsys, "--config", str(file))
    assert fnmatchcase(found, f"{file}: {message}"), found


def test_a_bad_value_of_a_callback_is_no_unknown_key(capsys):
    growth = "--trainer.callbacks+=GrowParameterTokens"
    found = refusal(capsys, growth, "--trainer.callbacks.init=zerokeys")
    assert found.startswith("trainer.callbacks.init='zerokeys': must be anchored, zero_keys, segment_norm, ")
    assert found.endswith("; did you mean 'zero_keys'?")
    found = refusal(capsys, growth, "--trainer.callbacks.stages=[{at_step: 3, fnn: 64}]")
    assert found == "unknown key 'trainer.callbacks.stages.fnn' of Stage: did you mean 'trainer.callbacks.stages.ffn'?"
    found = refusal(capsys, growth, "--trainer.callbacks.stages=[{at_step: soon, ffn: 64}]")
    assert found == "trainer.callbacks.stages.at_step='soon': must be int or null"


def test_a_key_is_not_taken_by_its_beginning(capsys):
    found = refusal(capsys, "--model.config.image_siz=3", config=VISION)
    assert found == "unknown key 'model.config.image_siz' of VisionModule: did you mean 'model.config.image_size'?"


def test_what_others_call_our_keys_are_not_ours(capsys):
    """Nor does a name lead to a key that there is not."""
    keys = set()
    for config in (LANGUAGE, VISION):
        keys |= set(flat(printed(capsys, "--config", config)))
    assert set(FOREIGN) - {""} <= keys
    known = {key.rpartition(".")[2] for key in keys}
    for names in FOREIGN.values():
        assert not {name for name in names.split() if name in known}


def flat(config, prefix=""):
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
