"""Every benchmark in its smallest form."""

import importlib
import math
from functools import partial

import pytest
import torch

from benchmarks.gpt import GPT
from tokenformer import LMConfig

TINY = {"depth": 2, "dim": 32, "num_heads": 2, "qkv_tokens": 24, "proj_tokens": 24, "ffn_tokens": 96}
SMALLEST = {
    "operator": {"shape": (32, 16, 24), "dtype": "float32", "mode": "eager"},
    "memory, operator": {"shape": (256, 64, 256), "dtype": "float32"},
    "memory, model": {"shape": (2, 32), "sizes": {"vocab_size": 257, **TINY}},
    "context": {"size": "4.8M", "seq_len": 16, "tokens": 32, "vocab_size": 257},
    "vit": {"size": "tiny", "batch_size": 2, "img_size": 32, "depth": 2},
    "generation": {"sizes": TINY, "batch_size": 2, "length": 4},
    "generation, static cache": {"sizes": TINY, "batch_size": 2, "length": 4, "static": True},
    "optimizer": {"stages": ((16, 64), (24, 96), (32, 128)), "sizes": {"depth": 1, "dim": 32, "num_heads": 2}},
    "optimizer, Muon": {
        "stages": ((16, 64), (24, 96)),
        "sizes": {"depth": 1, "dim": 32, "num_heads": 2},
        "name": "muon",
    },
}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_in_its_smallest_form(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the compiler takes long
    module = importlib.import_module(f"benchmarks.{name.split(',')[0]}")
    ratios, columns = module.measure(**SMALLEST[name], device="cpu", rounds=1)
    assert any(case.goals.keys() == ratios.keys() for case in module.CASES)
    assert all(len(found) == 1 and 0 < found[0] < math.inf for found in ratios.values())
    ours, *others = [count for column, count in columns.items() if column.endswith("_params")] or [1]
    assert all(other == pytest.approx(ours, rel=0.02) for other in others)
    if name == "memory, operator":
        assert columns["ours_bytes"] < columns["transcription_bytes"]


def test_correctness_tells_right_from_wrong(monkeypatch):
    from benchmarks import correctness

    monkeypatch.setattr(correctness, "SHAPES", correctness.SHAPES[:2])
    monkeypatch.setattr(correctness, "LOSS_SHAPES", correctness.LOSS_SHAPES[:2])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)

    def worst(**arguments):
        ratios, _ = correctness.measure(**arguments, device="cpu", rounds=1)
        assert any(case.goals.keys() == ratios.keys() for case in correctness.CASES)
        return max(max(found) for found in ratios.values())

    whats = ("operator", "loss")
    operators = [{"what": what, "precision": name} for what in whats for name in correctness.OPERATOR_ERRORS]
    compiled = {"what": "compile", "precision": "bf16-mixed"}
    assert all(worst(**arguments) < 1 for arguments in (*operators, compiled))
    assert worst(what="growth", precision="32-true") < 1
    attend = correctness.attend
    monkeypatch.setattr(correctness, "attend", lambda x, *others: attend(x, *others) + 0.1 * x)
    cross_entropy = correctness.linear_cross_entropy
    monkeypatch.setattr(correctness, "linear_cross_entropy", lambda x, *others: 1.1 * cross_entropy(x, *others))
    assert all(worst(**arguments) > 1 for arguments in operators)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: self.register_forward_hook(lambda *_: _[-1].detach()))
    assert worst(**compiled) > 1  # torch 2.11 once gave a loss that is right and no gradients


def test_text_written_without_the_cache_is_that_of_generate():
    from benchmarks.generation import without_cache
    from tokenformer import TokenFormerLM, generate

    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(vocab_size=257, max_seq_len=16, init="scaled", **TINY))
    prompts = torch.randint(0, 257, (3, 4))
    assert torch.equal(without_cache(model, prompts, 8), generate(model, prompts, 8, temperature=0))


def test_models_of_the_long_context_have_as_many_parameters():
    from benchmarks.context import CASES, PAIRS

    for case in CASES:
        ours, wider = PAIRS[case.arguments["size"]]
        vocab_size = case.arguments["vocab_size"]
        count = LMConfig(**wider, baseline="width", vocab_size=vocab_size).num_params()
        assert LMConfig(**ours, vocab_size=vocab_size).num_params() == pytest.approx(count, rel=0.01), case.setting


def test_the_gpt_has_as_many_parameters_and_is_causal():
    from benchmarks.training import CASES

    for case in CASES:
        size, text = case.arguments["size"], case.arguments["text_size"]
        with torch.device("meta"):
            gpt = GPT(text["vocab_size"], text["seq_len"], *case.arguments["gpt"])
        ours = LMConfig(**size, vocab_size=text["vocab_size"]).num_params()
        assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(ours, rel=0.02), case.setting
    torch.manual_seed(0)
    gpt = GPT(50, 8, depth=2, dim=16, num_heads=2, hidden=32)
    ids = torch.randint(0, 50, (2, 8))
    early = torch.full_like(ids, -100)
    early[:, :4] = ids[:, 1:5]
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    assert gpt(ids, early) == gpt(changed, early)
    assert gpt(ids, ids) != gpt(changed, ids)
    assert gpt(ids, ids).item() == pytest.approx(math.log(50), rel=0.1)
