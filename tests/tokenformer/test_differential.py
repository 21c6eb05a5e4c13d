"""Differential attention: the formula of its paper, and that what holds for other models holds with it."""

import math

import pytest
import torch

from tokenformer import LMConfig, TokenFormerLM, from_pretrained, generate, grow, save_pretrained
from tokenformer.net2net import widen

SIZES = {"vocab_size": 257, "max_seq_len": 32, "depth": 2, "dim": 32, "num_heads": 4, "init": "scaled"}
TOKENS = {"qkv_tokens": 40, "proj_tokens": 40, "ffn_tokens": 64}
IDS = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))


def build(**changes):
    torch.manual_seed(0)
    config = {"attention": "differential", "rotary_fraction": 0.5, "norm_affine": True}
    model = TokenFormerLM(LMConfig(**SIZES | TOKENS | config | changes)).eval()
    for block in model.backbone.blocks:
        torch.nn.init.uniform_(block.attention.norm.weight, 0.5, 2)
    return model


@pytest.mark.parametrize("index", [0, 1])
def test_it_is_the_formula_of_the_paper(index):
    """Ye et al. 2024, section 2.1, head by head."""
    model = build(rotary_fraction=0.0).double()
    attention, x = model.backbone.blocks[index].attention, torch.randn(1, 7, 32, dtype=torch.double)
    for p in (attention.lambda_q1, attention.lambda_k1, attention.lambda_q2, attention.lambda_k2):
        torch.nn.init.normal_(p)
    start = 0.8 - 0.6 * math.exp(-0.3 * index)
    weight = torch.exp(attention.lambda_q1 @ attention.lambda_k1) - torch.exp(attention.lambda_q2 @ attention.lambda_k2)
    weight = weight + start
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    heads = []
    for head in range(4):
        q, k, v = (p(x)[0, :, 8 * head : 8 * head + 8] for p in (attention.query, attention.key, attention.value))
        maps = [
            (q[:, part] @ k[:, part].T / math.sqrt(4)).masked_fill(future, -math.inf).softmax(-1)
            for part in (slice(0, 4), slice(4, 8))
        ]
        mixed = (maps[0] - weight * maps[1]) @ v
        rms = mixed.square().mean(-1, keepdim=True).add(1e-5).sqrt()
        heads.append(mixed / rms * attention.norm.weight * (1 - start))
    expected = attention.out(torch.cat(heads, dim=-1)[None])
    torch.testing.assert_close(attention(x, None), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["anchored", "zero_keys", "segment_norm"])
def test_growth_changes_nothing(init):
    model = build().double()
    before = model(IDS)
    grow(model, qkv=60, proj=50, ffn=128, init=init)
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-12)


def test_net2net_changes_nothing():
    model = build(baseline="parameters").double()
    torch.testing.assert_close(widen(model, 2)(IDS), model(IDS), rtol=0, atol=1e-8)


def test_the_weight_of_the_second_map_learns():
    model = build()
    model.loss(IDS, IDS).backward()
    for block in model.backbone.blocks:
        assert all(getattr(block.attention, f"lambda_{name}").grad.any() for name in ("q1", "k1", "q2", "k2"))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_is_saved_and_generates_in_transformers_too(tmp_path, cache):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'tokenformer[hf]'")
    import tokenformer.hf  # noqa: F401 - registers

    save_pretrained(build(), tmp_path)
    native = from_pretrained(tmp_path)
    torch.testing.assert_close(native(IDS), build()(IDS), rtol=0, atol=0)
    wrapped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = generate(native, IDS.tolist(), max_new_tokens=6, temperature=0)
    found = wrapped.generate(IDS, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    assert found[:, 12:].tolist() == [row[-6:] for row in expected]


def test_it_is_exported_and_compiled():
    model = build()
    exported = torch.export.export(
        model, (IDS,), dynamic_shapes=({0: torch.export.Dim("B"), 1: torch.export.Dim("T")},)
    )
    torch.testing.assert_close(exported.module()(IDS[:, :7]), model(IDS[:, :7]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
