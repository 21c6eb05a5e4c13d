"""A grown model without some of its segments is the model from before them, to the bit."""

from itertools import pairwise

import pytest
import torch

from tests.tokenformer.test_anchored import tiny
from tokenformer.growth import grow
from tokenformer.interop import consolidated_state
from tokenformer.parts import keep_segments, using_segments

IDS = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))


def train_new(model, old):
    """A few steps of what is not old."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter not in old)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("layers", ["all", "ffn"])
@pytest.mark.parametrize("init", ["anchored", "segment_norm", "pairs"])
def test_without_a_segment_it_is_the_model_from_before_it(init, layers):
    """Grown twice, of which only what is new was trained. The second alone is the model that never had the first."""
    model = tiny()
    outputs = [model(IDS)]
    for factor in (2, 3):
        old = set(model.parameters())
        sizes = {kind: getattr(model.config, f"{kind}_tokens") for kind in ("qkv", "proj", "ffn")}
        asked = {kind: factor * size for kind, size in sizes.items() if layers in ("all", kind)}
        grow(model, **asked, init=init, layers=layers)
        train_new(model, old)
        outputs.append(model(IDS))
    assert not any(torch.allclose(a, b, rtol=0.1) for a, b in pairwise(outputs))
    for k in (1, 2, 3):
        with using_segments(model, range(k)):
            assert torch.equal(model(IDS), outputs[k - 1])
    assert torch.equal(model(IDS), outputs[2])
    first = model.backbone.blocks[0].ffn.segments[1]
    with using_segments(model, [0, 2]):
        middle = model(IDS)
        assert not any(torch.allclose(middle, output) for output in outputs)
        with torch.no_grad():  # what is left out is not used
            first.values.zero_()
        assert torch.equal(model(IDS), middle)
    stored, block = consolidated_state(model), model.backbone.blocks[0]
    assert all(
        stored[f"backbone.blocks.0.ffn.segments.{i}.keys"].shape == block.ffn.segments[i].keys.shape for i in (1, 2)
    )
    keep_segments(model, [0])
    assert torch.equal(model(IDS), outputs[0])
    assert all(len(block.ffn.segments) == 1 for block in model.backbone.blocks)


def test_what_can_not_be_left_out_stays():
    model = tiny()
    grow(model, ffn=80, init="segment_norm")
    grow(model, ffn=96, init="zero_keys")  # in the norm of the segment before it
    grow(model, ffn=112, init="anchored")
    before = model(IDS)
    for segments, message in (
        (
            [0, 1, 3],
            r"segment 2 of backbone\.blocks\.0\.ffn shares its norm with those before it, .*only tokens",
        ),
        ([0, 3], r"segment 3 of backbone\.blocks\.0\.ffn has its norm from segment 1: leave out both, or none"),
        ([1, 2], r"segments=\[1, 2\]: choose among 0 to 3, with 0"),
        ([0, 4], "choose among 0 to 3"),
        ([], "choose among 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message), using_segments(model, segments):
            pass
    assert torch.equal(model(IDS), before)
    with using_segments(model, range(3)):
        assert len(model.backbone.blocks[1].ffn.segments) == 3
    with using_segments(model, [0]):
        assert len(model.backbone.blocks[1].ffn.segments) == 1
    grow(model, qkv=96, init="segment_norm")
    with pytest.raises(ValueError, match="layers have 2 or 4 segments, so one number means several growths"):
        keep_segments(model, [0])
