"""Anchored tokens: divided by the norm of others, as large as they are, and taken away again."""

import math

import pytest
import torch
from torch.nn.functional import gelu

from tests.tokenformer.test_growth import tiny, trained_a_little
from tokenformer import Pattention, grow
from tokenformer.growth import append_tokens, grow_layers, pattention_layers, remove_segments
from tokenformer.matched_keys import matched_key_stds, measuring_scores


def test_anchored_scores_are_divided_by_the_norm_of_the_others():
    """Whatever comes after them: tokens that take part in that norm, or that do not."""
    torch.manual_seed(0)
    layer = Pattention(16, 12, 24).double()
    for init, count in (("anchored", 8), ("zero_keys", 6), ("anchored", 4)):
        append_tokens(layer, count, init)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 16, dtype=torch.float64)
    old, new = ([layer.segments[i] for i in which] for which in ((0, 2), (1, 3)))
    norm = torch.cat([x @ segment.keys.T for segment in old], dim=1).norm(dim=1, keepdim=True)
    parts = [gelu(math.sqrt(24) * (x @ s.keys.T) / norm) @ s.values for s in (*old, *new)]
    torch.testing.assert_close(layer(x), sum(parts), rtol=1e-12, atol=1e-12)
    assert layer.default_taus()[0][1] == math.sqrt(30)
    with pytest.raises(ValueError, match="split needs one norm of all tokens"):
        append_tokens(layer, 42, "split")
    other = Pattention(16, 12, 24).double()
    state = layer.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match=r"segments\.1\.norm_weight=0\.5: scores count in the norm"):
        other.load_state_dict(state | {"segments.1.norm_weight": torch.tensor([0.5])})


def test_matched_keys_have_scores_as_large_as_the_old_ones():
    model = trained_a_little(tiny()).double()
    grow(model, ffn=96, init="anchored")  # without data: twice the RMS of the old keys
    old, new = (segment.keys.detach() for segment in model.backbone.blocks[0].ffn.segments)
    assert new.std().item() == pytest.approx(2 * old.square().mean().sqrt().item(), rel=0.1)
    ids = torch.randint(0, 100, (4, 16))
    with measuring_scores(model) as sums:
        model(ids[:2])
        model(ids[2:])
    stds = matched_key_stds(model, sums)
    assert sums.keys() == stds.keys() == pattention_layers(model).keys()
    name = "backbone.blocks.0.attention.query"
    layer, seen = model.get_submodule(name), []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = model(ids)
    grow_layers(model, {name: 2000}, init="anchored", key_stds=stds)
    old, new = ((seen[0] @ segment.keys.T).square().mean().item() for segment in layer.segments)
    assert new / old == pytest.approx(1, rel=0.1)
    assert torch.equal(model(ids), before)
    assert stds[name] == float(f"{stds[name]:.3g}")
    assert matched_key_stds(model, sums | {name: torch.zeros(2)})[name] == layer.key_std


@pytest.mark.parametrize("init", ["anchored", "segment_norm"])
def test_removed_segments_leave_the_model_of_before_to_the_bit(init):
    model = tiny()
    ids = torch.randint(0, 100, (2, 16))
    before, state = model(ids), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    old = list(model.parameters())
    grow(model, ffn=96, init=init)
    for parameter in old:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    assert not torch.allclose(model(ids), before, rtol=0.1)
    remove_segments(model)
    assert torch.equal(model(ids), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    grow(model, ffn=96, init="zero_keys")
    with pytest.raises(ValueError, match=r"segment 1 of backbone\.blocks\.0\.ffn shares its norm"):
        remove_segments(model)
    with pytest.raises(ValueError, match="keep=0"):
        remove_segments(model, 0)
