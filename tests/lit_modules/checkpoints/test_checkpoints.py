"""Checkpoints that are whole or not there, whatever happens while they are written."""

import errno
import os
import shutil
import signal
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping

from lit_modules.callbacks.checkpoint import RunCheckpoint
from lit_modules.checkpoints import validation, writing
from lit_modules.checkpoints.compatibility import check_resume
from lit_modules.checkpoints.validation import find_corruption, latest_valid
from lit_modules.checkpoints.writing import AtomicCheckpointIO, partial_of, remove_partial_checkpoints
from lit_modules.optim.config import OptimConfig
from tokenformer import LMConfig


def test_checkpoints_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"weight": torch.arange(1000)}, path)
    assert find_corruption(path) is None
    before = path.read_bytes()

    def fail(checkpoint, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        io.save_checkpoint({}, path)
    assert path.read_bytes() == before


def test_damage_is_seen_wherever_it_is(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"weight": torch.arange(1000)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        data = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    for changed in (content[:-100], content[: len(content) // 2], b"", b"not a zip"):
        path.write_bytes(changed)
        assert "truncated" in find_corruption(path)
    flipped = bytearray(content)
    flipped[data.header_offset + 1000] ^= 1
    path.write_bytes(flipped)
    assert "corrupted" in find_corruption(path)
    with pytest.warns(UserWarning, match="passed over"):
        assert latest_valid([path]) is None


CALLBACKS = {"a": 1, "b": 2}


def write_file(io, path, content):
    io.save_checkpoint({"step": content, "weight": torch.full((1000,), content), "callbacks": CALLBACKS}, path)


def write_folder(io, path, content):
    """As FSDP2 does in one process."""
    partial_of(path).mkdir()
    torch.save({"step": content, "callbacks": CALLBACKS}, partial_of(path) / "meta.pt")
    torch.save(torch.full((1000,), content), partial_of(path) / "__0_0.distcp")
    validation.write_manifest(partial_of(path), [validation.checksums(partial_of(path), 0)])
    writing.publish(path)
    io.finish_save(path, None)


def killed_at(stage, act):
    """Whether a child process was killed in the middle of its call `stage` to the file system, while it acted."""
    child = os.fork()
    if child == 0:
        left = [stage]

        def dangerous(owner, name):
            function = getattr(owner, name)

            def counting(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    if name == "save":
                        Path(args[1] if isinstance(args[1], Path) else args[1].name).write_bytes(b"PK half")
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            setattr(owner, name, counting)

        for owner, name in ((torch, "save"), (os, "fsync"), (os, "unlink"), (os, "rmdir")):
            dangerous(owner, name)
        for name in ("replace", "unlink", "write_text"):
            dangerous(Path, name)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_kill_at_any_stage_of_a_write_leaves_a_whole_checkpoint(tmp_path, write):
    io = AtomicCheckpointIO()
    old, new = tmp_path / "step-1.ckpt", tmp_path / "step-2.ckpt"
    found = []
    for stage in range(100):
        if not old.exists():
            write(io, old, 1)
        if new.exists():
            writing.remove(new)

        def save_and_replace():
            write(io, new, 2)
            io.remove_checkpoint(old)

        killed = killed_at(stage, save_and_replace)
        whole = latest_valid(tmp_path.glob("*.ckpt"))
        found.append(torch.load(whole / "meta.pt" if whole.is_dir() else whole)["step"])
        assert [find_corruption(path) for path in tmp_path.glob("*.ckpt")].count(None) == len(
            list(tmp_path.glob("*.ckpt"))
        )
        remove_partial_checkpoints(tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} == {".ckpt"}
        if not killed:
            break
    assert not killed
    assert not old.exists()
    assert found == sorted(found)  # the old one as long as it was not there whole, then the new one
    assert found.count(1) >= 3
    assert found.count(2) >= 2


def test_an_asynchronous_save_keeps_the_old_one_until_it_is_whole(tmp_path, monkeypatch):
    io = AtomicCheckpointIO(asynchronous=True)
    weight = torch.zeros(1000)
    io.save_checkpoint({"weight": weight, "tied": weight}, tmp_path / "1.ckpt")
    io.wait()
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (time.sleep(0.3), replace(self, target))[1])
    io.save_checkpoint({"weight": weight, "tied": weight}, tmp_path / "2.ckpt")
    weight += 1
    io.remove_checkpoint(tmp_path / "1.ckpt")
    assert (tmp_path / "1.ckpt").exists()
    assert not (tmp_path / "2.ckpt").exists()
    io.wait()
    assert not (tmp_path / "1.ckpt").exists()
    saved = torch.load(tmp_path / "2.ckpt")
    assert not saved["weight"].any()
    assert saved["weight"].data_ptr() == saved["tied"].data_ptr()
    monkeypatch.setattr(writing, "write_checkpoint", lambda *_: 1 / 0)
    io.save_checkpoint({"weight": weight}, tmp_path / "3.ckpt")
    with pytest.raises(ZeroDivisionError):
        io.save_checkpoint({"weight": weight}, tmp_path / "4.ckpt")


def test_in_a_run_the_step_decides_which_is_the_newest(tmp_path):
    """A folder that is copied or restored has other times."""
    names = ("step-00000002", "step-00000010", "best-step-00000008", "unnamed", "epoch=1-step=4")
    for age, name in enumerate(reversed(names)):
        for run in ("a", "b"):
            path = tmp_path / run / f"{name}.ckpt"
            path.parent.mkdir(exist_ok=True)
            torch.save({"global_step": 9, "weight": torch.arange(10)}, path)
            os.utime(path, (age, age))
    os.utime(tmp_path / "a/step-00000002.ckpt", (50, 50))  # so this run is the one that was saved to last
    found = []
    while newest := latest_valid(tmp_path.glob("*/*.ckpt")):
        found.append(f"{newest.parent.name}/{newest.stem}")
        newest.unlink()
        if left := list(tmp_path.glob("a/*")):
            os.utime(left[0], (50, 50))
    in_order = ["step-00000010", "unnamed", "best-step-00000008", "epoch=1-step=4", "step-00000002"]
    assert found == [f"{run}/{name}" for run in "ab" for name in in_order]


@pytest.mark.parametrize("training", [False, True])
def test_outside_of_training_only_what_others_callbacks_saved_is_missed(training):
    """Lightning warns of each callback that has a state in the checkpoint and is not there."""

    class Theirs(Callback):
        pass

    here = RunCheckpoint(monitor="val/loss"), EarlyStopping("val/loss")
    gone = "EMA", "GrowParameterTokens", RunCheckpoint(monitor="step").state_key, EarlyStopping("val/top1").state_key
    keys = *gone, *(callback.state_key for callback in here), "Theirs", "Unknown"
    states = {key: {"a": 1} for key in keys}
    checkpoint = {"callbacks": dict(states)}
    trainer = SimpleNamespace(callbacks=list(here), training=training)
    module = SimpleNamespace(config=LMConfig(), optim=OptimConfig(), trainer=trainer, _trainer=trainer)
    check_resume(checkpoint, module)
    assert checkpoint["callbacks"].keys() == states.keys() - (set() if training else set(gone))


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_copy_is_whole_or_not_there_and_has_other_states(tmp_path, write, monkeypatch):
    """As a resumed run makes it of a step that was saved once and had to be twice."""
    io = AtomicCheckpointIO()
    write(io, tmp_path / "a.ckpt", 1)
    io.copy_checkpoint(tmp_path / "a.ckpt", tmp_path / "b.ckpt", {"b": 3})
    for name, value in (("a", 2), ("b", 3)):
        path = tmp_path / f"{name}.ckpt"
        assert find_corruption(path) is None
        head = torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)
        assert head["callbacks"] == {"a": 1, "b": value}
    if write is write_folder:  # whose files are copied by one call, with one error for all
        monkeypatch.setattr("shutil.copytree", partial(shutil.copytree, copy_function=full))
        with pytest.warns(UserWarning, match=r"c.ckpt could not be written: .*No space left"):
            io.copy_checkpoint(tmp_path / "a.ckpt", tmp_path / "c.ckpt", {})
        monkeypatch.undo()
    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match=r"c.ckpt could not be written: No space left"):
        io.copy_checkpoint(tmp_path / "a.ckpt", tmp_path / "c.ckpt", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
