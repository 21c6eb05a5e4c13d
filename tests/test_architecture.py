"""Imports run one way: lit_modules -> tokenformer, datamodules; those two know nothing of each other."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FORBIDDEN = {
    "tokenformer": {"lightning", "datamodules", "lit_modules", "datasets", "tokenizers", "yaml", "omegaconf"},
    "datamodules": {"tokenformer", "lit_modules"},
    "lit_modules": {"tests", "benchmarks"},
}
MAY_IMPORT_DATAMODULES = {"experiment.py", "saved.py"}  # the command line


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        forbidden = FORBIDDEN[package]
        if package == "lit_modules" and path.name not in MAY_IMPORT_DATAMODULES:
            forbidden = forbidden | {"datamodules"}
        assert not set(imported(path)) & forbidden, path


@pytest.mark.parametrize(
    "program",
    [
        "import sys, tokenformer; assert not {'timm', 'torchvision', 'torch._dynamo'} & set(sys.modules)\n"
        "import importlib.util; importlib.util.find_spec('timm')  # as transformers asks for it\nimport timm",
        "import timm, tokenformer",
        "from tokenformer import TokenFormerViT; import timm",
        "import tokenformer.timm_models, timm",
    ],
)
def test_importing_is_quick_and_timm_knows_our_models(program):
    program += "\nprint(len(timm.list_models('tokenformer_vit*')))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "6\n", result.stderr
