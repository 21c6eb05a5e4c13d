"""The project's own files agree with each other."""

import re
import subprocess
import sys
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


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert f"[{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()


# Imports everything where only that is found which the requirements, without extras of ours, bring along.
ONLY_REQUIRED = """
import importlib, re, sys
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions, requires
from packaging.requirements import Requirement

brought, of_module = {("tokenformer", "")}, packages_distributions()

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def bring(requirement):
    for extra in ("", *requirement.extras):
        if (plain(requirement.name), extra) not in brought:
            brought.add((plain(requirement.name), extra))
            for inner in map(Requirement, requires(requirement.name) or ()):
                if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                    bring(inner)

class OnlyRequired:
    def find_spec(name, *path):
        owners = of_module.get(name, ["tokenformer"])
        return PathFinder.find_spec(name, *path) if {plain(owner) for owner in owners} & names else None

for line in sys.argv[1:]:
    bring(Requirement(line))
names = {name for name, _ in brought} | {"setuptools"}
sys.meta_path[sys.meta_path.index(PathFinder)] = OnlyRequired
import benchmarks.gpu, lit_modules.cli
for name in {name for name, _ in benchmarks.gpu.ORDER}:
    importlib.import_module(f"benchmarks.{name}")
assert importlib.util.find_spec("pytest") is None
"""


def test_the_required_packages_are_enough_to_import_everything():
    """As on a machine without the optional parts of what is required, such as a bare one with a GPU."""
    command = [sys.executable, "-c", ONLY_REQUIRED, *PROJECT["project"]["dependencies"]]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
