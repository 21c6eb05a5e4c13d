"""Weights in int8: which, how far from what they were, and that a model runs on just those."""

from copy import deepcopy

import pytest
import torch

pytest.importorskip("torchao", reason="needs torchao: pip install 'tokenformer[int8]'")

from benchmarks.int8 import compare
from tokenformer import LMConfig, TokenFormerLM, generate
from tokenformer.growth import grow_layers, plan_growth
from tokenformer.int8 import quantize_blocks

SIZES = {"vocab_size": 50, "max_seq_len": 32, "depth": 2, "dim": 32, "num_heads": 4, "init": "scaled"}
TOKENS = {"qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 64}
IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))


def build(*inits, **changes):
    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(**SIZES | TOKENS | changes)).eval()
    for init in inits:
        grow_layers(model, plan_growth(model, {}, factor=2), init=init)
    return model


MODELS = {
    "plain": build,
    "grown": lambda: build("anchored", "segment_norm", "random"),
    "float16": lambda: build().half(),
    "untied": lambda: build(tie_embeddings=False),
    "differential, norms with weights": lambda: build(attention="differential", num_heads=2, norm_affine=True),
    "baseline": lambda: build(baseline="parameters"),
    "baseline, bfloat16": lambda: build(baseline="parameters").bfloat16(),
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@each_model
def test_a_byte_for_each_weight_of_a_block_and_nothing_else_changes(make):
    model = make()
    before = deepcopy(model.state_dict())
    quantize_blocks(model)
    for name, tensor in model.state_dict().items():
        if not name.startswith("backbone.blocks.") or tensor.dim() < 2:
            assert torch.equal(tensor, before[name]), name
            continue
        assert tensor.qdata.dtype == torch.int8, name
        assert tensor.qdata.shape == before[name].shape
        step = before[name].abs().amax(1, keepdim=True) / 127.5  # 256 values from -m to almost m
        assert tensor.scale.shape == step.shape
        most = 0.5 + 128 * torch.finfo(step.dtype).eps  # half a step, and the rounding of the scale
        assert ((tensor.dequantize() - before[name]).abs() <= most * step).all(), name


@each_model
def test_runs_on_the_rounded_matrices(make):
    model = make().requires_grad_(False)
    rounded, before, num_params = deepcopy(model), model(IDS), model.num_params()
    quantize_blocks(model)
    for name, tensor in model.named_parameters():
        if hasattr(tensor, "qdata"):
            rounded.get_parameter(name).copy_(tensor.dequantize())
    assert torch.equal(model(IDS), rounded(IDS))
    assert not torch.equal(model(IDS), before)
    assert model.num_params() == num_params


@each_model
def test_text_is_that_of_reading_it_all_again_and_no_layer_is_copied(make):
    model = make()
    quantize_blocks(model)
    assert not model.new_cache(joins=True).joins  # they would keep the tokens in full
    text = generate(model, IDS[:, :4], 8, temperature=0)
    assert torch.equal(text[:, 4:], model(text[:, :-1]).argmax(-1)[:, 3:])


def test_the_benchmark_in_its_smallest_form():
    model = build("anchored")
    ids = torch.arange(65) % 50
    row = compare(model, ids, length=2, rounds=1)
    assert float(row["loss"]) == pytest.approx(model.loss(ids[:-1].view(2, 32), ids[1:].view(2, 32)).item(), abs=1e-4)
    assert float(row["loss int8"]) == pytest.approx(float(row["loss"]), abs=0.1)
    in_blocks = sum(p.numel() for p in model.backbone.blocks.parameters() if p.dim() == 2)
    assert float(row["MB"]) == pytest.approx(4e-6 * row["params"], abs=0.01)
    rows = sum(len(p) for p in model.backbone.blocks.parameters() if p.dim() == 2)
    assert float(row["MB int8"]) == pytest.approx(4e-6 * (row["params"] - 0.75 * in_blocks + 1.25 * rows), abs=0.006)
    assert float(row["time"]) > 0
    assert not any(hasattr(p, "qdata") for p in model.parameters())


def test_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match=r"int8: from float32, .*and the model is in float64: call model.float\(\)"):
        quantize_blocks(build().double())
    monkeypatch.setattr("tokenformer.int8.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"int8: needs torchao: pip install 'tokenformer\[int8\]'"):
        quantize_blocks(build())
