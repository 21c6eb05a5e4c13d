"""Every file of configs/language/: parsed by the command line, run on a shrunken model, counted on meta."""

import csv
import json
from dataclasses import replace

import pytest
import tokenizers
import torch
import yaml

from datamodules.tokenizer import ByteTokenizer
from lit_modules.cli import main
from lit_modules.commands.tokenizers import save_tokenizer
from lit_modules.modules.loading import load_model
from tests.integration.configs import CONFIGS, experiments, given, growth_of, run_shrunken
from tests.integration.tiny import rows as logged
from tokenformer import LMConfig, TokenFormerLM, save_pretrained

FOLDER = CONFIGS / "language"
EXPERIMENTS = experiments("language")
FINETUNE = EXPERIMENTS.pop("finetune")  # has other data, and a model to start from

# facts: paper table 9, the released configs, the Transformers of table 6. Millions of parameters, to the digits given.
PUBLISHED = {
    "pile-150m": "151.9",
    "pile-450m": "454.2",
    "pile-900m": "903.3",
    "pile-1.5b": "1587",
    "openwebtext-124m": "123.6",
    "openwebtext-354m": "354.2",
    "openwebtext-757m": "753.8",
    "openwebtext-1.4b": "1309.7",
    "openwebtext2-354m": "353.5",
    "openwebtext2-757m": "756.2",
    "openwebtext-124m+width": "123.6",
    "openwebtext-354m+openwebtext-354m": "353.5",
    "openwebtext-757m+openwebtext-757m": "756.7",
    "openwebtext-1.4b+openwebtext-1.4b": "1311",
    "openwebtext2-354m+width": "353.5",
    "openwebtext2-757m+openwebtext2-757m": "756.7",
}
# The Transformers of the Pile models' depth and width were not published: 12 L d^2, embedding and final norm.
PILE_BASELINES = {"150m": (12, 768), "450m": (24, 1024), "900m": (32, 1280), "1.5b": (40, 1536)}
for size, (depth, dim) in PILE_BASELINES.items():
    PUBLISHED[f"pile-{size}+width"] = f"{(12 * depth * dim**2 + 50304 * dim + 2 * dim) / 1e6:.2f}"

TOKENS_PER_STEP = {"pile": 1024 * 2048, "openwebtext": 512 * 1024, "openwebtext2": 512 * 1024}

# Small, and on whatever machine this is. The rest of the file stays as it is.
SHRINK = """
model: {init_args: {config: {depth: 2, dim: 32, num_heads: 2, qkv_tokens: 64, proj_tokens: 64, ffn_tokens: 128},
  optim: {warmup_steps: 1}, compile: false}}
data: {init_args: {source: SOURCE, tokenizer: bytes, streaming: false, val_fraction: 0.05, cache_dir: CACHE,
  seq_len: 32, batch_size: 2}}
trainer: {accelerator: cpu, devices: 1, strategy: auto, precision: 32-true, accumulate_grad_batches: 1,
  enable_progress_bar: false, val_check_interval: 2, limit_val_batches: 2}
"""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_config_runs_on_a_shrunken_model(name, corpus, tmp_path):
    shrink = SHRINK.replace("SOURCE", str(corpus[0])).replace("CACHE", str(tmp_path / "tokens"))
    files = EXPERIMENTS[name]
    saved, asked = given(run_shrunken(files, shrink, tmp_path) / "config.yaml"), given(*files)
    assert saved["model"]["init_args"]["optim"]["lr"] == asked["model"]["init_args"]["optim"]["lr"]


def test_finetune_runs_on_a_shrunken_model(tmp_path, monkeypatch):
    """Its epochs as they are: three of two steps, of 2 x 2 examples."""
    settings = yaml.safe_load(SHRINK)
    sizes = settings["model"]["init_args"]["config"]
    model = TokenFormerLM(LMConfig(**sizes, max_seq_len=64, vocab_size=384))  # of bytes 257, rounded up as the released
    save_pretrained(model, tmp_path / "models/150m")
    save_tokenizer(ByteTokenizer(), tmp_path / "models/150m", 64)
    rows = [json.dumps({"instruction": f"Say {i}.", "output": str(i)}) for i in range(9)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    data = {"source": "t.jsonl", "seq_len": 64, "batch_size": 2, "val_fraction": 0.1}
    trainer = {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
    own = {"model": settings["model"], "data": {"init_args": data}, "trainer": trainer}
    (tmp_path / "shrink.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(*FINETUNE), "--config", "shrink.yaml", "--run_dir", "run"])
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000006.ckpt"]
    assert [step for step, _ in logged(tmp_path / "run", "val/loss")] == [1, 3, 5]
    trained = load_model(tmp_path / "run/checkpoints/step-00000006.ckpt").state_dict()
    moved = [(trained[name] - tensor).abs().max().item() for name, tensor in model.state_dict().items()]
    assert 0 < max(moved) < 1e-3  # it went on from there, at the config's small rate


def model_config(name, vocab_size):
    asked = given(*EXPERIMENTS[name])
    config = asked["model"]["init_args"]["config"] | {"max_seq_len": asked["data"]["init_args"]["seq_len"]}
    return LMConfig(**config, vocab_size=vocab_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = model_config(name, vocab_size=50277)
    assert config.padded_vocab_size == 50304
    with torch.device("meta"):
        model = TokenFormerLM(config)
    assert model.num_params() == config.num_params()
    published = PUBLISHED[name]
    digits = len(published.partition(".")[2])
    assert f"{model.num_params() / 1e6:.{digits}f}" == published

    asked = given(*EXPERIMENTS[name])
    data, trainer = asked["data"]["init_args"], asked["trainer"]
    batch = data["batch_size"] * data["seq_len"] * trainer["devices"] * trainer["accumulate_grad_batches"]
    assert batch == TOKENS_PER_STEP[name.partition("-")[0]]
    assert config.init == "official"
    assert config.scale == "fixed"


@pytest.mark.parametrize(
    ("name", "tokenizer", "millions", "tokens"),
    [
        ("fineweb-edu-124m", 50277, "123.6", "10.0"),
        ("c4-354m", 50277, "353.5", "31.5"),
        ("tinystories", 4096, "9.4", "0.7"),
    ],
)
def test_sizes_and_tokens_are_those_of_the_headers(name, tokenizer, millions, tokens):
    asked = given(*EXPERIMENTS[name])
    data, trainer = asked["data"]["init_args"], asked["trainer"]
    batch = data["batch_size"] * data["seq_len"] * trainer["devices"] * trainer.get("accumulate_grad_batches", 1)
    assert f"{batch * trainer['max_steps'] / 1e9:.1f}" == tokens
    assert f"{model_config(name, tokenizer).num_params() / 1e6:.1f}" == millions


def test_every_published_config_is_tested():
    ours = {"quickstart", "quickstart+quickstart", "quickstart+no-growth", "wikitext-2", "wikitext-2+parameters"}
    ours |= {"fineweb-edu-124m", "c4-354m", "tinystories"}
    assert set(EXPERIMENTS) == set(PUBLISHED) | ours | {"openwebtext-growth"}


def test_the_published_series_is_planned_with_its_sizes(tmp_path, capsys):
    """facts: 123.6, 354.2, 753.8, 1309.7 M parameters; 314.6 B tokens and three times 31.5 B."""
    words = {f"w{i}": i for i in range(50276)} | {"<|endoftext|>": 50276}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = FOLDER / "openwebtext-growth.yaml"
    table = tmp_path / "plan.csv"
    options = ["--data.tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(table)]
    main(["plan", "--config", str(config), *options])
    rows = list(csv.DictReader(table.open()))
    assert [f"{int(row['params']) / 1e6:.1f}" for row in rows] == ["123.6", "354.2", "753.8", "1309.7", "1309.7"]
    assert [f"{int(row['training_tokens']) / 1e9:.1f}" for row in rows[:4]] == ["314.6", "31.5", "31.5", "31.5"]
    assert [row["tokens_per_layer"] for row in rows[:2]] == ["576/576/2304", "2140/2140/8560"]
    assert all(int(row["ddp_total_bytes"]) < 80e9 for row in rows)  # as its header says
    assert "marginal" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "overlay"), [("quickstart", "quickstart"), ("wikitext-2", "parameters")])
def test_our_own_baselines_have_equal_parameters(name, overlay):
    ours, baseline = (model_config(experiment, 257) for experiment in (name, f"{name}+{overlay}"))
    for stage in growth_of(*EXPERIMENTS[name]).get("stages", []):  # the size that it ends with
        ours = replace(ours, **{f"{kind}_tokens": stage[kind] for kind in ("qkv", "proj", "ffn")})
    assert ours.num_params() - 5 * ours.depth == baseline.num_params()  # one learned tau per Pattention
    assert (ours.depth, ours.dim) == (baseline.depth, baseline.dim)
