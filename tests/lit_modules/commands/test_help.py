"""The pages of `--help`: they come at once, and say nothing that the parser does not know."""

import shlex
import subprocess
import sys

import pytest

from lit_modules.cli import main
from lit_modules.commands import help
from tests.conftest import ROOT

LANGUAGE, VISION = (str(ROOT / f"configs/{task}/quickstart.yaml") for task in ("language", "vision"))


def test_nothing_heavy_is_imported():
    program = "import sys; from lit_modules.cli import main; main(['fit', '--help']); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == help.page("fit")


@pytest.mark.parametrize("command", help.COMMANDS)
def test_every_option_is_one(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, options = help.COMMANDS[command]
    assert 4 <= len(options) <= 12
    given = {True: [VISION], False: [LANGUAGE]}
    for option, _ in options:
        given["predict_source" in option] += shlex.split(option)
    for config, *arguments in given.values():
        with pytest.raises(SystemExit) as ended:
            main([command, "--config", config, *arguments, "--print_config"])
        assert ended.value.code == 0, capsys.readouterr().err
    assert "class_path: datamodules.text.TextDataModule" in capsys.readouterr().out


def test_all_keys_are_at_another_name(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help.all"])
    assert "--trainer.max_steps" in capsys.readouterr().out
