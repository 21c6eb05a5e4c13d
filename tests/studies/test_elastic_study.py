"""The study of sizes: each method trains, cuts and ranks as its text says."""

import pytest

from studies import elastic
from studies.elastic import SHARES, run


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(elastic, "STEPS", 20)
    monkeypatch.setattr(elastic, "WHOLE", tmp_path)
    monkeypatch.setattr(elastic, "SIZES", {"depth": 1, "dim": 16, "num_heads": 2})
    monkeypatch.setattr(elastic, "TOKENS", {"qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 32})
    return tmp_path


def losses(row):
    return [row[f"at {share:g}"] for share in SHARES if f"at {share:g}" in row]


@pytest.mark.parametrize("model", ["tokenformer", "transformer"])
def test_methods_differ_where_they_should(tiny, model):
    methods = ["alone", "elastic", "first"] + (["use", "gradient"] if model == "tokenformer" else [])
    found = {method: run(model, method, 8e-3, 0) for method in methods}
    wholes = {method: losses(row)[0] for method, row in found.items()}
    assert wholes["elastic"] != wholes["first"]  # else it was never cut while it trained
    assert len({wholes[method] for method in methods if method != "elastic"}) == 1  # one training
    for share in (1, 2, 3, 4):
        at = [losses(row)[share] for row in found.values()]
        assert len(set(at)) == len(at)
    for row in found.values():
        assert row["loss"] == pytest.approx(sum(losses(row)) / len(SHARES))
        assert len(row["speed"].split()) == len(SHARES)
    assert len(list(tiny.glob("*.pt"))) == 1


def test_what_is_left_can_be_trained_on(tiny):
    cut, trained, whole = (run("tokenformer", method, 8e-3, 0) for method in ("use", "use, trained", "whole, trained"))
    assert losses(trained)[0] == losses(whole)[0] < losses(cut)[0]
    assert all(after < before for after, before in zip(losses(trained), losses(cut), strict=True))
    assert len(losses(whole)) == 1
