"""The Triton kernels, where there is no GPU in Triton's interpreter, and when the operator takes them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tokenformer.operator as operator_module

CASES = Path(__file__).with_name("kernel_cases.py")


def run_cases(**environment):
    """In a process of their own, since Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not operator_module.HAS_TRITON, reason="needs Triton, which is not installed")
def test_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none here")
def test_on_a_gpu():
    run_cases()


def test_operator_takes_them_where_they_are_right(monkeypatch):
    def taken(dtype=torch.bfloat16, is_cuda=True, group=None):
        return operator_module._uses_kernels(SimpleNamespace(is_cuda=is_cuda, dtype=dtype), group)

    monkeypatch.setattr(operator_module, "HAS_TRITON", True)
    assert taken()
    assert taken(torch.float16)
    assert taken(torch.float32)
    assert not taken(torch.float64)  # they sum in float32
    assert not taken(is_cuda=False)
    assert not taken(group=object())  # r is summed over processes before it is used
    monkeypatch.setattr(operator_module, "HAS_TRITON", False)
    assert not taken()
