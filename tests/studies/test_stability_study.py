"""Gradients, tokens that are not used and the largest rate, each of a case in which they are known."""

import math

import pytest
import torch

from studies import pretraining, stability
from studies.stability import run, unused
from studies.training import text
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.growth import pattention_layers


def test_a_row_of_each_kind(monkeypatch):
    monkeypatch.setattr(pretraining, "SIZES", {"tiny": (1, 16, 2)})
    monkeypatch.setattr(stability, "STEPS", 40)
    rows = {name: run("training", "tiny", name, 4e-3, 0) for name in ("l2_norm_gelu", "softmax")}
    assert rows["l2_norm_gelu"]["norm"] != rows["softmax"]["norm"]
    for row in rows.values():
        assert row["norm"] > 0
        assert 0 < row["spread"] < 2
        assert 0 <= row["unused"] < 1


def test_the_largest_rate_is_the_last_one_that_is_near_the_lowest_loss(monkeypatch):
    monkeypatch.setattr(pretraining, "SIZES", {"tiny": (1, 16, 2)})
    clips, rates = [], []

    def train(model, data, loss_of, optimizer, lr, steps, clip):
        clips.append(clip)
        rates.append(lr)

    monkeypatch.setattr(stability, "train", train)
    monkeypatch.setattr(stability, "validation_loss", lambda model, data: next(losses))
    losses = iter([4.0, 3.0, 3.2, 3.6, 2.0])
    assert run("largest rate", "tiny", "softmax", 1e-3, 0) == {"largest rate": pytest.approx(4e-3), "loss": 3.2}
    assert rates == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3])
    assert set(clips) == {math.inf}
    losses = iter([4.0, math.nan])
    assert run("largest rate", "tiny", "softmax", 1e-3, 0)["largest rate"] == 1e-3


def test_unused_tokens_are_those_with_hardly_a_weight():
    sizes = {"depth": 1, "dim": 16, "num_heads": 2, "qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 32}
    model = TokenFormerLM(LMConfig(vocab_size=257, max_seq_len=32, **sizes))
    data = text(32, 2, 0)
    assert unused(model, data, 2) == 0
    with torch.no_grad():
        for layer in pattention_layers(model).values():
            layer.segments[0].keys[: layer.num_tokens // 4] = 0
    assert unused(model, data, 2) == 0.25
