"""The project's own files agree with each other."""

import re
import tomllib

import pytest
import yaml

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_conda_environment_lists_what_pyproject_lists():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    listed = [entry for entry in pip if not entry.startswith("--")]
    assert listed == PROJECT["project"]["dependencies"]
    assert "--constraint constraints.txt" in pip


def test_constraints_are_plain_pins_of_everything_needed():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    extras = [name for extra in PROJECT["project"]["optional-dependencies"].values() for name in extra]
    for requirement in PROJECT["project"]["dependencies"] + extras:
        if requirement.startswith("tokenformer["):  # its own other extras
            continue
        assert re.match(r"[\w-]+", requirement)[0].lower() in pinned, requirement


@pytest.mark.parametrize("command", ["make quickstart", "make test"])
def test_readme_commands_are_targets(command):
    assert command in (ROOT / "README.md").read_text()
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)


def test_readme_commands_name_files_that_exist():
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"(?:configs|benchmarks|docs|tests)/[\w./-]+\.\w+", text))
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), name


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert f"[{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


def test_readme_python_runs():
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "docs/growth.md"))
    blocks = re.findall(r"```python\n(.*?)```", pages, re.S)
    assert blocks
    for block in blocks:
        exec(block, {})
