"""The language model against the released implementation; its sizes and costs against the real model."""

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ASSETS
from tokenformer import LMConfig, TokenFormerLM, load_official

TINY = {"vocab_size": 100, "depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 64}
GOLDEN_FILE = ASSETS / "golden_lm_small.safetensors"

VARIANTS = {
    "released": {},
    "padded vocabulary": {"vocab_multiple": 64},
    "untied": {"tie_embeddings": False, "vocab_multiple": 8},
    "no positions": {"rotary_fraction": 0.0},
    "all channels rotated": {"rotary_fraction": 1.0},
    "affine norms, learned tau": {"norm_affine": True, "scale": "learned", "init": "scaled"},
    "softmax": {"score_norm": "softmax"},
    "gelu first": {"score_norm": "gelu_l2_norm", "scale": "current"},
    "differential attention": {"attention": "differential", "rotary_fraction": 0.5, "norm_affine": True},
    "its baseline": {"attention": "differential", "rotary_fraction": 0.0, "baseline": "parameters"},
    "baseline of equal width": {"baseline": "width"},
    "baseline of equal parameters": {"baseline": "parameters", "norm_affine": True},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request):
    return LMConfig(**TINY | request.param)


def test_float64_equals_the_released_implementation(golden_lm):
    model = load_official(GOLDEN_FILE, num_heads=4).double()
    ids = golden_lm["input_ids"]
    torch.testing.assert_close(model(ids), golden_lm["logits_f64"], rtol=0, atol=1e-12)
    hidden = model.embedding(ids)
    from tokenformer.backbone import rotary_tables

    for i, block in enumerate(model.backbone.blocks):
        hidden = block(hidden, rotary_tables(32, 4, ids.device))
        torch.testing.assert_close(hidden, golden_lm[f"hidden_after_layer.{i}"], rtol=0, atol=1e-12)


def test_float32_equals_the_released_implementation(golden_lm):
    model = load_official(golden_lm, num_heads=4)
    logits = model(golden_lm["input_ids"])
    torch.testing.assert_close(logits, golden_lm["logits_f32"], rtol=0, atol=5e-6)
    torch.testing.assert_close(logits.double(), golden_lm["logits_f64"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_released_implementation(golden_lm, checkpointing):
    model = load_official(GOLDEN_FILE, num_heads=4).double()
    model.backbone.checkpoint_activations = checkpointing
    ids = golden_lm["input_ids"]
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert abs(loss - golden_lm["loss_f64"]) < 1e-12
    parameters = dict(model.named_parameters())
    from tokenformer.released import _official_names

    given = {
        "embedding.weight": "sequential.0.word_embeddings.weight",
        "backbone.blocks.1.attention.query.segments.0.keys": "sequential.3.attention.query.key_param_tokens",
        "backbone.blocks.0.attention.out.segments.0.values": "sequential.2.attention.proj.value_param_tokens",
    }
    for ours, theirs in given.items():
        torch.testing.assert_close(parameters[ours].grad, golden_lm[f"grad.{theirs}"], rtol=0, atol=1e-12)
    for ours, theirs in _official_names(3).items():
        norm = golden_lm[f"grad_l2norm.{theirs}"]
        assert abs(parameters[ours].grad.norm() - norm) < 1e-12 + 1e-10 * norm


def test_load_official_refuses_what_is_not_whole(golden_lm):
    with pytest.raises(ValueError, match="num_heads.*released widths"):
        load_official(golden_lm)
    weights = {name: tensor for name, tensor in golden_lm.items() if name.startswith("sequential.")}
    missing = {name: tensor for name, tensor in weights.items() if "3.attention.query.key" not in name}
    with pytest.raises(ValueError, match=r"missing tensors: sequential\.3\.attention\.query\.key_param_tokens"):
        load_official(missing, num_heads=4)
    with pytest.raises(ValueError, match=r"unknown tensors: sequential\.9\.x"):
        load_official(weights | {"sequential.9.x": torch.zeros(1)}, num_heads=4)
    with pytest.raises(
        ValueError, match=r"contradict.*sequential\.4\.mlp\.key_param_tokens \(8, 64\), not \(160, 64\)"
    ):
        load_official(weights | {"sequential.4.mlp.key_param_tokens": torch.zeros(8, 64)}, num_heads=4)
    with pytest.raises(ValueError, match="not a released TokenFormer"):
        load_official({"weight": torch.zeros(2)})


def test_load_official_reads_a_torch_file(golden_lm, tmp_path):
    weights = {name: tensor for name, tensor in golden_lm.items() if name.startswith("sequential.")}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = load_official(tmp_path / "pytorch_model.bin", num_heads=4)
    expected = load_official(golden_lm, num_heads=4)
    assert torch.equal(model(golden_lm["input_ids"]), expected(golden_lm["input_ids"]))


def test_parameter_count_is_that_of_the_model(variant):
    assert variant.num_params() == TokenFormerLM(variant).num_params()


def test_flops_are_those_of_the_model(variant):
    """FlopCounterMode sees every matrix product; on meta tensors it runs none of them."""
    with torch.device("meta"):
        model = TokenFormerLM(variant)
        ids = torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    assert counter.get_total_flops() == 3 * 16 * variant.flops_per_token(16)
    assert model.flops_per_token(16) == variant.flops_per_token(16)


def test_training_takes_three_times_the_forward_flops():
    config = LMConfig(**TINY)
    with torch.device("meta"):
        model = TokenFormerLM(config)
        ids = torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    # The fused operator's backward takes one dot product per row, as a batched product: 2 N FLOPs of a row's 12 N D.
    tokens = config.depth * (3 * config.qkv_tokens + config.proj_tokens + config.ffn_tokens)
    row_dot_products = 2 * 3 * 16 * tokens
    assert counter.get_total_flops() == 3 * 3 * 16 * config.flops_per_token(16) + row_dot_products


def test_model_is_causal_and_takes_any_length(variant):
    torch.manual_seed(0)
    model = TokenFormerLM(variant)
    ids = torch.randint(0, 100, (2, 24))
    logits = model(ids)
    assert logits.shape == (2, 24, 100)
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 100
    torch.testing.assert_close(model(changed)[:, :12], logits[:, :12], rtol=0, atol=1e-5)
    assert not torch.allclose(model(changed)[:, 12:], logits[:, 12:], atol=1e-5)


def test_only_positions_tell_equal_tokens_apart():
    for fraction, differ in ((0.0, False), (0.5, True)):
        torch.manual_seed(0)
        model = TokenFormerLM(LMConfig(**TINY | {"rotary_fraction": fraction, "depth": 1})).double()
        for p in model.parameters():
            p.data *= 5
        same_tokens = torch.tensor([[7, 3, 3, 3, 9], [3, 7, 3, 3, 9]])
        last = model(same_tokens)[:, -1]
        assert torch.allclose(last[0], last[1], rtol=0, atol=1e-10) != differ


@pytest.mark.parametrize("init", ["official", "scaled"])
@pytest.mark.parametrize("baseline", [None, "parameters"])
def test_initialisation_is_the_table_of_the_docstring(init, baseline):
    config = LMConfig(vocab_size=2000, depth=3, dim=128, num_heads=4, qkv_tokens=256, proj_tokens=256, ffn_tokens=512)
    config = LMConfig(**vars(config) | {"init": init, "baseline": baseline, "tie_embeddings": False})
    torch.manual_seed(0)
    model = TokenFormerLM(config)
    table = {}
    for line in TokenFormerLM.__doc__.splitlines():
        if columns := re.match(r"\s+(.*?)\s{2,}(\S.*?)\s{2,}(\S.*)$", line):
            table[columns[1]] = columns[3] if init == "scaled" else columns[2]

    def std(row, num_tokens=0):
        names = {"sqrt": lambda x: math.sqrt(x)}
        text = re.sub(r"sqrt (\w)", r"sqrt(\1)", table[row]).replace("(0.425 N)", "(0.425*N)").replace("(2 L)", "(2*L)")
        text = text.replace("L sqrt", "L*sqrt")
        return eval(text, names, {"L": 3, "D": 128, "N": num_tokens})

    def check(tensor, expected):
        assert abs(tensor.std().item() / expected - 1) < 0.03

    check(model.embedding.weight, std("embedding, lm_head"))
    check(model.lm_head.weight, std("embedding, lm_head"))
    for block in model.backbone.blocks:
        attention = block.attention
        if baseline:
            for layer in (attention.query, attention.key, attention.value, block.ffn.up):
                check(layer.weight, std("baseline: query, key, value, up"))
            for layer in (attention.out, block.ffn.down):
                check(layer.weight, std("baseline: out, down"))
        else:
            for row, layers in (
                ("values of query, key, value", (attention.query, attention.key, attention.value)),
                ("values of out, ffn", (attention.out, block.ffn)),
            ):
                for layer in layers:
                    check(layer.segments[0].keys, std("keys"))
                    check(layer.segments[0].values, std(row, layer.num_tokens))


@pytest.mark.parametrize(("depth", "dim", "tokens"), [(2, 64, 64), (12, 128, 512)])
def test_scaled_initialisation_gives_the_same_output_whatever_the_size(depth, dim, tokens):
    torch.manual_seed(0)
    config = LMConfig(
        depth=depth, dim=dim, num_heads=4, qkv_tokens=tokens, proj_tokens=tokens, ffn_tokens=tokens, init="scaled"
    )
    model = TokenFormerLM(config)
    x = torch.randn(256, dim)
    block = model.backbone.blocks[-1]
    for layer, rms in ((block.attention.query, 0.11), (block.attention.out, 0.02), (block.ffn, 0.02)):
        assert abs(layer(x).square().mean().sqrt() / rms - 1) < 0.15


def test_baseline_of_equal_parameters_has_them():
    config = LMConfig(**TINY)
    baseline = LMConfig(**TINY, baseline="parameters")
    assert baseline.num_params() == config.num_params()
    assert LMConfig(baseline="parameters").mlp_hidden == 4 * 768  # the baseline of the published 124M size is GPT-2


BAD_CONFIGS = [
    ({"num_heads": 5}, "num_heads=5 does not divide dim=32.*nearest that does is 4"),
    ({"rotary_fraction": 0.4}, "rotary_fraction=0.4 of head_dim=8.*even number; try 0.5"),
    ({"rotary_fraction": 1.5}, "rotary_fraction=1.5"),
    ({"attention": "differential", "num_heads": 32}, "attention='differential': head_dim=1 .*is odd"),
    ({"attention": "differential"}, "of half of head_dim=8.*is 1 channels: .*even number; try 0"),
    ({"attention": "linear"}, "attention='linear': choose one of softmax, differential"),
    ({"depth": 0}, "depth=0"),
    ({"vocab_size": 0}, "vocab_size=0"),
    ({"scale": "free"}, "scale='free': choose one of fixed, learned, current"),
    ({"init": "zeros"}, "init='zeros'"),
    ({"baseline": "parameters", "qkv_tokens": 1, "proj_tokens": 1, "ffn_tokens": 1}, "baseline='parameters'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=[str(change) for change, _ in BAD_CONFIGS])
def test_bad_sizes_are_refused_with_a_fix(change, message):
    with pytest.raises(ValueError, match=message):
        LMConfig(**TINY | change)


def test_torch_export_takes_a_model_along():
    """As a file that needs no code of ours: what torch.compile sees as one op is written out."""
    model = TokenFormerLM(LMConfig(**TINY)).eval()
    ids = torch.arange(8).unsqueeze(0)
    exported = torch.export.export(model, (ids,))
    assert not [node for node in exported.graph.nodes if "tokenformer" in str(node.target)]
    assert torch.equal(exported.module()(ids + 1), model(ids + 1))
