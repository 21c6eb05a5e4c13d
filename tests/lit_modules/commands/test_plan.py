"""The plan of a run against facts of the paper, numbers worked out by hand, and what it must refuse."""

import csv
from types import SimpleNamespace

import pytest
import yaml

from datamodules.tokenizer import VOCAB_SIZES, load_tokenizer
from lit_modules.callbacks import GrowParameterTokens
from lit_modules.cli import main
from lit_modules.commands.plan import num_devices, plan, plan_rows
from lit_modules.growth.stages import Plateau, Stage
from lit_modules.modules.language import LanguageModule
from lit_modules.optim.config import OptimConfig
from tests.conftest import ROOT
from tests.integration.configs import configs
from tokenformer import LMConfig
from tokenformer.cost import muon_flops

TINY = {"vocab_size": 100, "depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 64}
DATA = SimpleNamespace(batch_size=4, seq_len=16)


def module(config=TINY, **options):
    return LanguageModule(LMConfig(**config), OptimConfig(), **options)


def run_of(stages=(), max_steps=100, precision="bf16-mixed", accumulate=1, **options):
    callbacks = [GrowParameterTokens(list(stages), **options)] if stages else []
    values = {"max_steps": max_steps, "precision": precision, "accumulate_grad_batches": accumulate}
    return SimpleNamespace(callbacks=callbacks, **values)


def test_published_series_has_its_sizes():
    """Facts of the paper: table 9 for the tokens, table 3 for the FLOPs, 600k steps and 60k for each growth."""
    tokens = (2140, 4850, 8620)
    stages = [Stage(at_step=600_000 + 60_000 * i, qkv=n, proj=n, ffn=4 * n) for i, n in enumerate(tokens)]
    config = {"vocab_size": 50277, "vocab_multiple": 128}
    trainer = run_of(stages, max_steps=780_000, accumulate=2)
    data = SimpleNamespace(batch_size=32, seq_len=1024)
    *rows, scratch = plan_rows(module(config), data, trainer, devices=8)
    assert [round(row.phase.num_params / 1e6, 1) for row in rows] == [123.6, 354.2, 753.8, 1309.7]
    assert [row.tokens_per_layer for row in rows] == ["576/576/2304", *(f"{n}/{n}/{4 * n}" for n in tokens)]
    assert [round(row.phase.num_tokens / 1e9, 1) for row in rows] == [314.6, 31.5, 31.5, 31.5]
    for row, n in zip(rows, (576, *tokens), strict=True):
        matrices, between_tokens = 12 * 2 * 768 * 8 * n, 4 * 12 * 768 * 1024
        assert row.phase.flops_per_token == 2 * matrices + between_tokens + 2 * 50277 * 768
    assert scratch.phase.num_params == rows[-1].phase.num_params
    assert scratch.phase.num_tokens == sum(row.phase.num_tokens for row in rows) == 780_000 * 524_288
    text = plan(module(config), data, trainer, devices=8)
    sizes, devices = text.split("The last size on")
    assert max(map(len, sizes.splitlines())) <= 160
    assert max(map(len, devices.splitlines())) <= 120


def test_numbers_by_hand(tmp_path):
    """8 devices, batches of 4 x 16, 2 of them a step: 1024 tokens a step; 60 steps before the growth, 40 after it."""
    out = tmp_path / "plans" / "plan.csv"
    trainer = run_of([Stage(at_step=60, factor=2.0)], accumulate=2)
    text = plan(module(), DATA, trainer, devices=8, mfu=0.5, device="A100", out=str(out))
    base, grown, scratch = csv.DictReader(out.open())
    small, large = LMConfig(**TINY), LMConfig(**TINY | {"qkv_tokens": 48, "proj_tokens": 40, "ffn_tokens": 128})
    # On 8 devices: 3 rows of 24, 3 of 20, 8 of 64, 13 of 100; of the grown layers twice that, of whole ones 6, 5, 16.
    rest = 13 * 32 + 2 * 4
    shares = [
        2 * 32 * (3 * 2 * 3 + 2 * 3 + 2 * 8) + rest,
        2 * 32 * 2 * 40 + rest,
        2 * 32 * (3 * 2 * 6 + 10 + 32) + rest,
    ]
    cases = ((base, small, 60), (grown, large, 40), (scratch, large, 100))
    for (row, config, steps), share in zip(cases, shares, strict=True):
        assert int(row["params"]) == config.num_params()
        assert int(row["flops_per_token"]) == config.flops_per_token(16)
        assert int(row["training_tokens"]) == 1024 * steps
        flops = 3 * 1024 * steps * config.flops_per_token(16)
        assert float(row["hours"]) == pytest.approx(flops / (8 * 0.5 * 312e12) / 3600)
        assert int(row["ddp_weights_bytes"]) == 4 * config.num_params()
        assert int(row["ddp_gradients_bytes"]) == int(row["ddp_optimizer_bytes"]) == 8 * config.num_params()
        parts = ("weights", "gradients", "optimizer", "activations")
        for how in ("ddp", "fsdp"):
            assert int(row[f"{how}_total_bytes"]) == sum(int(row[f"{how}_{part}_bytes"]) for part in parts)
        assert int(row["fsdp_optimizer_bytes"]) == 2 * 4 * share
    first, second = (3 * 1024 * n * c.flops_per_token(16) for n, c in ((60, small), (40, large)))
    whole = 3 * 1024 * 100 * large.flops_per_token(16)
    cumulative = [int(row["cumulative_flops"]) for row in (base, grown, scratch)]
    assert cumulative == [first, first + second, whole]
    assert f"marginal: {second:.3g} FLOPs" in text
    assert f"{second / whole:.1%} of from scratch" in text
    assert f"cumulative: {first + second:.3g} FLOPs" in text
    assert f"{(first + second) / whole:.1%} of from scratch" in text
    assert "8 x A100 (50 % of 312 TFLOP/s), bf16-mixed" in text


def test_a_stage_by_tokens_comes_when_they_are_trained_on():
    rows = plan_rows(module(), DATA, run_of([Stage(at_tokens=1000, ffn=80)]), devices=2)  # 128 tokens a step
    assert [row.from_step for row in rows] == [0, 8, 0]
    assert [row.phase.num_tokens for row in rows] == [8 * 128, 92 * 128, 12800]


def test_after_a_plateau_nothing_is_known_but_sizes():
    stages = [Stage(at_step=10, ffn=80), Stage(on_plateau=Plateau(), ffn=96), Stage(at_step=90, ffn=112)]
    rows = plan_rows(module(), DATA, run_of(stages), devices=1)
    assert [row.from_step for row in rows] == [0, 10, "plateau", 90, 0]
    assert [row.phase.num_tokens for row in rows] == [640, None, None, None, 6400]
    assert [row.tokens_per_layer for row in rows][2:] == ["24/20/96", "24/20/112", "24/20/112"]
    text = plan(module(), DATA, run_of(stages))
    assert "cumulative: not known before a plateau" in text
    assert "marginal: not known before a plateau" in text


def test_what_grows_is_what_the_callback_grows():
    """Chosen layers; norms of their own bring taus of their own; frozen tokens have no gradients."""
    config = TINY | {"scale": "learned"}
    stages = [Stage(at_step=50, factor=2.0)]
    trainer = run_of(stages, layers=["query", "ffn"], init="segment_norm", train="new")
    base, grown, scratch = plan_rows(module(config), DATA, trainer, devices=1)
    new = 2 * (2 * 32 * (24 + 64) + 2)  # two blocks, a tau for each grown layer
    assert grown.phase.num_params == base.phase.num_params + new
    assert grown.tokens_per_layer == "24-48/20/128"
    assert (grown.ddp.gradients, grown.ddp.optimizer) == (4 * new, 8 * new)
    assert scratch.phase.num_params == grown.phase.num_params - 4
    assert scratch.ddp.gradients == 4 * scratch.phase.num_params


def test_muon_has_a_line_and_one_moment():
    """For every layer 5 x (4 m m n + 2 m m m) FLOPs for its keys, and for its values."""
    trained = LanguageModule(LMConfig(**TINY), OptimConfig(name="muon"))
    sizes = [(24, 32)] * 3 + [(20, 32), (32, 64)]
    flops = 2 * 2 * 5 * sum(4 * m * m * n + 2 * m**3 for m, n in sizes)
    of_step = 3 * trained.build_model().flops_per_token(16) * 4 * 16
    text = plan(trained, DATA, run_of(), devices=2)
    assert f"Muon: {flops:,} FLOPs to orthogonalise; a device's step at the last size has" in text
    halves = muon_flops(trained.build_model(), 2)  # of the matrices of each shape
    assert halves == flops / 2
    assert f"{flops / of_step:.2%} more FLOPs in DDP, {halves / of_step:.2%} in FSDP2" in text
    assert "Muon" not in plan(module(), DATA, run_of())
    (one,), (two,) = (plan_rows(m, DATA, run_of(), devices=2) for m in (trained, module()))
    assert two.ddp.optimizer - one.ddp.optimizer == 4 * 2 * 2 * 32 * (3 * 24 + 20 + 64)


def test_without_growth_there_is_one_row_and_nothing_to_compare():
    text = plan(module(), DATA, run_of())
    assert "scratch" not in text
    assert "marginal" not in text
    (row,) = plan_rows(module(TINY | {"baseline": "width"}), DATA, run_of(), devices=1)
    assert row.tokens_per_layer == "width 32"
    assert row.phase.num_params == LMConfig(**TINY, baseline="width").num_params()


@pytest.mark.parametrize("option", ["checkpoint_activations", "recompute_scores"])
def test_what_is_computed_again_is_not_in_the_activations(option):
    plain, less = (
        plan_rows(module(**{option: on}), SimpleNamespace(batch_size=64, seq_len=16), run_of(), 1)[0].ddp
        for on in (False, True)
    )
    assert less.activations < 0.9 * plain.activations
    assert less.weights == plain.weights


def test_what_is_frozen_has_no_gradients_and_no_moments():
    run = run_of([Stage(at_step=50, factor=2.0)])
    for row in plan_rows(module(train=["embedding.*", "*.blocks.1.ffn.*"]), DATA, run, devices=1)[:2]:
        trained = 100 * 32 + 2 * 32 * sum(int(count) for count in row.tokens_per_layer.split("/")[2:])
        assert (row.ddp.gradients, row.ddp.optimizer) == (4 * trained, 8 * trained)


def test_table_is_aligned_and_says_what_is_not_known():
    text = plan(module(), DATA, run_of([Stage(at_step=50, factor=2.0)], precision="32-true"))
    lines = text.splitlines()
    table = lines[2:7]
    assert "no peak known" in lines[0]
    assert len({len(line) for line in table[1:]}) == 1
    assert [line.split()[0] for line in table[1:]] == ["stage", "base", "1", "scratch"]
    assert all(line.endswith(" -") for line in table[2:])


@pytest.mark.parametrize(
    ("devices", "nodes", "expected"),
    [(8, 1, 8), ("auto", 2, 2), (-1, 1, 1), ([0, 1, 5], 2, 6), ("0,1", 1, 2), ("4", 1, 4), ("3,", 1, 1)],
)
def test_devices_as_the_trainer_is_told_them(devices, nodes, expected):
    assert num_devices(devices, nodes) == expected


BAD = [
    ({"mfu": 0.0}, {}, r"mfu=0\.0: must be above 0 and at most 1"),
    ({"mfu": 40.0}, {}, r"mfu=40\.0"),
    ({"devices": 0}, {}, "devices=0: must be at least 1"),
    ({"network": 0.0}, {}, r"network=0\.0: must be above 0 GB/s"),
    ({"device": "H1000"}, {}, "device='H1000'.*choose one of B200, H200"),
    ({}, {"max_steps": -1}, r"trainer\.max_steps=-1: plan needs the number of steps"),
    ({}, {"precision": "fp8"}, r"trainer\.precision='fp8'"),
    ({}, {"stages": [Stage(at_step=100, factor=2.0)]}, r"stage 1 .*step 100: .*before trainer\.max_steps=100"),
    ({}, {"stages": [Stage(at_step=9, ffn=80), Stage(at_step=9, ffn=96)]}, "stage 2 .*step 9: must be after step 9"),
    ({}, {"stages": [Stage(at_step=9, ffn=63)]}, "stage 1 .*64 parameter tokens, more than 63"),
    ({}, {"stages": [Stage(at_step=9, ffn=80)], "layers": "mlp"}, "stage 1 .*layers: 'mlp' is none"),
]


@pytest.mark.parametrize(("options", "run", "message"), BAD, ids=[str(case[:2]) for case in BAD])
def test_what_cannot_be_planned_is_refused(options, run, message):
    with pytest.raises(ValueError, match=message):
        plan(module(), DATA, run_of(**run), **options)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="plan knows language models, not SimpleNamespace"):
        plan(SimpleNamespace(), SimpleNamespace(), run_of())  # data without sequences


def test_a_baseline_is_planned_at_its_widths():
    trainer = run_of([Stage(at_step=40, width=2)])
    rows = plan_rows(module(TINY | {"baseline": "width"}), DATA, trainer, devices=1)
    assert [row.tokens_per_layer for row in rows] == ["width 32", "width 64", "width 64"]
    wide = LMConfig(**TINY | {"baseline": "width", "dim": 64, "num_heads": 8})
    assert rows[1].phase.num_params == rows[2].phase.num_params == wide.num_params()
    assert rows[1].phase.flops_per_token == wide.flops_per_token(16)


def test_a_plan_needs_no_hub(monkeypatch, capsys):
    """Of the tokenizers that the configs name, it knows how many tokens they have."""

    def unreachable(name):
        raise ConnectionError(name)

    monkeypatch.setattr("datamodules.text.load_tokenizer", unreachable)
    main(["plan", "--config", str(ROOT / "configs/language/openwebtext-growth.yaml")])
    lines = [line.split()[:4] for line in capsys.readouterr().out.splitlines()]
    assert ["base", "0", "576/576/2304", "123.6"] in lines
    names = {path: yaml.safe_load(path.read_text())["data"]["init_args"]["tokenizer"] for path in configs("language")}
    assert {name for name in names.values() if name.startswith("hub:")} <= set(VOCAB_SIZES)


def test_the_known_sizes_are_those_of_the_tokenizers(shared_data):
    for folder in (shared_data / "tokenizer").iterdir():
        sizes = {size for name, size in VOCAB_SIZES.items() if name.endswith(folder.name)}
        assert sizes == {load_tokenizer(str(folder / "tokenizer.json")).vocab_size}
