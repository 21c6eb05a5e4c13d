"""The layer: its state, its tau, its growth against the released implementation."""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ASSETS
from tokenformer import Pattention, pattention
from tokenformer.growth import append_tokens
from tokenformer.operator import WEIGHT_SECOND_MOMENT, default_tau

KINDS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
L2_KINDS = KINDS[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_the_operator(kind):
    layer = Pattention(16, 12, 24, score_norm=kind)
    x = torch.randn(3, 5, 16)
    tokens = layer.segments[0]
    torch.testing.assert_close(layer(x), pattention(x, tokens.keys, tokens.values, score_norm=kind))


def test_tau_is_in_the_state_and_survives_every_cast():
    layer = Pattention(16, 12, 23)
    for cast in (layer.half, layer.bfloat16, layer.float, layer.double):
        assert cast().state_dict()["tau"].item() == math.sqrt(23)
    assert layer.segments[0].keys.dtype == torch.float64


def test_meta_layer_is_initialised_by_reset_parameters():
    with torch.device("meta"):
        layer = Pattention(16, 12, 24, scale="learned")
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.tau.item() == math.sqrt(24)
    assert layer.tau_gain.item() == 0
    assert layer(torch.randn(2, 16)).isfinite().all()


def test_learned_tau_has_one_trained_element():
    layer = Pattention(16, 12, 24, scale="learned")
    assert layer.tau_gain.shape == (1,)
    x = torch.randn(7, 16)
    before = layer(x)
    layer(x).square().sum().backward()
    assert layer.tau_gain.grad.abs() > 0
    with torch.no_grad():
        layer.tau_gain += 0.1
    tokens = layer.segments[0]
    expected = pattention(x, tokens.keys, tokens.values, math.sqrt(24) * math.e)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layer(x), before)


def test_current_tau_follows_the_number_of_tokens():
    layer = Pattention(16, 12, 24, scale="current")
    append_tokens(layer, 16, "zero_keys")
    assert layer.tau.item() == math.sqrt(40)


@pytest.mark.parametrize(("mode", "scale"), [("tau_old", "fixed"), ("tau_new", "current")])
@pytest.mark.parametrize("keys", ["zero_keys", "random_keys"])
@pytest.mark.parametrize("kind", L2_KINDS)
def test_growth_equals_the_golden_vectors(kind, keys, mode, scale):
    golden = load_file(ASSETS / "golden_growth.safetensors")
    layer = Pattention(16, 12, 24, score_norm=kind, scale=scale).double()
    append_tokens(layer, 16, "zero_keys")
    old, new = layer.segments
    with torch.no_grad():
        old.keys.copy_(golden["K_old"])
        old.values.copy_(golden["V_old"])
        new.keys.copy_(golden["K_new_zero" if keys == "zero_keys" else "K_new_random"])
        new.values.copy_(golden["V_new"])
    x = golden["x"].double().requires_grad_()
    out = layer(x)
    (out * golden["upstream_grad"]).sum().backward()
    name = f"{kind}.{keys}.{mode}"
    pairs = {
        "out": out,
        "grad_x": x.grad,
        "grad_K": torch.cat((old.keys.grad, new.keys.grad)),
        "grad_V": torch.cat((old.values.grad, new.values.grad)),
    }
    for what, mine in pairs.items():
        torch.testing.assert_close(mine, golden[f"{name}.{what}"], rtol=0, atol=1e-12)


def test_a_grown_state_loads_into_a_small_layer_and_back():
    grown, small = Pattention(16, 12, 24), Pattention(16, 12, 24)
    ungrown_state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    append_tokens(grown, 8, generator=torch.Generator().manual_seed(0))
    small.load_state_dict(grown.state_dict())
    x = torch.randn(5, 16)
    assert small.num_tokens == 32
    assert torch.equal(small(x), grown(x))
    small.load_state_dict(ungrown_state)
    assert small.num_tokens == 24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [64, 1024])
def test_default_values_give_an_output_rms_of_a_tenth(kind, num_tokens):
    torch.manual_seed(0)
    layer = Pattention(256, 256, num_tokens, score_norm=kind)
    rms = layer(torch.randn(512, 256)).square().mean().sqrt()
    assert 0.085 < rms < 0.115
    assert set(WEIGHT_SECOND_MOMENT) == set(KINDS)
    assert default_tau(num_tokens, kind) == (num_tokens if kind == "softmax" else math.sqrt(num_tokens))


def test_parameter_tokens_take_torchs_parametrizations():
    """By which LoRA and weight norm work. A ModuleDict, where torch keeps them, has methods of these names."""
    layer, x = Pattention(4, 5, 6), torch.randn(3, 4)
    before, (segment,) = layer(x), layer.segments
    tau, tokens = layer.tau, {name: getattr(segment, name).detach().clone() for name in ("keys", "values")}

    class Summed(torch.nn.Module):
        def forward(self, tensor):
            return tensor.cumsum(0)

    for name in tokens:
        torch.nn.utils.parametrize.register_parametrization(segment, name, Summed())
    expected = pattention(x, tokens["keys"].cumsum(0), tokens["values"].cumsum(0), tau)
    torch.testing.assert_close(layer(x), expected)
    assert "segments.0.parametrizations.keys.original" in layer.state_dict()
    for name in tokens:
        torch.nn.utils.parametrize.remove_parametrizations(segment, name, leave_parametrized=False)
    assert torch.equal(layer(x), before)
    assert {name for name, _ in layer.named_parameters()} == {"segments.0.keys", "segments.0.values"}
