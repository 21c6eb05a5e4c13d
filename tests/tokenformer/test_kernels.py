"""The Triton kernels, where there is no GPU in Triton's interpreter, and when the operator takes them."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tokenformer.fused as fused

CASES = Path(__file__).with_name("kernel_cases.py")


def run_cases(**environment):
    """In a process of their own, since Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not fused.HAS_TRITON, reason="needs Triton, which is not installed")
def test_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and there is none here")
def test_on_a_gpu():
    run_cases()


def test_operator_takes_them_where_they_are_right(monkeypatch):
    def taken(dtype=torch.bfloat16, is_cuda=True, group=None):
        return fused.uses_kernels(SimpleNamespace(is_cuda=is_cuda, dtype=dtype), group)

    monkeypatch.setattr(fused, "HAS_TRITON", True)
    assert taken()
    assert taken(torch.float16)
    assert taken(torch.float32)
    assert not taken(torch.float64)  # they sum in float32
    assert not taken(is_cuda=False)
    assert not taken(group=object())  # r is summed over processes before it is used
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    assert not taken()


@pytest.mark.skipif(not fused.HAS_TRITON, reason="needs Triton, which is not installed")
@pytest.mark.parametrize(
    ("name", "wide", "narrow"),
    [
        ("_norm_gelu", 3, 2),  # narrow: tau, the factor
        ("_norm_gelu_backward", 7, 3),  # narrow: tau, the factor, r
        ("_cross_entropy", 3, 3),  # narrow: the target, its logit, the nats
    ],
)
def test_compiles_for_a_gpu_with_wide_accesses_and_without_spills(name, wide, narrow):
    """Which needs none: for an H200, rows of 2144 in bfloat16. Each access to a row is of 16 bytes."""
    import triton.backends.nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from tokenformer import kernels

    kernel = getattr(kernels, name)
    numbers = dict.fromkeys(("N", "V", "stride", "norm_tokens", "IGNORE"), "i32") | {"LARGEST": "fp32"}
    types = numbers | {"tau": "*fp64", "r": "*fp32", "targets": "*i64", "nats": "*fp32"}
    constants = {"OUTSIDE": False, "GRAD": True, "TILE": 1024}
    signature = {a: "constexpr" if a in constants else types.get(a, "*bf16") for a in kernel.arg_names}
    aligned = [i for i, a in enumerate(kernel.arg_names) if signature[a].startswith("*") or a in ("stride", "V")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(a),): c for a, c in constants.items() if a in signature},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    accesses = re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"])
    sixteen = [access for access in accesses if access.endswith(".v4.b32")]
    assert (len(sixteen), len(accesses) - len(sixteen)) == (wide, narrow)
    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(re.search(r"REG:(\d+)", usage)[1]) <= 64
    assert " STACK:0 " in usage
    assert " LOCAL:0 " in usage
