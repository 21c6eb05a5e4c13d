"""Imports run one way: lit_modules -> tokenformer, datamodules; those two know nothing of each other."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FORBIDDEN = {
    "tokenformer": {"lightning", "datamodules", "lit_modules", "datasets", "tokenizers", "yaml", "omegaconf"},
    "datamodules": {"tokenformer", "lit_modules"},
    "lit_modules": {"tests", "benchmarks", "studies"},
}
# The rooms of lit_modules: each may import those before it.
ROOMS = ("runs", "optim", "checkpoints", "growth", "strategies", "modules", "callbacks", "commands", "cli")
MAY_IMPORT_DATAMODULES = {"commands"}
MAX_LINES = 300


def imported(path):
    """Modules, as (name, what is taken from it)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def python_files(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package):
    for path in python_files(package):
        forbidden = FORBIDDEN[package]
        if package == "lit_modules" and path.parent.name not in MAY_IMPORT_DATAMODULES:
            forbidden = forbidden | {"datamodules"}
        assert not {name.split(".")[0] for name, _ in imported(path)} & forbidden, path


def room(path):
    return path.relative_to(ROOT / "lit_modules").parts[0].removesuffix(".py")


def test_rooms_import_those_before_them():
    for path in python_files("lit_modules"):
        if room(path) == "__init__":
            continue
        known = ROOMS[: ROOMS.index(room(path)) + 1]
        for name, taken in imported(path):
            if name == "lit_modules" or name.startswith("lit_modules."):
                used = (*name.split("."), taken)[1]
                assert used in known, f"{path} imports {name}"


def test_the_first_level_is_the_rooms():
    found = {path.name.removesuffix(".py") for path in (ROOT / "lit_modules").iterdir() if path.name != "__pycache__"}
    assert found == {"__init__", *ROOMS}
    assert len(ROOMS) <= 9
    for path in (ROOT / "tests/lit_modules").iterdir():
        assert path.name in {"__pycache__", *ROOMS}


def test_a_name_means_one_thing():
    """Files of a package have names of their own; those of another may be about the same thing."""
    for packages in (("tokenformer",), ("datamodules",), ("lit_modules",)):
        names = [path.name for package in packages for path in python_files(package) if path.name != "__init__.py"]
        assert sorted(names) == sorted(set(names))


def test_a_long_file_says_why():
    packages = (*FORBIDDEN, "benchmarks", "studies", "tests")
    for path in (path for package in packages for path in python_files(package)):
        text = path.read_text()
        if len(text.splitlines()) > MAX_LINES:
            assert "One file: " in (ast.get_docstring(ast.parse(text)) or ""), f"{path} has over {MAX_LINES} lines"


IMPORTS = [
    "import sys, tokenformer; assert not {'timm', 'torchvision', 'torch._dynamo'} & set(sys.modules)\n"
    "import importlib.util; importlib.util.find_spec('timm')  # as transformers asks for it\nimport timm",
    "import timm, tokenformer",
    "from tokenformer import TokenFormerViT; import timm",
    "import tokenformer.timm_models, timm",
]
# Each in a process of its own, which has torch from the first one: that takes longer than the rest.
IN_FORKS = """
import os, sys, torch
for program in sys.argv[1:]:
    if not os.fork():
        exec(program + "\\nprint(len(timm.list_models('tokenformer_vit*')), flush=True)")
        os._exit(0)
    os.wait()
"""


def test_importing_is_quick_and_timm_knows_our_models():
    command = [sys.executable, "-c", IN_FORKS, *IMPORTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "6\n" * len(IMPORTS), result.stderr
