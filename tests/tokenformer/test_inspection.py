"""What `tokenformer inspect` counts, against the paper's formula on tiny models."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.tokenformer.tiny_lm import IDS, LM
from tests.tokenformer.tiny_vit import build, images
from tokenformer import Pattention, TokenFormerLM, grow, inspection
from tokenformer.growth import pattention_layers
from tokenformer.inspection import (
    LayerStatistics,
    geometry,
    parts_of,
    scored,
    scores_and_weights,
    segments_of,
    silenced,
    watching,
)


def language_model():
    torch.manual_seed(0)
    return TokenFormerLM(LM).double().eval()


@pytest.mark.parametrize("score_norm", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_weights_times_values_are_what_the_layer_gives(score_norm):
    layer = Pattention(8, 6, 5, score_norm=score_norm).double()
    x = torch.randn(7, 8, dtype=torch.float64)
    scores, weights = scores_and_weights(layer, x)
    (segment,) = segments_of(layer)
    torch.testing.assert_close(scores, x @ layer.segments[0].keys.T)
    torch.testing.assert_close(weights @ segment.values, layer(x))


def test_segments_stand_in_the_order_of_their_weights():
    model = language_model()
    for i, init in enumerate(("anchored", "random", "segment_norm", "anchored")):
        grow(model, ffn=52 + 2 * i, init=init, scale="current" if init == "random" else "fixed", seed=i)
    layer = model.backbone.blocks[0].ffn
    with torch.no_grad():
        for segment in layer.segments:  # new ones have values or keys of zero
            segment.keys.normal_()
            segment.values.normal_()
        x = torch.randn(7, 32, dtype=torch.float64)
        segments = list(segments_of(layer))
        assert [segment.number for segment in segments] == [0, 2, 1, 3, 4]
        assert all(segment.keys is layer.segments[segment.number].keys for segment in segments)
        assert [segment.tau for segment in segments] == [float(layer.tau)] * 3 + [float(layer.segments[3].tau)] * 2
        _, weights = scores_and_weights(layer, x)
        torch.testing.assert_close(weights @ torch.cat([segment.values for segment in segments]), layer(x))


def test_sums_are_those_of_the_formula():
    model, k = language_model(), 3
    layers = pattention_layers(model)
    found = {name: LayerStatistics(layer.num_tokens, k, torch.device("cpu")) for name, layer in layers.items()}
    inputs = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].flatten(0, 1)))
    places = torch.arange(48).view(2, 24)
    places[:, 20:] = -1  # fill up
    with torch.no_grad():
        for batch in places:
            with watching(model, found, batch):
                model(IDS)
        model(IDS)  # nobody watches
        for name, layer in layers.items():
            x = torch.cat([x[:20] for x in inputs[name][:2]])
            scores = x @ layer.segments[0].keys.T  # (40, N)
            weights = F.gelu(layer.tau * scores / scores.norm(dim=1, keepdim=True))
            assert found[name].inputs == 40
            assert torch.equal(found[name].fires, (weights > 0).sum(0).double())
            torch.testing.assert_close(found[name].weights, weights.abs().sum(0))
            torch.testing.assert_close(found[name].squares, scores.square().sum(0))
            top = weights.T.sort(descending=True).values[:, :k]
            torch.testing.assert_close(found[name].top.double(), top, atol=1e-6, rtol=0)
            at_place = dict(zip(places[:, :20].flatten().tolist(), weights, strict=True))
            for n, (kept, where) in enumerate(zip(top, found[name].places.tolist(), strict=True)):
                assert [float(at_place[place][n]) for place in where] == kept.tolist()


def test_fewer_inputs_than_are_kept():
    found = LayerStatistics(2, 4, torch.device("cpu"))
    found.add(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.1]]), torch.tensor([7]))
    assert found.places.tolist() == [[7, -1, -1, -1]] * 2
    assert found.fires.tolist() == [1, 0]


def test_geometry_of_known_vectors(monkeypatch):
    monkeypatch.setattr(inspection, "BLOCK_ROWS", 3)
    basis = geometry(torch.cat((3 * torch.eye(5), torch.zeros(2, 5))))  # zeros have no direction
    assert basis.effective_rank == pytest.approx(5)
    assert (basis.cos_rms, basis.cos_max) == (0, 0)
    assert basis.angles.nonzero().item() in (89, 90)
    assert basis.angles.sum() == 10
    line = geometry(torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0]]))
    assert line.effective_rank == pytest.approx(1, abs=1e-3)
    assert line.cos_max == pytest.approx(line.cos_rms) == 1
    vectors = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = torch.linalg.svdvals(vectors) / torch.linalg.svdvals(vectors).sum()
    cosines = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)[tuple(torch.triu_indices(8, 8, 1))]
    found = geometry(vectors)
    assert found.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
    assert found.cos_rms == pytest.approx(float(cosines.square().mean().sqrt()))
    assert found.cos_max == pytest.approx(float(cosines.abs().max()))
    assert found.angles.sum() == 28
    assert geometry(torch.zeros(3, 2)).effective_rank == 0
    assert geometry(torch.ones(1, 2)).effective_rank == pytest.approx(1)


def test_silent_parts_are_as_zero_value_tokens():
    model = language_model()
    parts = parts_of(model)
    assert {name: len(layers) for name, layers in parts.items()} == {
        "feed-forward": 2,
        "projections": 8,
        "block 0": 5,
        "block 1": 5,
    }
    assert len(parts_of(build())["block 2"]) == 5
    expected = model(IDS)
    for name in parts:
        zeroed = copy.deepcopy(model)
        with torch.no_grad():
            for layer in parts_of(zeroed)[name]:
                layer.segments[0].values.zero_()
        with silenced(parts[name]):
            assert torch.equal(model(IDS), zeroed(IDS))
        assert not torch.equal(zeroed(IDS), expected)
    assert torch.equal(model(IDS), expected)


def test_scores_of_predictions(monkeypatch):
    monkeypatch.setattr(inspection, "BLOCK_ROWS", 5)
    model = language_model()
    targets = IDS.flatten()
    nats, entropy = model.nats_and_entropy(IDS, IDS)
    found = scored(model.hidden(IDS).flatten(0, 1), lambda x: F.linear(x, model.output_weight), targets)
    torch.testing.assert_close(found.nats, nats.flatten())
    torch.testing.assert_close(found.entropy, entropy.flatten())
    probabilities = model(IDS).flatten(0, 1).softmax(-1)
    torch.testing.assert_close(found.confidence, probabilities.max(-1).values)
    assert torch.equal(found.likeliest, probabilities.argmax(-1))
    vit = build()
    unknown = scored(vit.forward_features(images(vit))[:, 0], vit.head, torch.tensor([3, -100]))
    assert unknown.nats.isnan().tolist() == [False, True]
