"""`tokenformer sweep`: what is trained with which values, what is left and resumed, what the table says."""

import csv
import os
import signal
import sys
import threading
import time

import pytest

from lit_modules.cli import main
from lit_modules.commands import sweep
from tests.integration.tiny import rows, write_config


def table(folder):
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def config(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, corpus, trainer={"max_steps": 4, "val_check_interval": 2})


@pytest.fixture
def losses(monkeypatch):
    """Losses of validations by a run's name, or an exit code; the command lines of the runs that were asked for."""
    of, asked = {}, []

    def fit(args):
        folder = sweep.Path(args[args.index("--run_dir") + 1])
        asked.append((folder.name, args))
        if isinstance(of[folder.name], int):
            return of[folder.name]
        folder.mkdir(parents=True)
        lines = [f"{10 * (i + 1) - 1},{loss},{i + 1}.5" for i, loss in enumerate(of[folder.name])]
        (folder / "metrics.csv").write_text("\n".join(["step,val/loss,train/seconds", *lines, ""]))
        return 0

    monkeypatch.setattr(sweep, "_fit", fit)
    monkeypatch.setattr(sweep, "plot", lambda *_: [])
    return of, asked


def test_runs_are_trained_compared_and_gone_on_with(config, tmp_path, monkeypatch, capsys):
    """The runs themselves are `fit`, here in this process."""
    codes = {"lr=1e-2": 130}

    def fit(args):
        name = args[args.index("--run_dir") + 1].rpartition("/")[2]
        if code := codes.pop(name, 0):
            return code
        try:
            main(["fit", *args])
        except Exception:
            return 1
        return 0

    monkeypatch.setattr(sweep, "_fit", fit)
    command = ["sweep", "--config", str(config), "--model.optim.lr", "1e-3", "1e-2", "1e30"]
    with pytest.raises(SystemExit, match="130"):
        main(command)
    folder = tmp_path / "runs/tiny/sweep-lr"
    assert [row["run"] for row in table(folder)] == ["lr=1e-3"]
    before = (folder / "lr=1e-3/metrics.csv").read_bytes()
    main(command)
    assert (folder / "lr=1e-3/metrics.csv").read_bytes() == before
    first, second, third = table(folder)
    assert [row["status"] for row in (first, second, third)] == ["finished", "finished", "diverged"]
    for row in (first, second):
        logged = dict(rows(folder / row["run"], "val/loss"))
        assert float(row["best val/loss"]) == pytest.approx(min(logged.values()), rel=1e-5)
        assert logged[int(row["at step"]) - 1] == min(logged.values())
        assert float(row["last val/loss"]) == pytest.approx(logged[3], rel=1e-5)
        assert float(row["seconds"]) > 0
    assert first["best val/loss"] > second["best val/loss"]
    out = capsys.readouterr().out
    assert "best: lr=1e-2, val/loss " in out
    assert "edge" not in out  # the next one diverged
    assert (folder / "curves.png").is_file()


def test_all_combinations_of_what_has_several_values(config, losses, tmp_path, capsys):
    of, asked = losses
    of |= {"lr=1e-3-betas=0.9-0.95": [3, 2], "lr=1e-3-betas=0.9-0.99": [3, 1], "lr=4e-3-betas=0.9-0.95": [3, 2.5]}
    of |= {"lr=4e-3-betas=0.9-0.99": [2, 9]}
    lr, betas = ["--model.optim.lr", "1e-3", "4e-3"], ["--model.optim.betas", "[0.9,0.95]", "[0.9,0.99]"]
    folder = tmp_path / "mine"
    given = [
        "-c",
        str(config),
        *lr,
        "--seed_everything=3",
        *betas,
        "--trainer.callbacks+=EMA",
        "--run_dir",
        str(folder),
    ]
    main(["sweep", *given])
    assert [name for name, _ in asked] == list(of)
    fixed = ["-c", str(config), "--model.optim.lr=4e-3", "--seed_everything=3", "--model.optim.betas=[0.9,0.95]"]
    run = ["--trainer.callbacks+=EMA", "--run_dir", str(folder / "lr=4e-3-betas=0.9-0.95"), "--ckpt_path", "auto"]
    assert asked[2][1] == [*fixed, *run]
    last = table(folder)[-1]
    assert last == {
        "run": "lr=4e-3-betas=0.9-0.99",
        "lr": "4e-3",
        "betas": "[0.9,0.99]",
        "status": "finished",
        "best val/loss": "2",
        "at step": "10",
        "last val/loss": "9",
        "seconds": "2.5",
    }
    out = capsys.readouterr().out
    assert "best: lr=1e-3-betas=0.9-0.99, val/loss 1 at step 20\nlr=1e-3 is the edge of its values: try lower" in out
    assert "betas=" not in out.split("edge", 1)[1]  # no numbers


def test_new_values_join_and_what_failed_is_tried_again(config, losses, tmp_path, capsys):
    of, asked = losses
    of |= {"dim=32": 1, "dim=64": [4], "dim=128": [3]}
    command = ["sweep", "--config", str(config), "--model.config.dim"]
    main([*command, "64", "32"])
    of["dim=32"] = [5]
    main([*command, "32", "64", "128"])
    assert [name for name, _ in asked] == ["dim=64", "dim=32", "dim=32", "dim=128"]
    assert [(row["dim"], row["status"]) for row in table(tmp_path / "runs/tiny/sweep-dim")] == [
        ("32", "finished"),
        ("64", "finished"),
        ("128", "finished"),
    ]
    assert "dim=128 is the edge of its values: try higher ones too" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a sweep with other settings .*seed_everything 1.*another --run_dir"):
        main([*command, "32", "64", "--seed_everything", "1"])
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match=r"another content of .*tiny\.yaml"):
        main([*command, "32", "64"])


def test_runs_that_all_fail(config, losses, tmp_path):
    of, _ = losses
    of |= {"lr=1.0": -9, "lr=2.0": 1}
    diverged = tmp_path / "runs/tiny/sweep-lr/lr=2.0"
    diverged.mkdir(parents=True)
    (diverged / "nonfinite-step-00000003-rank-0.pt").touch()
    with pytest.raises(ValueError, match=r"no run has finished(.|\n)*lr=1.0  1.0  failed\nlr=2.0  2.0  diverged"):
        main(["sweep", "--config", str(config), "--model.optim.lr", "1.0", "2.0"])


def test_what_can_not_be_is_refused_before_anything_is_trained(config, losses, capsys):
    for options, message in (
        (["--model.optim.lr", "[1e-3, 2e-3]"], "no key has several values: give such as --model.optim.lr 1e-3 2e-3"),
        (["--model.optim.lr", "1e-3", "1e-3"], "lr=1e-3 is given twice"),
        (["--model.optim.lr", "1e-3", "2e-3", "--ckpt_path", "last"], "--ckpt_path: the runs of a sweep begin anew"),
    ):
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            main(["sweep", "--config", str(config), *options])
    with pytest.raises(ValueError, match="unknown argument '3': give --KEY VALUE"):
        main(["sweep", "3"])
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "--config", str(config), "--model.optim.lr", "1e-3", "much"])
    assert "model.optim.lr='much': must be" in capsys.readouterr().err
    assert losses[1] == []


def test_a_process_hears_of_what_this_one_is_asked_to_do(capfd):
    """Its exit code comes back, or the request's, if it was about to end; the handlers that were there, too."""
    assert sweep._fit(["--help"]) == 0
    assert "usage: tokenformer fit" in capfd.readouterr().out
    before = signal.getsignal(signal.SIGTERM)
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); print(flush=True); time.sleep(20)"

    def ask():
        while not capfd.readouterr().out:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert sweep._wait([sys.executable, "-c", waits]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
