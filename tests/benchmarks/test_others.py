"""What `benchmarks.others` makes of the logs of others' scripts, and of ours; the scripts themselves are not run."""

from types import SimpleNamespace

import pytest

from benchmarks import others
from benchmarks.harness import Unavailable

# Four lines that warm up, at 9 seconds each, then half a second and a quarter.
MILLISECONDS = [9000.0] * 4 + [500.0, 250.0]
LOGS = {
    "train.py": [
        *(f"iter {i}: loss 9.01, time {ms:.2f}ms, mfu 0.3%" for i, ms in enumerate(MILLISECONDS)),
        *(f"Train: 0 [ {i}/6 (1%)]  Loss: 7.0 (7.0)  Time: {ms / 1000:.3f}s, 1/s" for i, ms in enumerate(MILLISECONDS)),
    ],
    "litgpt": [f"Epoch 1 | iter {i} step {i} | iter time: {ms:.2f} ms (step)" for i, ms in enumerate(MILLISECONDS)],
}
OURS = "step,train/seconds,train/tokens\n4,10.0,8192\n5,,\n6,12.0,12288\n"  # 2,048 tokens and a batch a second


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """Folders of clones that are empty, and logs in place of processes."""
    started = []

    def python(arguments, *_, **__):
        started.append(arguments)
        run_dir = next((a.partition("=")[2] for a in arguments if a.startswith("--run_dir=")), None)
        if run_dir is None:
            return "\n".join(LOGS["litgpt" if "litgpt" in arguments else "train.py"])
        (folder := tmp_path.__class__(run_dir)).mkdir()
        (folder / "metrics.csv").write_text(OURS)
        return ""

    for name in ("nanoGPT", "litgpt", "timm"):
        (tmp_path / name).mkdir()
    text = SimpleNamespace(
        seq_len=256, batch_size=8, vocab_size=8192, tokens_per_batch=2048, folder=tmp_path, tokenizer_name="bpe",
        bpe_vocab_size=8192, cache_dir="data",
    )  # fmt: skip
    monkeypatch.setattr(others, "python", python)
    monkeypatch.setattr(others, "text", lambda **_: text)
    monkeypatch.setattr(others, "commit", lambda folder: f"commit of {folder.name}")
    monkeypatch.setattr(others, "PEERS", tmp_path)
    monkeypatch.setattr(others, "IMAGES", tmp_path)
    return started


@pytest.mark.parametrize(("peer", "unit"), [("nanoGPT", 2048), ("litgpt", 2048), ("timm", 8)])
def test_speeds_are_those_of_the_logs_without_the_warm_up(peers, peer, unit):
    found, columns = others.measure(peer, 2, "cpu", rounds=3)
    (((_, against), ratios),) = found.items()
    assert peer.lower() in against.lower()
    theirs = 2 * unit / 0.75
    assert ratios == pytest.approx([unit / theirs] * 3)
    assert (float(columns["fit_per_s"]), float(columns["peer_per_s"])) == pytest.approx((unit, theirs), rel=1e-2)
    assert columns["peer_commit"] == f"commit of {peer}"
    assert len(peers) == 2 * 4


def test_a_peer_that_is_not_there_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(others, "PEERS", tmp_path)
    with pytest.raises(Unavailable, match="needs a clone of litgpt"):
        others.measure("litgpt", 2, "cpu", rounds=1)


def test_what_a_script_says_when_it_fails_is_shown():
    with pytest.raises(RuntimeError, match="no such model"):
        others.python(["-c", "import sys; sys.exit('no such model')"])
