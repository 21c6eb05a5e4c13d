"""Which tokens are used, and models without the others."""

import pytest
import torch
from torch.nn import functional as F

from tokenformer import LMConfig, TokenFormerLM
from tokenformer.growth import append_tokens, pattention_layers
from tokenformer.inspection import LayerStatistics, scores_and_weights, watching
from tokenformer.pruning import gradient_use, keep_tokens, most_used, use

IDS = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(0))
TARGETS = IDS.roll(-1, 1)
SIZES = {"depth": 2, "dim": 16, "num_heads": 2, "qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 20}


@pytest.fixture
def model():
    """Of two layers, one with tokens of an own norm and anchored ones, which are trained a little."""
    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(vocab_size=32, init="scaled", **SIZES)).double().eval()
    ffn = model.backbone.blocks[0].ffn
    for init, added in (("anchored", 6), ("segment_norm", 5), ("zero_keys", 4), ("anchored", 3)):
        append_tokens(ffn, added, init)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def measure(model):
    found = {name: LayerStatistics(layer.num_tokens, 1, IDS.device) for name, layer in pattention_layers(model).items()}
    with watching(model, found, torch.arange(IDS.numel())), torch.no_grad():
        model(IDS)
    return found


def test_use_is_the_mean_of_what_a_token_adds(model):
    inputs, layer = [], model.backbone.blocks[0].ffn
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    found = use(model, measure(model))["backbone.blocks.0.ffn"]
    hook.remove()
    assert [len(part) for part in found] == [20, 6, 5, 4, 3]
    for segment, part in zip(layer.segments, found, strict=True):
        values, zeros = segment.values.data.clone(), torch.zeros_like(segment.values)
        for row in (0, len(part) - 1):
            whole = layer(inputs[0])
            segment.values.data[row] = zeros[row]
            without = layer(inputs[0])
            segment.values.data = values.clone()
            torch.testing.assert_close(part[row], (whole - without).norm(dim=1).mean().detach())


def test_gradient_use_is_the_derivative_along_the_value(model):
    found = gradient_use(model, model.loss(IDS, TARGETS))
    segment = model.backbone.blocks[0].ffn.segments[1]
    values = segment.values.data.clone()
    for row in range(len(values)):
        losses = []
        for size in (1 + 1e-4, 1 - 1e-4):
            segment.values.data[row] = size * values[row]
            losses.append(model.loss(IDS, TARGETS).item())
        segment.values.data = values.clone()
        slope = abs(losses[0] - losses[1]) / 2e-4
        assert float(found["backbone.blocks.0.ffn"][1][row]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_tokens_that_do_nothing_go_first_and_nothing_changes(model):
    with torch.no_grad():
        for layer in pattention_layers(model).values():
            for segment in layer.segments:  # of 20, 6, 5, 4 and 3 tokens: 18 of 38 do something
                segment.values[::2] = 0
                if not segment.is_anchored:  # its scores count in a norm
                    segment.keys[::2] = 0
    before, statistics = model(IDS), measure(model)
    kept = most_used(model, use(model, statistics), statistics, keep=0.5)
    taus = [tau for _, factors in kept.values() for tau in factors]
    assert taus == pytest.approx([1.0] * len(taus), rel=1e-12)
    keep_tokens(model, kept)
    torch.testing.assert_close(model(IDS), before, rtol=1e-12, atol=1e-12)
    assert model.backbone.blocks[0].ffn.num_tokens == 19


def test_the_weights_of_what_stays_stay(model):
    """Tau goes along with the norm of what is left."""
    layer = model.backbone.blocks[1].ffn
    x = torch.randn(500, 16, dtype=torch.float64)
    before = scores_and_weights(layer, x)[1]
    statistics = measure(model)
    statistics["backbone.blocks.1.ffn"].squares = (x @ layer.segments[0].keys.detach().T).square().sum(0)
    kept = most_used(model, use(model, statistics), statistics, keep=0.3)
    keep_tokens(model, kept)
    after, rows = scores_and_weights(layer, x)[1], kept["backbone.blocks.1.ffn"].rows[0]
    assert after.shape == (500, 6)
    assert float(after.norm() / before[:, rows].norm()) == pytest.approx(1, abs=0.1)
    assert float(F.cosine_similarity(after.flatten(), before[:, rows].flatten(), 0)) > 0.95


def test_each_segment_keeps_one(model):
    statistics = measure(model)
    kept = most_used(model, use(model, statistics), statistics, keep=0.01)
    assert [len(rows) for rows in kept["backbone.blocks.0.ffn"].rows] == [1] * 5
    keep_tokens(model, kept)
    assert model(IDS).isfinite().all()


def test_what_can_not_be_ranked_is_refused():
    model = TokenFormerLM(LMConfig(vocab_size=32, score_norm="softmax", **SIZES))
    statistics = measure(model)
    with pytest.raises(ValueError, match=r"score_norm=softmax of backbone\.blocks\.0\.attention\.query: tokens"):
        most_used(model, use(model, statistics), statistics, 0.5)
    with pytest.raises(ValueError, match="keep=0: the share"):
        most_used(model, {}, {}, 0)
