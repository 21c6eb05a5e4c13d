"""Rows of models that are trained from the start: each task, model and optimizer, and each other choice."""

import pytest
import torch
import yaml
from torch.nn import functional as F

from studies import pretraining
from studies.pretraining import BASELINES, l1_norm_gelu, run, shape_of
from studies.training import missing
from tests.conftest import ROOT
from tokenformer.pattention import Pattention


@pytest.mark.parametrize("task", ["bytes", "web", "digits", "cifar", "tiny-imagenet"])
def test_a_row_of_each_task(monkeypatch, task):
    if task != "bytes" and (path := missing(task)):
        pytest.skip(f"needs {path}, data that lie beside the project")
    monkeypatch.setattr(pretraining, "SIZES", {"tiny": (1, 16, 2)})
    found = {
        (model, name): run(task, "tiny", model, name, steps=100 if task == "digits" else 30, lr=8e-3, seed=0)
        for model in ("tokenformer", "transformer")
        for name in ("adamw", "muon")
    }
    losses = {case: row["loss"] for case, row in found.items()}
    assert len(set(losses.values())) == 4 or task not in ("bytes", "web")  # shares of a few images may be equal
    most = {"bytes": 4.5, "web": 7.5, "digits": 88, "cifar": 88, "tiny-imagenet": 94.5}[task]  # below chance
    assert all(loss < most for loss in losses.values())
    params = {model: found[model, "muon"]["params"] for model in ("tokenformer", "transformer")}
    assert params["tokenformer"] == pytest.approx(params["transformer"], rel=0.01)


def test_parameters_stay_where_width_and_share_differ():
    def params(**choice):
        shape = shape_of("1M", **choice)
        return shape["dim"] * (4 * shape["qkv_tokens"] + shape["ffn_tokens"]), shape

    base, shape = params()
    assert (shape["qkv_tokens"], shape["ffn_tokens"], shape["num_heads"]) == (128, 512, 4)
    for dim in (64, 96, 256, 512):
        found, shape = params(dim=dim)
        assert found == pytest.approx(base, rel=0.01)
        assert (shape["dim"], shape["num_heads"]) == (dim, dim // 32)
    for share, counts in ((0.25, (64, 768)), (0.75, (192, 256))):
        found, shape = params(share=share)
        assert found == base
        assert (shape["qkv_tokens"], shape["ffn_tokens"]) == counts


def test_a_twin_of_equal_width_has_three_quarters_of_the_parameters_of_blocks(monkeypatch):
    monkeypatch.setattr(pretraining, "SIZES", {"tiny": (1, 64, 2)})
    rows = {name: run("bytes", "tiny", name, "adamw", 21, 1e-3, 0) for name in ("tokenformer", *BASELINES)}
    params, flops = ({name: row[what] for name, row in rows.items()} for what in ("params", "flops"))
    assert params["tokenformer"] - params["equal width"] == 4 * 64 * 64 + 5  # one tau for each layer
    assert params["tokenformer"] == pytest.approx(params["transformer"], rel=0.01)
    tokens = 21 * 12 * 128
    assert flops["tokenformer"] - flops["equal width"] == 6 * tokens * 4 * 64 * 64


def test_norms_are_those_that_are_said(monkeypatch):
    monkeypatch.setattr(pretraining, "SIZES", {"tiny": (1, 16, 2)})

    def row(**choice):
        return run("bytes", "tiny", "tokenformer", "muon", steps=30, lr=8e-3, seed=0, **choice)

    plain = row()
    norms = {name: row(norms=name) for name in ("bias", "affine")}
    assert norms["bias"]["params"] == plain["params"] + 2 * 16
    assert norms["affine"]["params"] == plain["params"] + 4 * 16
    scores = [row(score_norm=name)["loss"] for name in ("gelu_l2_norm", "l1_norm_gelu", "softmax")]
    assert len({plain["loss"], *scores, *(found["loss"] for found in norms.values())}) == 6


def test_the_l1_norm_gives_scores_a_mean_size_of_one():
    layer = Pattention(8, 8, 50, scale="learned").double()
    x = torch.randn(3, 8, dtype=torch.double)
    scores = x @ layer.segments[0].keys.T
    expected = F.gelu(scores / scores.abs().mean(1, keepdim=True)) @ layer.segments[0].values
    torch.testing.assert_close(l1_norm_gelu(layer, x), expected)


def test_a_grown_model_ends_with_all_tokens_and_has_cost_less(monkeypatch):
    monkeypatch.setattr(pretraining, "SIZES", {"tiny": (1, 16, 2)})
    factors = []

    def growing(net, planned, **how):
        factors.append((net.backbone.blocks[0].attention.query.num_tokens, how["init"]))
        grow_layers(net, planned, **how)

    grow_layers = pretraining.grow_layers
    monkeypatch.setattr(pretraining, "grow_layers", growing)
    for task, steps in (("bytes", 60), ("digits", 60)):
        whole, grown = (run(task, "tiny", model, "adamw", steps, 4e-3, 0) for model in ("tokenformer", "grown"))
        assert grown["params"] == whole["params"]
        assert whole["flops"] / 2 < grown["flops"] < whole["flops"]
        assert factors.pop() == (8, "anchored")
        assert grown["loss"] != whole["loss"]


def test_longer_sequences_are_fewer_in_a_step(monkeypatch):
    monkeypatch.setattr(pretraining, "SIZES", {"tiny": (1, 32, 1)})
    short, long = (run("bytes", "tiny", "tokenformer", "adamw", 21, 4e-3, 0, seq_len=n) for n in (64, 256))
    pairs = 4 * 32  # FLOPs between two tokens of one layer
    assert long["flops"] - short["flops"] == 3 * 21 * pretraining.TOKENS * pairs * (256 - 64)
    assert long["loss"] < 5
    assert long["peak"] == pytest.approx(short["peak"], rel=0.1)  # of attention no T x T pairs are kept


def test_the_published_augmentation_is_used(monkeypatch):
    seen = []

    class Images(pretraining.ImageDataModule):
        def __init__(self, **settings):
            seen.append(settings)
            super().__init__(**settings)

    monkeypatch.setattr(pretraining, "SIZES", {"tiny": (1, 16, 2)})
    monkeypatch.setattr(pretraining, "ImageDataModule", Images)
    plain, strong = (run("digits", "tiny", "tokenformer", "adamw", 30, 4e-3, 0, augment=a) for a in ("", "published"))
    assert plain["loss"] != strong["loss"]
    assert not seen[0].keys() & pretraining.PUBLISHED.keys()
    assert pretraining.PUBLISHED.items() <= seen[1].items()
    config = yaml.safe_load((ROOT / "configs/vision/imagenet-base.yaml").read_text())
    assert pretraining.PUBLISHED.items() <= config["data"]["init_args"].items()
