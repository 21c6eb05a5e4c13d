"""The first tokens of a model: used alone in training mode, or cut off."""

import pytest
import torch

from tokenformer import LMConfig, Pattention, TokenFormerLM, TokenFormerViT, ViTConfig, grow
from tokenformer.elastic import elastic_layers, shrunk, use_first
from tokenformer.growth import append_tokens

SIZES = {"depth": 2, "dim": 16, "num_heads": 2, "qkv_tokens": 12, "proj_tokens": 11, "ffn_tokens": 40}
IDS = torch.arange(12).view(2, 6)
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
VIT = {"image_size": 8, "patch_size": 4, "num_classes": 5}
MODELS = {
    "language": (lambda **more: TokenFormerLM(LMConfig(vocab_size=32, init="scaled", **SIZES, **more)), IDS),
    "vision": (lambda **more: TokenFormerViT(ViTConfig(**VIT, **SIZES, **more)), IMAGES),
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"scale": "learned"}, {"score_norm": "softmax"}, {"baseline": "width"}, {"baseline": "parameters"}],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_used_in_training_is_what_is_kept(name, settings):
    torch.manual_seed(0)
    make, x = MODELS[name]
    model = make(**settings).double()
    whole, layers = model.eval()(x), elastic_layers(model)
    smaller = shrunk(model, 0.25)
    use_first(layers, 0.25)
    assert torch.equal(model(x), whole)  # in evaluation all are used
    out = model.train()(x)
    torch.testing.assert_close(out, smaller(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, whole, rtol=1e-3)
    assert smaller.num_params() == smaller.config.num_params() < model.num_params()
    flops = (lambda m: m.flops_per_token(6)) if name == "language" else (lambda m: m.flops_per_image())
    assert flops(model) == flops(smaller) < flops(model.eval())
    assert torch.equal(shrunk(model, 1)(x), whole)


def test_it_is_the_layer_cut_by_hand():
    """tau is sqrt(n), and nothing else of the layer has a gradient."""
    torch.manual_seed(0)
    layer = Pattention(6, 4, num_tokens=20).double()
    small = Pattention(6, 4, num_tokens=5).double()
    small.segments[0].load_state_dict({k: t[:5] for k, t in layer.segments[0].state_dict().items()})
    x = torch.randn(3, 6, dtype=torch.float64)
    layer.in_use = 5
    out = layer(x)
    torch.testing.assert_close(out, small(x), rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    for kind in ("keys", "values"):
        gradient = getattr(layer.segments[0], kind).grad
        assert gradient[:5].abs().min() > 0
        assert not gradient[5:].any()
    use_first({"": layer}, 0.01)
    assert layer.unused_params == 19 * 10  # one token is left
    assert layer.eval().unused_params == 0


def test_a_grown_model_is_shrunk_by_its_tau():
    model = TokenFormerLM(LMConfig(vocab_size=32, **SIZES)).double()
    grow(model, ffn=80, init="zero_keys")
    layer = shrunk(model, 0.5).backbone.blocks[0].ffn
    assert layer.tau.item() == pytest.approx(40**0.5 / 2**0.5)
    assert layer.num_tokens == 40


def test_what_has_no_order_is_refused():
    model = TokenFormerLM(LMConfig(vocab_size=32, **SIZES))
    for keep in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"keep={keep}: the share"):
            shrunk(model, keep)
    append_tokens(model.backbone.blocks[1].ffn, 4, "segment_norm")
    with pytest.raises(ValueError, match=r"backbone\.blocks\.1\.ffn has tokens with a norm of their own"):
        shrunk(model, 0.5)
    with pytest.raises(ValueError, match="neither parameter tokens nor"):
        elastic_layers(torch.nn.Linear(2, 2))
