"""The k largest scores of a row only: against the definition, and on the way of one row and of many."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.sparse import losses, times
from tokenformer import LMConfig, Pattention, TokenFormerLM
from tokenformer.growth import append_tokens


def layer_and_input(rows):
    """With two norms and tokens that are anchored."""
    torch.manual_seed(0)
    layer = Pattention(6, 4, num_tokens=20).double().eval()
    for init in ("segment_norm", "anchored"):
        append_tokens(layer, 10, init)
        torch.nn.init.normal_(layer.segments[-1].values)
    return layer, torch.randn(rows, 6, dtype=torch.float64)


def by_hand(layer, x, k):
    """A row at a time."""
    first, second, anchored = layer.segments
    out = []
    for row in x:
        own, other = first.keys @ row, second.keys @ row
        z = [layer.tau * own / own.norm(), second.tau * other / other.norm()]
        z = torch.cat([*z, second.tau * (anchored.keys @ row) / other.norm()])
        values = torch.cat([first.values, second.values, anchored.values])
        chosen = sorted(range(len(z)), key=lambda i: -z[i])[:k]
        out.append(sum(F.gelu(z[i]) * values[i] for i in chosen))
    return torch.stack(out)


@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("k", [1, 7, 39])
def test_only_the_largest_scores_count(rows, k):
    layer, x = layer_and_input(rows)
    everything = layer(x)
    layer.top_k = k
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x, k), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(layer(x), everything)
        torch.testing.assert_close(layer.train()(x), everything)  # training uses all
        layer.eval().top_k = 40
        torch.testing.assert_close(layer(x), everything, rtol=1e-12, atol=1e-12)
    assert layer(torch.zeros(2, 6).double()).abs().max() == 0
    layer.top_k = 0
    with pytest.raises(ValueError, match="top_k=0: must be at least 1"):
        layer(x)


def test_other_norms_are_refused():
    layer = Pattention(6, 4, num_tokens=20, score_norm="softmax").eval()
    layer.top_k = 2
    with pytest.raises(ValueError, match="top_k: needs score_norm l2_norm_gelu, not softmax"):
        layer(torch.zeros(1, 6))


def test_the_benchmark_in_its_smallest_form():
    torch.manual_seed(0)
    sizes = {"depth": 1, "dim": 16, "num_heads": 2, "qkv_tokens": 12, "proj_tokens": 12, "ffn_tokens": 40}
    model = TokenFormerLM(LMConfig(vocab_size=32, max_seq_len=8, init="scaled", **sizes)).eval()
    ids = torch.arange(17) % 32
    whole = model.loss(ids[:-1].view(2, 8), ids[1:].view(2, 8)).item()
    all_of_them, some = losses(model, ids, (1.0, 0.1))
    assert all_of_them["loss"] == pytest.approx(whole, rel=1e-6)
    assert some["loss"] != pytest.approx(whole, rel=1e-6)
    assert model.backbone.blocks[0].ffn.top_k == 4
    rows = times((64,), (0.5, 0.25), rounds=1)
    assert [row["k"] for row in rows] == [32, 16]
    assert all(float(row["ratio"]) > 0 for row in rows)
