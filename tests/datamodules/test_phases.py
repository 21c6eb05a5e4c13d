"""Phases of data: each stream for its steps, in any number of processes, from wherever a run was."""

from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.images import ImageDataModule
from datamodules.phases import Phase, PhasedDataModule, PhasedLoader
from datamodules.text import TextDataModule
from datamodules.text_batches import TrainLoader

TEXTS = [np.arange(start, start + 300) for start in (0, 1000, 2000)]  # ids say which text they are of


def loader(steps=(3, 1, 4), accumulate=1, batch_size=2, **place):
    parts = [TrainLoader([ids], seq_len=10, batch_size=batch_size, seed=1, **place) for ids in TEXTS]
    return PhasedLoader(parts, list(steps), accumulate)


def inputs(batches):
    return [ids for ids, _ in batches]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_phase_is_its_stream_for_its_steps():
    whole = inputs(loader(accumulate=2))
    assert len(whole) == len(loader(accumulate=2)) == 16
    assert [int(ids.min()) // 1000 for ids in whole] == [0] * 6 + [1] * 2 + [2] * 8
    for text, found in ((0, whole[:6]), (2, whole[8:])):
        alone = TrainLoader([TEXTS[text]], seq_len=10, batch_size=2, seed=1)
        assert equal(found, inputs(islice(alone, len(found))))
    # More steps than an epoch has: 29 samples, 2 a batch
    assert len(inputs(loader(steps=(40, 1, 1)))) == 42


@pytest.mark.parametrize("step", [0, 2, 3, 4, 7, 8])
def test_it_goes_on_where_it_was(step):
    """With as many samples a step in two processes, and with another number of batches a step."""
    whole, first = inputs(loader()), loader()
    for _ in islice(first, step):
        pass
    state = first.state_dict()
    assert state["step"] == step
    resumed = loader()
    resumed.load_state_dict(state)
    assert equal(inputs(resumed), whole[step:])
    ranks = [loader(batch_size=1, rank=rank, world_size=2) for rank in (0, 1)]
    for part in ranks:
        part.load_state_dict(state)
    together = [torch.cat(pair) for pair in zip(*map(inputs, ranks), strict=True)]
    assert equal(together, whole[step:])
    accumulating = loader(accumulate=2, batch_size=1)
    accumulating.load_state_dict(state)
    halves = inputs(accumulating)
    assert equal([torch.cat(pair) for pair in zip(halves[::2], halves[1::2], strict=True)], whole[step:])
    with pytest.raises(ValueError, match="was trained on data without phases"):
        resumed.load_state_dict({"position": 6})
    with pytest.raises(ValueError, match="was trained in phases: resume it with its PhasedDataModule"):
        TrainLoader([TEXTS[0]], seq_len=10, batch_size=2, seed=1).load_state_dict(state)
    resumed.load_state_dict({"position": 0})  # of `overfit_batches`: the first ones again
    assert equal(inputs(resumed), whole)


def text(**changes):
    return TextDataModule(**{"source": "words.txt", "seq_len": 8, "batch_size": 2} | changes)


def phase(name="a", steps=2, data=None):
    return Phase(name=name, steps=steps, data=data or text())


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([phase("a/b")], "data.phases: 'a/b' is to be a part of a metric's name"),
        ([phase(), phase()], "data.phases: a, a: give each a name of its own"),
        ([phase(steps=0)], "data.phases: steps 0: one at least needs steps"),
        ([phase(), phase("b", -1)], "steps 2, -1: one at least"),
        ([phase(), phase("b", data=ImageDataModule())], "ImageDataModule in b, TextDataModule in a: .* of one kind"),
        ([phase(), phase("b", data=text(seq_len=16))], "seq_len is 16 in b, 8 in a: one model sees all phases"),
        ([phase(data=text(tokenizer="bpe"))], "tokenizer bpe would train another one on the text of each phase"),
        ([phase(data=text(val_sources={"x": "x.txt"}))], "a has val_sources: .* is a phase of steps: 0"),
    ],
)
def test_phases_that_do_not_go_together_are_refused(phases, message):
    with pytest.raises(ValueError, match=message):
        PhasedDataModule(phases)


def test_what_has_begun_stays_as_it_was(tmp_path):
    """At step 3 the second of three phases has begun; it may end elsewhere, what is ahead may be anything."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} word " * 200)

    def phases(*names_and_steps):
        data = PhasedDataModule(
            [
                phase(name, steps, text(source=str(tmp_path / f"{name}.txt"), cache_dir=str(tmp_path / "tokens")))
                for name, steps in names_and_steps
            ]
        )
        steps = sum(steps for _, steps in names_and_steps)
        data.trainer = SimpleNamespace(
            training=True, fast_dev_run=False, max_steps=steps, global_step=3, predicting=False
        )
        data.prepare_data()
        data.setup("fit")
        return data

    state = phases(("a", 2), ("b", 2), ("c", 2)).state_dict()
    for others in ((("a", 2), ("b", 2)), (("a", 2), ("b", 1), ("c", 9)), (("a", 2), ("b", 5), ("c", 0))):
        phases(*others).load_state_dict(state)
    for others in ((("a", 3), ("b", 2)), (("a", 2), ("c", 2)), (("b", 2), ("a", 2)), (("a", 4),)):
        with pytest.raises(ValueError, match=r"of step 3, was trained in other phases: its phase [ab] of 2 steps"):
            phases(*others).load_state_dict(state)
    data = phases(("a", 2), ("b", 2))
    data.trainer.max_steps = 5
    with pytest.raises(ValueError, match=r"trainer\.max_steps=5, but the steps of data\.phases are 4 together"):
        data.setup("fit")


def test_classes_of_an_image_source():
    """One head over all classes; only images of some, in every split."""
    data = ImageDataModule("digits", classes=["3", "7"], image_size=8, batch_size=4, num_workers=0)
    data.setup("fit")
    assert data.num_classes == 10
    for split in ("train", "val"):
        assert set(data.images(split).labels.tolist()) == {3, 7}
    _, labels = next(iter(data.train_dataloader()))
    assert set(labels.tolist()) <= {3, 7}
    whole = ImageDataModule("digits", image_size=8, batch_size=4, num_workers=0)
    assert data.num_images("val") < whole.num_images("val")
    assert data.order() != whole.order()
    with pytest.raises(
        ValueError, match=r"data\.classes=\['3', 'x'\]: 1 \(x\) are not among the classes: 10 \(0, 1, 2"
    ):
        ImageDataModule("digits", classes=["3", "x"])
    with pytest.raises(ValueError, match=r"data\.classes=\[\]"):
        ImageDataModule("digits", classes=[])
