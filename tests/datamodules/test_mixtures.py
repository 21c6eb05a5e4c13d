"""Mixtures of sources, and validation sets with names."""

import json

import numpy as np
import pytest
import torch

from datamodules.mixtures import BLOCK, mixed_at, repeated, shares_of
from datamodules.text import TextDataModule
from datamodules.text_batches import OrderedBatches, TrainLoader
from tests.datamodules.conftest import documents_of

MIX = {"a": 0.7, "b": 0.2, "c": 0.1}
SIZES = (900, 5000, 300)  # samples


def stream(start, stop, seed=0):
    return np.stack(mixed_at(np.arange(start, stop), shares_of(MIX), SIZES, seed))


def test_every_source_has_its_share_and_goes_through_all_of_itself():
    assert shares_of(MIX) == (7000, 2000, 1000)
    assert shares_of({"a": 2, "b": 1}) == (6667, 3333)
    sources, samples = stream(0, 4 * BLOCK)
    for block in np.split(sources, 4):
        assert np.bincount(block).tolist() == [7000, 2000, 1000]
    assert np.bincount(sources[:1000]) == pytest.approx([700, 200, 100], abs=50)  # mixed well in between
    for source, size in enumerate(SIZES):
        own = samples[sources == source]
        assert len(own) >= size
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))  # all before one comes again


def test_the_stream_is_a_function_of_seed_and_position():
    whole = stream(0, 3 * BLOCK)
    assert np.array_equal(np.concatenate([stream(0, 7), stream(7, 2 * BLOCK + 1)], axis=1), whole[:, : 2 * BLOCK + 1])
    assert not np.array_equal(stream(0, BLOCK, seed=1), whole[:, :BLOCK])
    assert not np.array_equal(whole[:, :BLOCK], whole[:, BLOCK : 2 * BLOCK])


def test_processes_and_a_resume_see_the_same_samples():
    texts = [np.arange(400, dtype=np.uint16), np.arange(10_000, 10_200, dtype=np.uint16)]
    shares = shares_of({"a": 0.3, "b": 0.7})

    def batches(batch_size, position=0, **settings):
        loader = TrainLoader(texts, seq_len=4, batch_size=batch_size, shares=shares, **settings)
        loader.load_state_dict({"position": position})
        return [inputs for inputs, _ in loader]

    whole = torch.cat(batches(6))
    halves = [batches(3, rank=rank, world_size=2, num_workers=rank) for rank in (0, 1)]
    assert torch.equal(torch.cat([torch.cat(pair) for pair in zip(*halves, strict=True)]), whole)
    assert torch.equal(torch.cat(batches(6, position=60))[:60], whole[60:120])
    assert len(whole) == 99 + 49 + 2  # an epoch is as many samples as there are, in whole batches
    assert (whole[:, 0] >= 10_000).float().mean().item() == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a.txt": 0.5, "b.txt": 0}, r"data.source: 'b.txt' has weight 0: give a positive number"),
        ({"a.txt": -1.0}, "'a.txt' has weight -1.0: give a positive"),
        ({"a.txt": float("nan")}, "has weight nan"),
        ({"a.txt": "much"}, "has weight much"),
        ({"a.txt": 1, "b.txt": 1e-6}, "'b.txt' has weight 1e-06 of 1 together, less than one sample in 10000"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(source=weights)


def test_what_is_repeated():
    assert repeated(shares_of(MIX), SIZES, 1000) == {}
    assert repeated(shares_of(MIX), SIZES, 9000) == pytest.approx({0: 7.0, 2: 3.0})


@pytest.fixture
def sources(tmp_path):
    """Two sources of 100 documents each, x and y, and a third one, z, to validate."""
    for name in "xyz":
        rows = [json.dumps({"text": f"{name * 20} {i}"}) for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in "xyz"}


def ready(tmp_path, **settings):
    data = TextDataModule(**{"seq_len": 16, "batch_size": 4, "cache_dir": str(tmp_path / "cache")} | settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_sources_have_token_files_of_their_own(sources, tmp_path, caplog):
    caplog.set_level("INFO")
    mixed = ready(tmp_path, source={sources["x"]: 9, sources["y"]: 1})
    inputs = torch.cat([inputs for inputs, _ in mixed.train_dataloader()])
    has_x = (inputs == ord("x")).any(1).float().mean().item()
    assert has_x == pytest.approx(0.9, abs=0.06)
    assert f"repeated, being smaller than their shares of an epoch: {sources['x']} 1.8 times" in caplog.text
    single = ready(tmp_path, source=sources["x"])
    other = ready(tmp_path, source={sources["y"]: 2, sources["x"]: 3})
    assert len(list((tmp_path / "cache").iterdir())) == 2  # each source once, whatever it is mixed with
    assert np.array_equal(mixed.train.files[0].ids, single.train.ids)
    held_out = [file.ids for file in mixed.val.files]
    assert documents_of(mixed.val.ids, mixed.tokenizer) == [
        text for ids in held_out for text in documents_of(ids, mixed.tokenizer)
    ]
    assert mixed.val.split.documents == sum(file.split.documents for file in mixed.val.files) > 0
    assert mixed.order()["weights in data.source"] == "0.9, 0.1"
    turned = ready(tmp_path, source={sources["y"]: 1, sources["x"]: 9})  # a mapping has no order
    assert turned.order() == mixed.order()
    assert other.order() == mixed.order() | {"weights in data.source": "0.6, 0.4"}
    assert "weights in data.source" not in single.order()


def test_a_mixture_with_validation_text_of_its_own(sources, tmp_path):
    data = ready(tmp_path, source={sources["x"]: 1, sources["y"]: 1}, val_source=sources["z"])
    assert [file.split.documents for file in data.train.files] == [100, 100]  # nothing is held out
    assert data.val.split.documents == data.test.split.documents == 100
    with pytest.raises(ValueError, match="data.tokenizer=bpe with a mixture"):
        TextDataModule(source={sources["x"]: 1}, tokenizer="bpe")


def test_named_validation_sets_have_a_loader_each(sources, tmp_path):
    settings = {"tokenizer": "bpe", "bpe_vocab_size": 270}
    data = ready(tmp_path, source=sources["x"], val_sources={"y": sources["y"], "z_2": sources["z"]}, **settings)
    tokenizer = data.tokenizer
    loaders = data.val_dataloader()
    assert [len(loader.dataset) * 4 >= 1 for loader in loaders] == [True] * 3
    for loader, letter in zip(loaders, "xyz", strict=True):
        targets = torch.cat([targets[targets != -100] for _, targets in loader])
        assert set(tokenizer.decode(targets.tolist())) <= set(f"{letter} 0123456789")
    assert data.named["z_2"].split.documents == 100
    whole = (data.folder / "train.bin").stat().st_mtime_ns
    ready(tmp_path, source=sources["x"], **settings)  # the training text is not tokenized again
    assert (data.folder / "train.bin").stat().st_mtime_ns == whole
    assert len(list((tmp_path / "cache").iterdir())) == 3
    for name in ("a/b", "raw_a", ""):
        with pytest.raises(ValueError, match=f"data.val_sources: {name!r} is to be a part of a metric's name"):
            TextDataModule(val_sources={name: "a.txt"})


def test_texts_are_evaluated_one_after_the_other():
    texts = [np.arange(10), np.arange(100, 107), np.arange(200, 202)]
    for world_size in (1, 2):
        ranks = [OrderedBatches(texts, 4, 2, rank, world_size) for rank in range(world_size)]
        targets = [target[target != -100] for rank in ranks for _, target in rank]
        assert sorted(torch.cat(targets).tolist()) == [*range(1, 10), *range(101, 107), 201]
