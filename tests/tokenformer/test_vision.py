"""The image model against timm's ViT; its sizes and costs against the real model."""

import math
import re
from collections import Counter
from functools import partial

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.tokenformer.tiny_vit import GROWN, TINY, build, images
from tokenformer import TokenFormerViT, ViTConfig, grow

VARIANTS = {
    "class token": {},
    "mean pooling": {"pool": "avg"},
    "sines and cosines": {"position": "sincos"},
    "sines and cosines, mean pooling": {"position": "sincos", "pool": "avg"},
    "one channel, no classifier": {"in_channels": 1, "num_classes": 0},
    "affine norms, learned tau": {"norm_affine": True, "scale": "learned", "init": "scaled"},
    "rotary": {"rotary_fraction": 0.5},
    "differential attention": {"attention": "differential"},
    "gelu first": {"score_norm": "gelu_l2_norm", "scale": "current"},
    "baseline of equal width": {"baseline": "width"},
    "baseline of equal parameters": {"baseline": "parameters", "norm_affine": True},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request):
    return ViTConfig(**TINY | request.param)


def timm_copy(model):
    """timm's ViT with the weights of a Transformer baseline."""
    config = model.config
    copy = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        qkv_bias=False,
        proj_bias=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        global_pool=config.pool,
        class_token=config.pool == "token",
        fc_norm=False,
        dynamic_img_size=True,
    ).to(model.patch_embed.proj.weight)
    ours, theirs = model.state_dict(), {}
    for name in [name for name in ours if name.endswith("query.weight")]:
        block = name.removesuffix("query.weight")
        theirs[f"{block}qkv.weight"] = torch.cat([ours.pop(f"{block}{x}.weight") for x in ("query", "key", "value")])
    theirs |= ours
    renamed = {"class_token": "cls_token", "position": "pos_embed", "backbone.": "", "attention_norm": "norm1"}
    renamed |= {"ffn_norm": "norm2", "attention.": "attn.", "out.weight": "proj.weight"}
    renamed |= {"ffn.up": "mlp.fc1", "ffn.down": "mlp.fc2"}
    for old, new in renamed.items():
        theirs = {name.replace(old, new): tensor for name, tensor in theirs.items()}
    copy.load_state_dict(theirs)
    return copy.eval()


@pytest.fixture(params=["token", "avg"])
def with_timm_copy(request):
    model = build(baseline="width", norm_affine=True, pool=request.param)
    return model, timm_copy(model)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 24)])
def test_the_baseline_of_equal_width_is_timms_vit(with_timm_copy, height, width):
    model, theirs = with_timm_copy
    x = images(model, height, width)
    assert model(x).std() > 0.1
    equal = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
    equal(model.forward_features(x), theirs.forward_features(x))
    equal(model.forward_head(model.forward_features(x), True), theirs.forward_head(theirs.forward_features(x), True))
    equal(model(x), theirs(x))


INTERMEDIATES = [
    {},
    {"indices": 2, "norm": True, "return_prefix_tokens": True},
    {"indices": [0, -2], "output_fmt": "NLC", "return_prefix_tokens": True},
    {"indices": (1,), "stop_early": True, "intermediates_only": True},
    {"indices": [0], "stop_early": True},
]


@pytest.mark.parametrize("options", INTERMEDIATES, ids=str)
def test_intermediates_are_those_of_timms_vit(with_timm_copy, options):
    model, theirs = with_timm_copy
    x = images(model, 48, 24)
    torch.testing.assert_close(
        model.forward_intermediates(x, **options), theirs.forward_intermediates(x, **options), rtol=0, atol=1e-10
    )


def test_last_intermediate_is_what_the_classifier_reads(variant):
    model = TokenFormerViT(variant)
    x = images(model, 32, 48)
    last, found = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", return_prefix_tokens=True)
    assert torch.equal(last, model.forward_features(x))
    patches = found[0][0] if variant.pool == "token" else found[0]
    assert torch.equal(patches, last[:, last.shape[1] - 4 * 6 :])
    with pytest.raises(ValueError, match="output_fmt='NHWC': choose NCHW or NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_pooling_takes_the_class_token_or_the_mean():
    for pool, expected in (("token", lambda x: x[:, 0]), ("avg", lambda x: x.mean(1))):
        model = build(pool=pool)
        x = model.forward_features(images(model))
        assert x.shape == (2, 16 + (pool == "token"), 32)
        assert torch.equal(model.forward_head(x, pre_logits=True), expected(x))
        assert torch.equal(model.forward_head(x), model.head(expected(x)))


def test_parameter_count_is_that_of_the_model(variant):
    assert variant.num_params() == TokenFormerViT(variant).num_params()


def check_flops(model):
    """FlopCounterMode sees every matrix product; on meta tensors it runs none of them."""
    for size in (32, 48):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(3, model.config.in_channels, size, size, device="meta"))
        assert counter.get_total_flops() == 3 * model.flops_per_image(size)


def test_flops_are_those_of_the_model(variant):
    with torch.device("meta"):
        model = TokenFormerViT(variant)
    check_flops(model)
    assert [model.flops_per_image(size) for size in (None, 48)] == [variant.flops_per_image(size) for size in (32, 48)]


@pytest.mark.parametrize("init", ["zero_keys", "segment_norm"])
def test_flops_of_a_grown_model(init):
    with torch.device("meta"):
        model = TokenFormerViT(ViTConfig(**TINY))
    grow(model, **GROWN, init=init)
    check_flops(model)


@pytest.mark.parametrize("init", ["official", "scaled"])
def test_initialisation_is_the_table_of_the_docstring(init):
    torch.manual_seed(0)
    config = ViTConfig(image_size=64, patch_size=4, depth=1, dim=256, num_heads=4, num_classes=500, init=init)
    model = TokenFormerViT(config)
    lines = re.findall(r"^ {8}([^>\s].*)$", TokenFormerViT.__doc__, re.MULTILINE)
    title, *rows = (re.split(r"\s{2,}", line) for line in lines)
    assert [row[0] for row in rows] == ["patch_embed.proj", "class_token, position", "head"]
    parameters = dict(model.named_parameters())
    for names, formula in ((row[0], row[title.index(f"init: {init}")]) for row in rows):
        std = eval(formula.replace(" ", "*").replace("^", "**"), {"sqrt": math.sqrt} | vars(config))
        for name in names.split(", "):
            measured = parameters[name if name in parameters else f"{name}.weight"].std().item()
            assert measured == pytest.approx(std, rel=0.15 if name == "class_token" else 0.03)
    model.reset_classifier(300)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for bias in (model.patch_embed.proj.bias, model.head.bias):
        assert not bias.any()


def test_sines_and_cosines_of_rows_and_columns_leave_the_class_token():
    model = build(position="sincos", image_size=48)
    assert "position" not in dict(model.named_parameters())
    assert not model.position[:, 0].any()
    frequency = 10000 ** (-torch.arange(8) / 8)
    row, column = torch.arange(36) // 6, torch.arange(36) % 6
    angles = [torch.outer(x, frequency) for x in (row, column)]
    expected = torch.cat([f(x) for f in (torch.sin, torch.cos) for x in angles], dim=1)
    torch.testing.assert_close(model.position[0, 1:], expected.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_positions_of_another_image_size_are_resampled(pool):
    small, large = build(pool=pool), build(pool=pool, image_size=48)
    x = images(small, 48, 48)
    prefix = int(pool == "token")
    expected = resample_abs_pos_embed(small.position, [6, 6], [4, 4], num_prefix_tokens=prefix)
    state = small.state_dict()
    large.load_state_dict(state)
    assert state["position"].shape == small.position.shape  # the caller's is left alone
    assert torch.equal(large.position, expected)
    assert torch.equal(large.position[:, :prefix], small.position[:, :prefix])
    assert torch.equal(large(x), small(x))  # the same is done when the model is called
    small.load_state_dict(small.state_dict())
    assert torch.equal(small.position, state["position"])


def test_weights_of_another_pooling_are_refused():
    for mine, other in (("token", "avg"), ("avg", "token")):
        with pytest.raises(RuntimeError, match="size mismatch for position"):
            build(pool=mine).load_state_dict(build(pool=other).state_dict())


def test_drop_path_rises_with_depth_and_is_off_in_evaluation():
    model, without = build(drop_path=0.4), build()
    x = images(model)
    assert [getattr(block.drop_path, "drop_prob", 0) for block in model.backbone.blocks] == [0, 0.2, 0.4]
    assert torch.equal(model(x), without(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    assert torch.equal(without.train()(x), without(x))
    always = build(drop_path=1 - 1e-9).backbone.blocks[-1].train()  # both branches go
    tokens = torch.randn(2, 17, 32, dtype=torch.float64)
    assert torch.equal(always(tokens), tokens)


@pytest.mark.parametrize("scale", ["fixed", "learned"])
@pytest.mark.parametrize("init", ["zero_keys", "segment_norm"])
def test_growth_is_exact(init, scale):
    model = build(scale=scale)
    x = images(model)
    features, logits, before = model.forward_features(x), model(x), model.num_params()
    for counts in (GROWN, {"ffn": 96}):
        grow(model, **counts, init=init)
    torch.testing.assert_close(model.forward_features(x), features, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-12)
    gains = 3 * 6 if (init, scale) == ("segment_norm", "learned") else 0  # five layers a block, one of them twice
    assert model.num_params() == before + 3 * 2 * 32 * (3 * 8 + 8 + 32) + gains
    model.train()(x).square().sum().backward()
    for block in model.backbone.blocks:
        new = block.ffn.segments[1]
        assert (new.values if init == "segment_norm" else new.keys).grad.any()


def test_a_learned_tau_trains():
    model = build(scale="learned")
    model(images(model)).square().sum().backward()
    assert all(block.ffn.tau_gain.grad.any() for block in model.backbone.blocks)


def test_checkpointing_computes_every_block_again_and_the_same_gradients():
    model = build(drop_path=0.5).train()
    x = images(model, batch=8)
    runs = Counter()
    for block in model.backbone.blocks:
        block.register_forward_pre_hook(lambda block, _: runs.update([block]))
    for run in (model, lambda x: model.forward_intermediates(x)[0]):
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            runs.clear()
            torch.manual_seed(0)
            gradients.append(torch.autograd.grad(run(x).square().sum(), list(model.backbone.blocks.parameters())))
            assert set(runs.values()) == {1 + enable}
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_model_gives_the_same():
    model = build(depth=1, pool="token")
    grow(model, **GROWN, init="segment_norm")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-12)


BAD_CONFIGS = [
    ({"patch_size": 7}, "patch_size=7 does not divide image_size=32: the nearest size is 35"),
    ({"pool": "max"}, "pool='max': choose one of token, avg"),
    ({"position": "rope"}, "position='rope': choose one of learned, sincos"),
    ({"drop_path": 1.0}, "drop_path=1.0"),
    ({"num_classes": -1}, "num_classes=-1"),
    ({"in_channels": 0}, "in_channels=0"),
    ({"position": "sincos", "dim": 30, "num_heads": 3}, "position='sincos': dim=30 must be a multiple of 4"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS, ids=[str(change) for change, _ in BAD_CONFIGS])
def test_bad_sizes_are_refused_with_a_fix(change, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**TINY | change)
