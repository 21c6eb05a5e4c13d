"""Runs with ElasticTokens: resumed to the bit, costs, the models that come out of them, what is refused."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lit_modules.callbacks import ElasticTokens, GrowParameterTokens
from lit_modules.cli import main
from lit_modules.modules.loading import load_model
from lit_modules.strategies.fsdp2 import FSDP2
from tests.integration.growing import checkpoint_of, difference, fit
from tests.integration.tiny import rows, write_config, write_vision
from tokenformer import LMConfig, TokenFormerLM, from_pretrained, grow
from tokenformer.elastic import shrunk

ELASTIC = ["--trainer.callbacks+=ElasticTokens", "--trainer.callbacks.fractions=[0.25,0.5,1.0]"]
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """(config, run folder) of six steps."""
    folder = tmp_path_factory.mktemp("elastic")
    trainer = {"max_steps": 6, "log_every_n_steps": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    config = write_config(folder, corpus, trainer=trainer, checkpoint={"every_n_train_steps": 1, "save_top_k": -1})
    main(fit(config, folder / "run", *ELASTIC, "--best.save_top_k=0"))
    return config, folder / "run"


def test_a_resumed_run_draws_the_same(run, tmp_path):
    resume = checkpoint_of(run[1], 2)
    main(fit(run[0], tmp_path / "resumed", *ELASTIC, "--best.save_top_k=0", resume=resume))
    assert difference(run[1], tmp_path / "resumed", step=6) == 0
    columns = ("train/loss", "train/keep", "train/flops")
    for column in columns:
        assert rows(tmp_path / "resumed", column) == [row for row in rows(run[1], column) if row[0] >= 2]


def test_costs_are_those_of_the_tokens_in_use(run):
    callback = ElasticTokens([0.25, 0.5, 1.0])
    shares = [callback.share(step) for step in range(6)]
    assert [share for _, share in rows(run[1], "train/keep")] == shares
    assert set(shares) == {0.25, 0.5, 1.0}
    model, flops = load_model(checkpoint_of(run[1], 6)), 0
    for share, (_, logged) in zip(shares, rows(run[1], "train/flops"), strict=True):
        flops += 2 * 4 * 32 * 3 * shrunk(model, share).flops_per_token(32)  # two batches of four sequences
        assert logged == pytest.approx(flops, rel=1e-6)
    assert len({ElasticTokens([0.5, 1.0], seed).share(0) for seed in range(9)}) == 2


def test_an_average_goes_along_and_recomputed_activations_are_those_of_the_share(run, tmp_path):
    average = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5", "--trainer.callbacks.warmup=false"]
    options = [*ELASTIC, *average, "--best.save_top_k=0", "--model.checkpoint_activations=true"]
    main(fit(run[0], tmp_path / "run", *options))
    saved = [torch.load(checkpoint_of(tmp_path / "run", step), weights_only=True) for step in range(1, 7)]
    plain = torch.load(checkpoint_of(run[1], 6), weights_only=True)["state_dict"]
    for name, weight in saved[-1]["current_model_state"].items():
        assert torch.equal(weight, plain[name])
        average = saved[0]["state_dict"][name]
        for checkpoint in saved[1:]:
            average = average.lerp(checkpoint["current_model_state"][name], 0.5)
        torch.testing.assert_close(saved[-1]["state_dict"][name], average)


def test_shrink_writes_the_smaller_model(run, tmp_path, capsys):
    checkpoint = checkpoint_of(run[1], 6)
    main(["shrink", str(checkpoint), "--keep", "0.5", "--out", str(tmp_path / "half")])
    assert "20,576 -> 14,432 parameters" in capsys.readouterr().out
    (tmp_path / "alone").mkdir()
    shutil.copy(checkpoint, tmp_path / "alone")  # beside no run that says which tokenizer
    main(["shrink", str(tmp_path / "alone" / checkpoint.name), "--keep", "0.5", "--out", str(tmp_path / "x")])
    assert "no tokenizer was written" in capsys.readouterr().out
    half = from_pretrained(tmp_path / "half")
    assert torch.equal(half(IDS), shrunk(load_model(checkpoint), 0.5)(IDS))
    main(["shrink", str(tmp_path / "half"), "--keep", "0.5", "--out", str(tmp_path / "quarter")])
    assert from_pretrained(tmp_path / "quarter").config.ffn_tokens == 8
    main(["generate", str(tmp_path / "quarter"), "--prompt", "the", "--max_new_tokens", "4"])
    assert "The first 0.5 of the tokens of `half`" in (tmp_path / "quarter/README.md").read_text()


def test_a_baseline_trains_so_too(images, tmp_path):
    config = write_vision(tmp_path, images)
    few = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--best.save_top_k=0"]
    main(fit(config, tmp_path / "run", *ELASTIC, *few, "--model.config.baseline=width"))
    main(["shrink", str(checkpoint_of(tmp_path / "run", 2)), "--keep", "0.25", "--out", str(tmp_path / "quarter")])
    model = from_pretrained(tmp_path / "quarter")
    assert model.backbone.blocks[0].ffn.up.weight.shape == (32, 32)
    assert (tmp_path / "quarter/class_map.txt").read_text() == "bright\ndark\ngrey\n"


def test_what_needs_all_tokens_is_refused():
    elastic, growing = ElasticTokens([0.5, 1]), GrowParameterTokens([{"at_step": 3, "factor": 2}])
    parallel = FSDP2(tensor_parallel_size=2)
    six, seven = (ElasticTokens([*(i / 10 for i in range(1, n)), 1]) for n in (6, 7))
    for callback, callbacks, strategy, settings, message in (
        (elastic, [elastic, growing], None, {}, "ElasticTokens and GrowParameterTokens"),
        (elastic, [elastic], parallel, {}, "with trainer.strategy.tensor_parallel_size the first tokens are on the"),
        (elastic, [elastic], None, {"trained": "*ffn*"}, r"needs model\.train=all, not \*ffn\*"),
        (seven, [seven], None, {"compile_blocks": True}, "each of 7 fractions, .*: give at most 6"),
        (six, [six], None, {"compile_blocks": True}, None),
    ):
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            trainer = SimpleNamespace(callbacks=callbacks, strategy=strategy)
            callback.check_settings(trainer, SimpleNamespace(**{"trained": "all"} | settings))
    for fractions in ([], [0.5], [0, 1], [1, 2]):
        with pytest.raises(ValueError, match=r"fractions=\[.*\]: give shares"):
            ElasticTokens(fractions)
    with pytest.raises(ValueError, match="modules of this project, not Linear"):
        elastic.setup(None, torch.nn.Linear(1, 1), "fit")
    model = TokenFormerLM(LMConfig(vocab_size=8, depth=1, dim=8, num_heads=1, qkv_tokens=4, proj_tokens=4))
    grow(model, ffn=2400, init="zero_keys")
    with pytest.raises(ValueError, match="has several segments, of a growth: `tokenformer export` joins them"):
        elastic.on_train_start(None, SimpleNamespace(model=model))
