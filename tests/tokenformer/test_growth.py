"""Growth leaves the function of a model as it is, in every kind that says so, and brings tokens that can learn."""

import math

import pytest
import torch

from tokenformer import LMConfig, Pattention, TokenFormerLM, TokenFormerViT, ViTConfig, grow
from tokenformer.growth import anneal_taus, append_tokens, plan_growth, why_not_exact
from tokenformer.net2net import widen

TINY = {"vocab_size": 100, "depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 16, "proj_tokens": 24, "ffn_tokens": 64}
EXACT = ("zero_keys", "anchored", "segment_norm", "pairs", "split")
L2_KINDS = ("l2_norm_gelu", "gelu_l2_norm")
# float64, float32, and equal in bfloat16 where no sum is taken in another order
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def tiny(**changes):
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(**TINY | {"init": "scaled"} | changes))


def trained_a_little(layer):
    """Away from its initialisation, tau too."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter) * (parameter.std() if parameter.numel() > 1 else 0.1)
    return layer


@pytest.mark.parametrize("scale", ["fixed", "learned"])
@pytest.mark.parametrize("kind", [*L2_KINDS, "softmax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", EXACT)
def test_growth_is_exact_again_and_again(init, dtype, kind, scale):
    if init == "zero_keys" and kind == "softmax":
        assert "softmax" in why_not_exact(init, "fixed", kind)
        return
    torch.manual_seed(0)
    layer = trained_a_little(Pattention(64, 48, 96, score_norm=kind, scale=scale)).to(dtype)
    if init == "anchored" and kind != "l2_norm_gelu":
        with pytest.raises(ValueError, match=f"anchored needs score_norm l2_norm_gelu, the layer has {kind}"):
            append_tokens(layer, 96, init)
        return
    x = torch.randn(33, 64, dtype=dtype)
    before = layer(x)
    for added in (96, 192):
        append_tokens(layer, added, init, torch.Generator().manual_seed(added))
        change = (layer(x) - before).double().norm() / before.double().norm()
        if dtype == torch.bfloat16 and init in ("zero_keys", "anchored", "segment_norm", "pairs"):
            assert change == 0
        elif dtype == torch.bfloat16:  # split rounds the divided values to 8 bits
            assert change < 2e-2
        else:
            assert change <= TOLERANCE[dtype]
    assert layer.num_tokens == 384
    assert why_not_exact(init, "fixed", kind) is None


@pytest.mark.parametrize("init", ["zero_keys", "anchored", "segment_norm", "pairs"])
def test_old_tokens_keep_their_bits(init):
    layer = Pattention(16, 12, 24)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    append_tokens(layer, 8, init)
    after = layer.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_random_growth_changes_the_function_and_says_so():
    layer = Pattention(64, 48, 96)
    x = torch.randn(9, 64)
    before = layer(x)
    append_tokens(layer, 96, "random")
    assert not torch.allclose(layer(x), before, rtol=0.1)
    assert "random" in why_not_exact("random", "fixed", "l2_norm_gelu")


@pytest.mark.parametrize("scale", ["fixed", "learned"])
@pytest.mark.parametrize("init", [*EXACT, "random"])
def test_new_tokens_learn_from_the_first_step(init, scale):
    layer = Pattention(16, 12, 24, scale=scale)
    append_tokens(layer, 24, init, torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    x, target = torch.randn(40, 16), torch.randn(40, 12)
    new = layer.segments[1]
    for step in range(2):
        optimizer.zero_grad()
        (layer(x) - target).square().sum().backward()
        if step == 0:  # each kind has a gradient in keys or values at once, and in both after a step
            assert (new.keys.grad.abs().sum() > 0) == (init not in ("anchored", "segment_norm"))
            assert (new.values.grad.abs().sum() > 0) == (init != "zero_keys")
        optimizer.step()
    assert (new.keys.grad.norm(dim=1) > 0).all()
    assert (new.values.grad.norm(dim=1) > 0).all()


def test_copies_part():
    """The two of a pair have different gradients, else they would stay alike."""
    for init in ("pairs", "split"):
        layer = Pattention(16, 12, 24)
        append_tokens(layer, 24, init, torch.Generator().manual_seed(1))
        layer(torch.randn(40, 16)).square().sum().backward()
        new = layer.segments[1].keys.grad
        pair = (new[::2], new[1::2]) if init == "pairs" else (layer.segments[0].keys.grad, new)
        assert ((pair[0] - pair[1]).norm(dim=1) > 1e-3 * pair[0].norm(dim=1)).all(), init


def test_a_segment_with_its_own_norm_leaves_the_others_alone():
    """Whatever its keys become, the old tokens' part of the output stays."""
    layer = Pattention(16, 12, 24)
    x = torch.randn(5, 16)
    before = layer(x)
    append_tokens(layer, 8, "segment_norm")
    with torch.no_grad():
        layer.segments[1].keys.mul_(100)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.segments[1].values.normal_()
    alone = Pattention(16, 12, 8)
    alone.load_state_dict(
        {
            "tau": layer.segments[1].tau,
            "segments.0.keys": layer.segments[1].keys,
            "segments.0.values": layer.segments[1].values,
        }
    )
    torch.testing.assert_close(layer(x), before + alone(x))


@pytest.mark.parametrize("scale", ["fixed", "learned", "anneal"])
def test_a_grown_model_is_exact_and_loads_into_a_small_one(scale):
    for init in ("zero_keys", "anchored", "segment_norm"):
        model = tiny().double()
        ids = torch.randint(0, 100, (2, 16))
        before = model(ids)
        grow(model, qkv=32, ffn=96, init=init, scale=scale)
        grow(model, proj=32, ffn=128, init=init, scale=scale)
        torch.testing.assert_close(model(ids), before, rtol=1e-12, atol=1e-14)
        sizes = {"qkv_tokens": 32, "proj_tokens": 32, "ffn_tokens": 128}
        expected = LMConfig(**TINY | sizes)
        gains = sum(name.endswith("tau_gain") for name, _ in model.named_parameters())
        # 2 blocks; one gain a layer, and one for each segment with a norm of its own (ffn has two)
        assert gains == (0 if scale != "learned" else 2 * (5 + 6) if init == "segment_norm" else 2 * 5)
        assert model.num_params() == expected.num_params() + gains
        assert model.flops_per_token(16) == expected.flops_per_token(16)
        trained_a_little(model)
        small = tiny().double()
        small.load_state_dict(model.state_dict())
        assert torch.equal(small(ids), model(ids))
        small.load_state_dict(tiny().state_dict())  # and back
        assert torch.equal(small(ids), before)


def test_the_same_growth_everywhere_and_another_by_another_seed():
    models = [tiny() for _ in range(3)]
    torch.manual_seed(5)  # the global generator has no part in it
    for model, seed in zip(models, (0, 0, 1), strict=True):
        grow(model, ffn=96, qkv=32, seed=seed)
    one, same, other = (dict(model.state_dict()) for model in models)
    new = "backbone.blocks.0.ffn.segments.1.keys"
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one[new], other[new])
    assert not torch.equal(one[new], one["backbone.blocks.1.ffn.segments.1.keys"])


def test_layers_can_be_chosen():
    found = {
        "all": 10,
        "ffn": 2,
        ("query", "out"): 4,
        "backbone.blocks.1.*": 5,
        ("ffn", "backbone.blocks.0.attention.*"): 6,
    }
    for layers, count in found.items():
        planned = plan_growth(tiny(), {}, layers if isinstance(layers, str) else list(layers), factor=2.0)
        assert len(planned) == count
    assert plan_growth(tiny(), {"ffn": 100}, ["ffn"]) == {f"backbone.blocks.{i}.ffn": 36 for i in (0, 1)}
    assert plan_growth(tiny(), {}, "ffn", factor=1.5) == {f"backbone.blocks.{i}.ffn": 32 for i in (0, 1)}


BAD_GROWTH = [
    ({}, "at least one of qkv, proj, ffn"),
    ({"qkv": 64, "layers": ["ffn"]}, "qkv=64: there is no such layer among"),
    ({"ffn": 96, "scale": "leanred"}, "scale='leanred': choose one of fixed"),
    ({"qkv": 100, "ffn": 63}, "64 parameter tokens, more than 63"),
    ({"ffn": 100, "layers": ["fnn"]}, "'fnn' is none of the model's: choose all, some of query, key, value, out, ffn"),
    ({"ffn": 100, "init": "split"}, "split copies all 64 tokens of .* ask for 128 instead of 100"),
    ({"ffn": 95, "init": "pairs"}, "would get 31: ask for 96"),
    ({"ffn": 96, "init": "zeros"}, "init='zeros': choose one of anchored"),
]


@pytest.mark.parametrize(("change", "message"), BAD_GROWTH, ids=[message[:20] for _, message in BAD_GROWTH])
def test_growth_refuses_what_it_cannot_do_and_changes_nothing(change, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        grow(model, **change)
    assert model.num_params() == LMConfig(**TINY).num_params()


def test_a_baseline_does_not_grow_by_tokens():
    with pytest.raises(ValueError, match="baseline does not grow"):
        grow(TokenFormerLM(LMConfig(**TINY, baseline="width")), ffn=100)


def test_tau_after_growth():
    fixed, current = tiny(), tiny()
    grow(fixed, ffn=256, init="random")
    grow(current, ffn=256, init="random", scale="current")
    name = "backbone.blocks.0.ffn"
    assert fixed.get_submodule(name).tau.item() == 8.0
    assert current.get_submodule(name).tau.item() == 16.0
    for left in range(10, 0, -1):
        anneal_taus(fixed, left)
        if left == 6:
            assert fixed.get_submodule(name).tau.item() == pytest.approx(12.0, rel=1e-12)  # half of the way
    assert fixed.get_submodule(name).tau.item() == pytest.approx(16.0, rel=1e-12)
    assert fixed.get_submodule("backbone.blocks.0.attention.query").tau.item() == 4.0  # it did not grow


def test_split_lets_tau_follow_the_norm():
    layer = Pattention(16, 12, 24)
    append_tokens(layer, 48, "split")
    assert layer.tau.item() == pytest.approx(math.sqrt(72), rel=1e-15)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    "variant",
    [
        {"baseline": "width"},
        {"baseline": "parameters", "tie_embeddings": False},
        {"baseline": "width", "norm_affine": True},
    ],
    ids=str,
)
def test_widening_a_baseline_keeps_its_function(variant, factor):
    model = trained_a_little(tiny(ffn_tokens=128, **variant)).double()
    ids = torch.randint(0, 100, (2, 16))
    wide = widen(model, factor)
    torch.testing.assert_close(wide(ids), model(ids), rtol=1e-12, atol=1e-12)
    assert (wide.config.dim, wide.config.num_heads) == (32 * factor, 4 * factor)
    assert wide.num_params() == wide.config.num_params()
    hidden = wide.backbone.blocks[0].ffn.up.weight
    assert len(hidden) == factor * len(model.backbone.blocks[0].ffn.up.weight)
    wide.loss(ids[:, :-1], ids[:, 1:]).backward()
    gradient = hidden.grad.unflatten(0, (factor, -1))
    assert not torch.allclose(gradient[0], gradient[1], rtol=0.05)  # the copies part


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_widening_an_image_baseline_keeps_its_function(pool):
    sizes = {"depth": 2, "dim": 32, "num_heads": 4, "image_size": 16, "patch_size": 4, "num_classes": 7}
    model = trained_a_little(TokenFormerViT(ViTConfig(**sizes, pool=pool, baseline="width"))).double()
    images = torch.randn(2, 3, 16, 16).double()
    wide = widen(model, 3)
    torch.testing.assert_close(wide(images), model(images), rtol=1e-12, atol=1e-12)
    assert wide.num_params() == wide.config.num_params() > 8 * model.num_params()
    with pytest.raises(ValueError, match="sincos"):
        widen(TokenFormerViT(ViTConfig(**sizes, baseline="width", position="sincos")), 2)
    with pytest.raises(ValueError, match="Linear is not a baseline"):
        widen(torch.nn.Linear(2, 2), 2)


def test_widening_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="grows by parameter tokens"):
        widen(tiny(), 2)
    with pytest.raises(ValueError, match="width=1"):
        widen(tiny(baseline="width"), 1)
