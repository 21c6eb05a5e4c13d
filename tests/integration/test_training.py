"""The command line on a small corpus: what a run writes, what the later commands say of it, what is refused.

One file: the tests share a run with everything switched on, which takes seconds to make.
"""

import csv
import math
import subprocess
import sys

import pytest
import torch
import yaml

from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from tests.conftest import ROOT
from tests.integration.tiny import rows, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """(config, run folder) of a finished run with everything switched on that costs little."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, corpus)
    run_dir = folder / "run"
    sample = "--trainer.callbacks=SampleText", "--trainer.callbacks.max_new_tokens=20"
    more = "--trainer.callbacks+=CompressionBaseline", "--trainer.callbacks+=LossCurve"
    main(["fit", "--config", str(config), "--run_dir", str(run_dir), *sample, *more, "--model.config.scale=learned"])
    return config, run_dir


def test_a_run_writes_its_logs_pictures_and_checkpoints(trained):
    _, run_dir = trained
    names = {path.name for path in run_dir.iterdir()}
    assert {"metrics.csv", "config.yaml", "sample.txt", "loss.png", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    saved = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert {"step-00000004.ckpt", "step-00000008.ckpt", "best-step-00000008.ckpt"} == saved
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "sample.txt").read_text().startswith("def ")


def test_logged_metrics_are_right(trained):
    _, run_dir = trained
    steps = [1, 3, 5, 7]
    for column in ("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"):
        assert [step for step, _ in rows(run_dir, column)] == steps
    assert all(value > 0 for _, value in rows(run_dir, "train/grad_norm"))
    assert rows(run_dir, "train/mfu") == [] if not torch.cuda.is_available() else True  # a CPU's peak is not known
    tokens = 4 * 32
    assert rows(run_dir, "train/tokens") == [(step, tokens * (step + 1)) for step in steps]
    module = LanguageModule.load_from_checkpoint(run_dir / "checkpoints/step-00000008.ckpt")
    flops = 3 * module.config.flops_per_token(32)
    assert rows(run_dir, "train/flops") == [(step, tokens * (step + 1) * flops) for step in steps]
    losses = dict(rows(run_dir, "val/loss"))
    assert list(losses) == [3, 7]
    assert losses[7] < losses[3] < math.log(257) + 0.1
    for step, perplexity in rows(run_dir, "val/perplexity"):
        assert perplexity == pytest.approx(math.exp(losses[step]), rel=1e-5)
    for _, entropy in rows(run_dir, "val/entropy"):
        assert 0 < entropy < math.log(257)


def test_logged_rates_are_those_of_the_schedule(trained):
    """What is logged is the rate that the step was made with, not the next one's."""
    _, run_dir = trained
    from lit_modules.optim.config import OptimConfig
    from lit_modules.optim.schedule import lr_factor

    factor = lr_factor(OptimConfig(warmup_steps=2), 8)
    for step, lr in rows(run_dir, "train/lr"):
        assert lr == pytest.approx(1e-3 * factor(step))


def test_validation_covers_every_token(trained, corpus):
    """val/loss equals a plain loop over the held-out text, and bits per byte follow from it."""
    config, run_dir = trained
    from datamodules.text import TextDataModule

    arguments = yaml.safe_load(config.read_text())["data"]["init_args"]
    data = TextDataModule(**arguments)
    data.setup("fit")
    module = LanguageModule.load_from_checkpoint(run_dir / "checkpoints/step-00000008.ckpt").double()
    nats = count = 0.0
    ids = torch.tensor(data.val.ids.astype("int64"))
    for start in range(0, len(ids) - 1, 32):
        window = ids[start : start + 33]
        log_probs = module.model(window[None, :-1]).log_softmax(-1)[0]
        nats -= log_probs.gather(1, window[1:, None]).sum().item()
        count += len(window) - 1
    assert count == len(ids) - 1
    assert rows(run_dir, "val/loss")[-1][1] == pytest.approx(nats / count, rel=1e-5)
    bits = nats / count / math.log(2) * data.val.split.tokens / data.val.split.bytes
    assert rows(run_dir, "val/bits_per_byte")[-1][1] == pytest.approx(bits, rel=1e-5)


def test_validate_and_test_repeat_the_loss(trained, tmp_path, capsys):
    _, run_dir = trained
    best = run_dir / "checkpoints/best-step-00000008.ckpt"
    expected = rows(run_dir, "val/loss")[-1][1]
    for command, column in (("validate", "val/loss"), ("test", "test/loss")):
        out = tmp_path / command
        main([command, "--config", str(run_dir / "config.yaml"), "--ckpt_path", str(best), "--run_dir", str(out)])
        assert rows(out, column)[-1][1] == pytest.approx(expected, rel=1e-6)
    assert "bits_per_byte" in capsys.readouterr().out


def test_later_commands_leave_the_run_alone(trained, tmp_path, monkeypatch):
    """The commands that the summary suggests."""
    monkeypatch.chdir(tmp_path)
    _, run_dir = trained
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    best = str(run_dir / "checkpoints/best-step-00000008.ckpt")
    main(["validate", "--config", str(run_dir / "config.yaml"), "--ckpt_path", best])
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert len(list((tmp_path / "runs" / "tiny").glob("*-validate"))) == 1
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert saved["run_dir"] is None
    assert saved["ckpt_path"] is None
    with pytest.raises(ValueError, match="holds a run already"):
        main(["validate", "--config", str(run_dir / "config.yaml"), "--ckpt_path", best, "--run_dir", str(run_dir)])


def test_predict_writes_the_loss_of_every_token(trained, tmp_path):
    _, run_dir = trained
    text = tmp_path / "text.txt"
    text.write_text("the model reads the key and writes a value. " * 3)
    out = tmp_path / "out"
    config = str(run_dir / "config.yaml")
    arguments = ["--data.predict_file", str(text), "--run_dir", str(out), "--ckpt_path"]
    main(["predict", "--config", config, *arguments, str(run_dir / "checkpoints/step-00000008.ckpt")])
    with (out / "predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    assert "".join(row["token"] for row in table) == text.read_text()
    assert [int(row["position"]) for row in table] == list(range(len(table)))
    module = LanguageModule.load_from_checkpoint(run_dir / "checkpoints/step-00000008.ckpt")
    ids = torch.tensor([256, *text.read_bytes()])
    log_probs = module.model(ids[None, :33]).log_softmax(-1)[0, :32]
    for i in range(32):
        assert float(table[i]["nats"]) == pytest.approx(-log_probs[i, ids[i + 1]].item(), abs=1e-4)
        assert float(table[i]["entropy"]) == pytest.approx(-(log_probs[i].exp() * log_probs[i]).sum().item(), abs=1e-4)


def test_a_checkpoint_loads_without_its_config_and_runs_no_code(trained):
    _, run_dir = trained
    path = run_dir / "checkpoints/step-00000008.ckpt"
    module = LanguageModule.load_from_checkpoint(path, weights_only=True)
    assert module.config.scale == "learned"
    assert module.model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 257)


def test_the_saved_config_starts_the_same_run_again(trained, tmp_path):
    _, run_dir = trained
    again = tmp_path / "again"
    main(["fit", "--config", str(run_dir / "config.yaml"), "--run_dir", str(again)])
    for column in ("train/loss", "val/loss"):
        assert rows(again, column) == rows(run_dir, column)
    saved = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run_dir, again)]
    assert saved[0] == saved[1]


def printed_config(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_print_config_goes_round(trained, tmp_path, capsys):
    config, _ = trained
    first = printed_config(capsys, "fit", "--config", str(config), "--trainer.max_steps", "5")
    (tmp_path / "printed.yaml").write_text(first)
    assert printed_config(capsys, "fit", "--config", str(tmp_path / "printed.yaml")) == first
    assert yaml.safe_load(first)["trainer"]["max_steps"] == 5


def test_later_configs_and_the_command_line_win(trained, tmp_path, capsys):
    config, _ = trained
    (tmp_path / "more.yaml").write_text("trainer: {max_steps: 5, log_every_n_steps: 7}\n")
    files = ["--config", str(config), "--config", str(tmp_path / "more.yaml")]
    printed = yaml.safe_load(printed_config(capsys, "fit", *files, "--trainer.log_every_n_steps", "9"))
    assert printed["trainer"]["max_steps"] == 5
    assert printed["trainer"]["log_every_n_steps"] == 9
    assert printed["model"]["init_args"]["optim"]["lr"] == 1e-3


def test_interpolation_follows_the_command_line(trained, tmp_path, capsys):
    config, _ = trained
    changed = yaml.safe_load(config.read_text())
    changed["model"]["init_args"]["optim"]["warmup_steps"] = "${trainer.log_every_n_steps}"
    (tmp_path / "i.yaml").write_text(yaml.safe_dump(changed))
    out = printed_config(capsys, "fit", "--config", str(tmp_path / "i.yaml"), "--trainer.log_every_n_steps", "3")
    assert yaml.safe_load(out)["model"]["init_args"]["optim"]["warmup_steps"] == 3


def test_run_folders_never_collide(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, corpus)
    for _ in range(2):
        main(["fit", "--config", str(config), "--trainer.max_steps", "3"])
    first, second = sorted((tmp_path / "runs" / "tiny").iterdir())
    assert first != second
    with pytest.raises(ValueError, match="holds a run already: resume it by --ckpt_path last"):
        main(["fit", "--config", str(config), "--run_dir", str(first)])


def test_the_baseline_is_one_line_away(corpus, tmp_path):
    config = write_config(tmp_path, corpus)
    main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "r"), "--model.config.baseline", "parameters"])
    assert rows(tmp_path / "r", "val/loss")[-1][1] < rows(tmp_path / "r", "val/loss")[0][1]


@pytest.mark.parametrize(
    "options",
    [
        ["--model.optim.schedule=wsd", "--model.checkpoint_activations=true", "--trainer.accumulate_grad_batches=2"],
        ["--model.optim.schedule=constant", "--trainer.precision=bf16-mixed"],
        ["--trainer.precision=bf16-true", "--model.config.scale=learned"],
        ["--trainer.precision=64-true", "--trainer.callbacks=EMA", "--trainer.callbacks.decay=0.5"],
        ["--model.compile=true", "--model.config.depth=1", "--trainer.max_steps=4"],
        ["--data.tokenizer=bpe", "--data.bpe_vocab_size=280", "--model.config.vocab_multiple=64"],
    ],
    ids=["wsd, recompute, accumulate", "constant, bf16-mixed", "bf16-true", "EMA, 64-true", "compiled", "BPE"],
)
def test_options_train(corpus, tmp_path, options):
    config = write_config(tmp_path, corpus)
    main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), *options])
    losses = [loss for _, loss in rows(tmp_path / "run", "train/loss")]
    assert losses[-1] < losses[0]
    assert rows(tmp_path / "run", "val/loss")


def test_recomputing_activations_and_accumulating_change_nothing(corpus, tmp_path):
    """Same batches of 8: at once, as 2 x 4, and with activations computed again."""
    losses = {}
    for name, options in {
        "plain": ["--data.batch_size=8"],
        "accumulated": ["--data.batch_size=4", "--trainer.accumulate_grad_batches=2"],
        "recomputed": ["--data.batch_size=8", "--model.checkpoint_activations=true"],
        "scores recomputed": ["--data.batch_size=8", "--model.recompute_scores=true"],
    }.items():
        config = write_config(tmp_path, corpus)
        more = ["--trainer.precision=64-true", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"]
        main(["fit", "--config", str(config), "--run_dir", str(tmp_path / name), *options, *more])
        losses[name] = [loss for _, loss in rows(tmp_path / name, "train/loss")]
    assert len(losses["plain"]) == 4
    assert losses["accumulated"] == pytest.approx(losses["plain"], abs=1e-6)
    assert losses["recomputed"] == losses["scores recomputed"] == losses["plain"]


def test_prepare_only_tokenizes(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, corpus)
    main(["prepare", "--config", str(config), "--data.cache_dir", str(tmp_path / "here")])
    (folder,) = (tmp_path / "here").iterdir()
    assert {path.name for path in folder.iterdir()} == {"train.bin", "val.bin", "metadata.json"}
    assert not (tmp_path / "runs").exists()


def test_help_imports_nothing_heavy():
    code = "import sys; from lit_modules.cli import main; main(['--help']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "tokenformer fit --config configs/language/quickstart.yaml" in result.stdout
    assert not {"torch", "lightning", "numpy", "jsonargparse"} & set(result.stdout.splitlines()[-1].split())


def test_a_training_step_reads_nothing_from_the_device(corpus, tmp_path):
    """Between two lines of the log no value is copied to the host: on a GPU each such read would wait for it."""
    trainer = {"max_steps": 6, "log_every_n_steps": 6, "limit_val_batches": 0}
    config = write_config(tmp_path, corpus, trainer=trainer, checkpoint={"every_n_train_steps": 6})
    watch = "--trainer.callbacks=tests.integration.counting.CountReads"
    main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), watch, "--model.config.scale=learned"])
    from tests.integration.counting import CountReads

    assert len(CountReads.ops_of_steps) == 6
    assert all(ops > 100 for ops in CountReads.ops_of_steps)
    assert CountReads.reads_of_steps[1:5] == [0] * 4  # the first one sets things up


def test_fast_dev_run_of_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "configs/language/quickstart.yaml")
    main(["fit", "--config", path, "--trainer.fast_dev_run=true", "--run_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "sample.txt").exists()
    assert not list(tmp_path.glob("**/*.ckpt"))


def test_a_shorter_last_step_is_logged_as_its_own(corpus, tmp_path):
    """Five batches an epoch, two a step: the third step of an epoch has one batch, and the next starts anew."""
    config = write_config(tmp_path, corpus, trainer={"log_every_n_steps": 1, "max_steps": 6, "limit_train_batches": 5})
    more = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=10"]
    main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), *more])
    assert [tokens for _, tokens in rows(tmp_path / "run", "train/tokens")] == [128 * n for n in (2, 4, 5, 7, 9, 10)]
    losses = [loss for _, loss in rows(tmp_path / "run", "train/loss")]
    assert len(set(losses)) == 6


def test_a_nan_is_not_left_out_of_the_validation_loss(trained, tmp_path):
    _, run_dir = trained
    saved = torch.load(run_dir / "checkpoints/step-00000008.ckpt", weights_only=True)
    saved["state_dict"]["model.embedding.weight"][ord("q")] = float("nan")  # a rare letter
    torch.save(saved, tmp_path / "nan.ckpt")
    arguments = ["--config", str(run_dir / "config.yaml"), "--ckpt_path", str(tmp_path / "nan.ckpt")]
    main(["validate", *arguments, "--run_dir", str(tmp_path / "v")])
    assert math.isnan(rows(tmp_path / "v", "val/loss")[0][1])
