"""The models as programs: torch.export, torch.jit.trace and ONNX, for any batch and length."""

import math
import sys

import onnxruntime
import pytest
import torch
from torch.export import Dim
from torch.nn import functional as F

from tests.tokenformer.tiny_vit import GROWN, TINY, build, images
from tokenformer import LMConfig, Pattention, TokenFormerLM, grow, pattention
from tokenformer.growth import append_tokens
from tokenformer.onnx import save_onnx

BLOCKS = {name: TINY[name] for name in ("depth", "dim", "num_heads", "qkv_tokens", "proj_tokens", "ffn_tokens")}


def language(dtype=torch.float64, depth=2):
    """A model grown twice, beside and within a norm."""
    torch.manual_seed(0)
    config = LMConfig(vocab_size=50, max_seq_len=32, scale="learned", init="scaled", **BLOCKS | {"depth": depth})
    model = TokenFormerLM(config).to(dtype)
    grow(model, **GROWN, init="segment_norm")
    grow(model, ffn=96, init="random")
    return model.eval()


def ids(batch, length):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(0))


def vision():
    model = build()
    grow(model, **GROWN, init="random")
    return model, images(model, 16, 24), {0: Dim("batch"), 2: 8 * Dim("rows"), 3: 8 * Dim("columns")}


CASES = {
    "language": (lambda: (language(), ids(2, 8), {0: Dim("batch"), 1: Dim("length", max=32)}), [(1, 1), (5, 32)]),
    "vision": (vision, [(1, 3, 48, 32), (5, 3, 16, 40)]),
}


@pytest.mark.parametrize("name", CASES)
def test_an_exported_program_takes_any_batch_and_length_and_has_gradients(name):
    make, shapes = CASES[name]
    model, example, sizes = make()
    program = torch.export.export(model, (example,), dynamic_shapes=(sizes,)).module()
    for shape in shapes:
        x = ids(*shape) if name == "language" else torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-12)
        program(x).square().sum().backward()
        model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in program.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-9, atol=1e-12)


def test_strict_export_knows_nothing_of_our_operators():
    program = torch.export.export(language(depth=1), (ids(2, 8),), strict=True)
    assert "aten" in program.graph_module.code
    assert "tokenformer" not in program.graph_module.code


@pytest.mark.parametrize("name", CASES)
def test_a_trace_takes_any_batch(name):
    make, shapes = CASES[name]
    model, example, _ = make()
    traced = torch.jit.trace(model, (example,))
    for batch in (1, 5):
        x = example[:1].repeat_interleave(batch, 0) if name == "vision" else ids(batch, shapes[1][1])
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=1e-12)


def test_a_row_of_zero_scores_gives_zeros_in_a_program():
    """As the operator does: no NaN, in values and gradients."""
    layer = language().backbone.blocks[0].ffn
    program = torch.export.export(layer, (torch.zeros(2, 32, dtype=torch.float64),)).module()
    x = torch.stack([torch.zeros(32), torch.ones(32)]).double().requires_grad_()
    program(x).sum().backward()
    assert not program(x)[0].any()
    assert not x.grad[0].any()
    assert x.grad[1].isfinite().all()


def test_onnxruntime_gives_the_same_for_any_batch_and_length(tmp_path):
    model = language(torch.float32, depth=1)
    save_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((1, 1), (2, 8), (5, 32)):
        (logits,) = session.run(["logits"], {"input_ids": ids(*shape).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(ids(*shape)).detach(), rtol=0, atol=1e-5)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"--format onnx: needs pip install 'tokenformer\[onnx\]'"):
        save_onnx(language(), tmp_path / "model.onnx")


@pytest.mark.parametrize("score_norm", ["l2_norm_gelu", "softmax"])
def test_fvcore_finds_every_product_in_a_trace(score_norm):
    """It counts `aten::matmul` of its trace by the sizes there, and knows nothing of an operator of ours."""
    layer = Pattention(8, 6, num_tokens=10, score_norm=score_norm)
    append_tokens(layer, 4, "random", torch.Generator())
    with torch.no_grad():
        graph, _ = torch.jit._get_trace_graph(layer, (torch.rand(2, 5, 8),))
    products = [node for node in graph.nodes() if node.kind() == "aten::matmul"]
    sizes = [[factor.type().sizes() for factor in node.inputs()] for node in products]
    assert sum(math.prod(left) * right[1] for left, right in sizes) == 2 * 5 * 14 * (8 + 6)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_torch_compile_sees_one_op(needs_grad):
    """And not what is written to files; torch 2.11 once took the one for the other."""
    called = []

    def backend(graph, inputs):
        modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        called.extend(node.target for module in modules for node in module.graph.nodes if node.op == "call_function")
        return graph

    inputs = [torch.randn(n, 8, requires_grad=needs_grad) for n in (3, 6, 6)]
    torch.compile(pattention, fullgraph=True, backend=backend)(*inputs)
    assert torch.ops.tokenformer.attend in called
    assert F.gelu not in called
