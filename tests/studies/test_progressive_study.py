"""A model that grows twice, and the budgets of those that do not."""

import pytest

from studies import growth, progressive
from studies.training import text


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A base of 60 steps."""
    widths = {"depth": 1, "dim": 16, "num_heads": 2, "qkv_tokens": 4, "proj_tokens": 4, "ffn_tokens": 8}
    monkeypatch.setitem(growth.SIZES, "tiny", widths)
    monkeypatch.setitem(growth.BASE_STEPS, "tiny", 60)
    monkeypatch.setattr(growth, "BASES", tmp_path)
    growth.base.cache_clear()

    def run(method, **choice):
        return progressive.run(method, **{"optimizer": "muon", "lr": 8e-3, "seed": 0, "size": "tiny"} | choice)

    yield run
    growth.base.cache_clear()


def test_budgets_are_those_that_are_said(tiny):
    grown, step = tiny("anchored", stage=0.5), {n: growth.step_flops(growth.build("tiny", 0, n)) for n in (1, 3, 6)}
    assert grown["flops"] == 60 * step[1] + 30 * (step[3] + step[6])
    assert grown["stage flops"] == 30 * step[6]
    stage, flops, base = (tiny("scratch", stage=0.5, factor=6, budget=budget) for budget in ("stage", "flops", "base"))
    assert stage["flops"] == 30 * step[6]
    assert flops["flops"] == pytest.approx(grown["flops"], abs=step[6] / 2)
    third = tiny("scratch", stage=0.5, factor=3, budget="flops")
    assert third["flops"] == pytest.approx(60 * step[1] + 30 * step[3], abs=step[3] / 2)
    assert tiny("scratch", factor=6, budget="base")["flops"] == 60 * step[6]
    twin = tiny("transformer", factor=6, budget="base")
    assert (twin["params"], twin["flops"]) == pytest.approx((grown["params"], 60 * step[6]), rel=0.01)
    assert base["params"] == grown["params"] == flops["params"] > third["params"]
    assert flops["loss"] < stage["loss"]


def test_it_grows_twice_as_its_method_says(tiny, monkeypatch):
    seen, states, taus = [], [], []

    def growing(model, method, factor, seed):
        loss = growth.validation_loss(model, text(growth.SEQ_LEN, growth.BATCH_SIZE, 0), 4)
        add_tokens(model, method, factor, seed)
        after = growth.validation_loss(model, text(growth.SEQ_LEN, growth.BATCH_SIZE, 0), 4)
        query = model.backbone.blocks[0].attention.query
        seen.append((factor, query.num_tokens, abs(after - loss) < 1e-5))
        taus.append(float(query.tau))

    def training(*arguments, state=None, **more):
        states.append(state and sorted(state["param_groups"][0]["param_names"]))
        return train(*arguments, state=state, **more)

    add_tokens, train = progressive.add_tokens, progressive.train
    monkeypatch.setattr(progressive, "add_tokens", growing)
    monkeypatch.setattr(progressive, "train", training)
    row = tiny("anchored", stage=0.5)
    assert seen == [(3, 12, True), (2, 24, True)]
    assert len(states[1]) == 2 * len(states[0])  # of the second stage: also what the first has added
    assert row["loss"] < row["at x3"]
    seen.clear(), states.clear(), taus.clear()
    tiny("random", stage=0.5)
    assert seen == [(3, 12, False), (2, 24, False)]
    assert states == [None, None]
    assert taus == pytest.approx([12**0.5, 24**0.5])
