"""What is in docs/reliability.md: each failure is injected, and the run, or the next one, is looked at."""

import json
import os
import shutil
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lit_modules.checkpoints import validation, writing
from lit_modules.checkpoints.validation import find_corruption, latest_valid
from lit_modules.cli import main
from lit_modules.runs.errors import RunError
from tests.integration.growing import checkpoint_of, difference
from tests.integration.kill import HARM
from tests.integration.processes import run_in_processes
from tests.integration.tiny import rows
from tests.lit_modules.runs.test_logs import board_steps

# Checkpoints that are corrupted, or half there.


def test_leftovers_of_a_killed_save_are_removed_at_the_next_start(copied):
    command, run = copied
    (run / "checkpoints/step-00000009.ckpt.partial").write_bytes(b"half")
    (run / "checkpoints/step-00000010.ckpt.partial").mkdir()
    (run / "checkpoints/step-00000010.ckpt.partial/meta.pt").write_bytes(b"half")
    main(command)
    assert {path.name for path in (run / "checkpoints").iterdir()} >= {"step-00000006.ckpt"}
    assert not list(run.glob("checkpoints/*.partial"))
    assert [step for step, _ in rows(run, "train/loss")] == list(range(6))


# The disk is full.


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A disk of 16 MiB; without the right to mount one, a `torch.save` that fails beside a file called filler."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)], check=False, capture_output=True
        ).returncode
    )
    save = torch.save

    def full(content, file):
        if (disk / "run/filler").exists():
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    if not mounted:
        monkeypatch.setattr(torch, "save", full)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**24, 0, 2**24))
    yield disk
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("until", [38, 100])  # rows of so many steps need more than what is left of a block
def test_a_full_disk_costs_saves_but_no_checkpoint(finished, small_disk, until):
    config, _ = finished
    run = small_disk / "run"
    harm = [f"{HARM}.FillDisk", "--trainer.callbacks.step=2", f"--trainer.callbacks.until={until}"]
    command = ["fit", "--config", str(config), "--run_dir", str(run), "--trainer.max_steps=40", *harm]
    command += ["--checkpoint.save_top_k=1"]
    ends = pytest.raises(RunError, match="40.ckpt could not be written.* last steps of the run are lost")
    with (
        ends if until > 40 else nullcontext(),
        pytest.warns(UserWarning, match="3.ckpt could not be written") as warned,
    ):
        main(command)
    is_full, told = small_disk.is_mount(), "\n".join(str(warning.message) for warning in warned)
    left = "step-00000040.ckpt" if until == 38 else "step-00000002.ckpt"
    assert [path.name for path in (run / "checkpoints").iterdir()] == [left]
    assert find_corruption(run / "checkpoints" / left) is None
    made = [step for step, _ in rows(run, "train/loss")]
    if until == 38:
        assert made == list(range(40))
        assert board_steps(run, "train/loss") == made
        assert "metrics.csv can't be written (No space left on device): the training goes on" in told or not is_full
    else:
        assert made[:2] == [0, 1]


def test_a_run_folder_that_is_deleted_is_named(copied):
    command, run = copied
    gone = r"the run's folder .*run was deleted or moved: it is made again, without what it held"
    with pytest.warns(UserWarning, match=gone):
        main([*command, f"{HARM}.RemoveFolder", "--trainer.callbacks.step=5"])
    assert [step for step, _ in rows(run, "train/loss")] == [5]
    assert latest_valid((run / "checkpoints").glob("*.ckpt")).name == "step-00000006.ckpt"


def test_a_row_is_in_the_log_before_its_step_is_saved(copied, monkeypatch):
    """A process that dies right after a save leaves a log to which only later rows are missing."""
    command, run = copied
    write = writing.write_checkpoint

    def write_and_die(checkpoint, path):
        write(checkpoint, path)
        raise SystemExit

    monkeypatch.setattr(writing, "write_checkpoint", write_and_die)
    with pytest.raises(SystemExit):
        main(command)
    monkeypatch.undo()
    assert latest_valid((run / "checkpoints").glob("*.ckpt")).name == "step-00000005.ckpt"
    main(command)
    assert [step for step, _ in rows(run, "train/loss")] == list(range(6))
    assert board_steps(run, "train/loss") == list(range(6))


def test_a_corrupted_part_of_a_sharded_checkpoint_is_seen(finished, small_disk, tmp_path):
    """Saved and resumed in two processes, and on a disk that is full at a save; then one part gets a flipped byte."""
    config, _ = finished
    both = ["fit", "--config", config, "--trainer.strategy=fsdp2", "--trainer.devices=2"]
    run, steps = ["--run_dir", tmp_path / "run"], "--trainer.max_steps={}".format
    harm = [f"{HARM}.FillDisk", "--trainer.callbacks.step=1", "--trainer.callbacks.until=2"]
    full = [*both, *harm, steps(3), "--run_dir", small_disk / "run"]
    run_in_processes([[*both, *run, steps(2)], [*both, *run, steps(3), "--ckpt_path", "last"], full])
    if small_disk.is_mount():
        left = {path.name for path in (small_disk / "run/checkpoints").iterdir()}
        assert left == {"step-00000001.ckpt", "step-00000003.ckpt"}
    saved = tmp_path / "run/checkpoints/step-00000003.ckpt"
    assert set(json.loads((saved / "manifest.json").read_text())) == {
        path.name for path in saved.iterdir() if path.name != "manifest.json"
    }
    (part, *_) = saved.glob("__1_*")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-00000003.ckpt is passed over: its part __1_0.distcp is corrupted"):
        assert latest_valid(saved.parent.glob("*.ckpt")).name == "step-00000002.ckpt"
    part.write_bytes(content[:-1])
    assert "truncated" in find_corruption(saved)
    (saved / "manifest.json").unlink()
    assert "half-written" in find_corruption(saved)


def test_a_run_whose_checkpoints_will_not_fit_does_not_start(finished, tmp_path, monkeypatch):
    config, run = finished
    saved = torch.load(checkpoint_of(run, 4), weights_only=True)
    size = 3 * sum(tensor.nbytes for tensor in saved["state_dict"].values())
    grow = ["--trainer.callbacks=GrowParameterTokens", '--trainer.callbacks.stages=[{"at_step": 2, "factor": 8.0}]']
    for options, room in (([], 3.5), (["--trainer.callbacks=EMA"], 4.5), (grow, 8)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, r=room: shutil._ntuple_diskusage(0, 0, int(r * size)))
        command = ["fit", "--config", str(config), "--trainer.max_steps=6", *options]
        if not options:  # two are kept, and a best one, and one is written
            main([*command, "--run_dir", str(tmp_path / "fits"), "--checkpoint.save_top_k=1"])
        with pytest.raises(ValueError, match="has .* GiB free; 4 checkpoints of .*lower checkpoint.save_top_k"):
            main([*command, "--run_dir", str(tmp_path / f"{room}"), "--checkpoint.save_top_k=2"])


# What changes under a run.


def test_other_data_or_another_model_under_a_resumed_run_is_refused(copied, finished, tmp_path, corpus):
    command, _ = copied
    for option, message in (
        ("--data.seed=1", r"data.seed: 0 then, 1 now"),
        ("--data.seq_len=16", r"data.seq_len: 32 then, 16 now"),
        ("--model.config.score_norm=softmax", r"score_norm: l2_norm_gelu then, softmax now.*model.init_from"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*command, option])
    tokens = tmp_path / "tokens"
    shutil.copytree(finished[0].parent.parent / "tokens", tokens)
    same = f"--data.cache_dir={tokens}"
    main([*command, same, "--trainer.max_steps=5"])
    for file in tokens.glob("*/train.bin"):
        changed = bytearray(file.read_bytes())
        changed[100] ^= 1
        file.write_bytes(changed)
    with pytest.raises(ValueError, match=r"training tokens: [\d,]+ with fingerprint \w+ then, .* now"):
        main([*command, same])


# What comes from others.


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_a_checkpoint_with_code_in_it_is_refused(copied, tmp_path):
    command, run = copied
    harmful = run / "checkpoints/step-00000009.ckpt"
    torch.save({"state_dict": {}, "x": Harmful(tmp_path / "executed")}, harmful)
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    shutil.copy(harmful, folder / "meta.pt")
    validation.write_manifest(folder, [validation.checksums(folder, 0)])
    assert "holds code" in find_corruption(folder)
    with pytest.raises(ValueError, match=r"step-00000009.ckpt'?: it holds code \(.*\), which is never run"):
        main([*command[:-3], "--ckpt_path", str(harmful)])
    with pytest.warns(UserWarning, match="step-00000009.ckpt is passed over: it holds code"):
        main(command)
    assert not (tmp_path / "executed").exists()


HOSTILE = {
    "trainer: !!python/object/apply:os.system [touch executed]": "could not determine a constructor",
    "trainer: {callbacks: [{class_path: os.system, init_args: {command: touch executed}}]}": "os.system",
    "data: {class_path: subprocess.Popen, init_args: {args: [touch, executed]}}": "Popen",
    'model: {class_path: builtins.exec, init_args: {source: \'open("executed", "w")\'}}': "exec",
    "run_dir: ${eval:open('executed','w')}": "${...} that can't be resolved",
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_config_runs_nothing(finished, tmp_path, monkeypatch, capsys, hostile):
    monkeypatch.chdir(tmp_path)
    Path("hostile.yaml").write_text(hostile)
    with pytest.raises((SystemExit, ValueError)) as refused:
        main(["fit", "--config", str(finished[0]), "--config", "hostile.yaml"])
    assert HOSTILE[hostile] in capsys.readouterr().err + str(refused.value)
    assert not Path("executed").exists()


def test_a_run_folder_with_an_odd_name_is_a_folder(finished, tmp_path):
    run = tmp_path / "a;touch $(executed) 'b' \n#%"
    main(["fit", "--config", str(finished[0]), "--run_dir", str(run), "--trainer.max_steps=2"])
    assert latest_valid((run / "checkpoints").glob("*.ckpt")) is not None


def test_what_is_linked_in_a_run_folder_is_left_alone(copied, tmp_path):
    """Nothing outside of it is written or removed; the checkpoints may lie elsewhere, behind a link to their folder."""
    command, run = copied
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("config.yaml", "metrics.csv", "run.lock"):
        (run / name).rename(mine / name)
        (run / name).symlink_to(mine / name)
    (mine / "folder").mkdir()
    (mine / "folder/text").write_text("keep")
    (run / "checkpoints/step-00000001.ckpt.partial").symlink_to(mine / "folder")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    main(command)
    assert before == {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    assert not any(path.is_symlink() for path in [*run.iterdir(), *elsewhere.iterdir()] if path.name != "checkpoints")
    assert [step for step, _ in rows(run, "train/loss")] == [*range(len(rows(run, "train/loss")))]


# Written while the training goes on.


def test_asynchronous_saves_hold_the_step_of_the_save(finished, tmp_path, monkeypatch):
    config, run = finished
    replace = Path.replace

    def slowly(self, target):
        time.sleep(0.3)  # steps are made meanwhile
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slowly)
    main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--checkpoint.asynchronous=true"])
    for step in range(1, 5):
        assert difference(run, tmp_path / "run", step) == 0
    both = [
        torch.load(folder / "checkpoints/step-00000004.ckpt", weights_only=True) for folder in (run, tmp_path / "run")
    ]
    assert both[0]["loops"] == both[1]["loops"]
    assert both[0]["TextDataModule"] == both[1]["TextDataModule"]
