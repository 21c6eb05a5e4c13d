"""Batches: who gets which sample, in training and in evaluation."""

import numpy as np
import pytest
import torch

from datamodules.text import TextDataModule
from datamodules.text_batches import OrderedBatches, TrainLoader


def test_text_shorter_than_a_sequence_is_refused(corpus, data):
    data.seq_len = 10**6
    with pytest.raises(ValueError, match=r"data\.seq_len=1000000 needs at least 1000001"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"seq_len": 0}, "data.seq_len=0"),
        ({"val_fraction": 1.5}, "data.val_fraction=1.5"),
        ({"tokenizer": "nothing.json"}, "data.tokenizer='nothing.json': no such file"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**changes)


def ids_of(num_tokens):
    return np.arange(num_tokens, dtype=np.uint32)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_sample_comes_exactly_once_in_an_epoch(world_size, num_workers):
    seq_len, batch_size, num_samples = 4, 2, 24
    loaders = [
        TrainLoader(
            [ids_of(num_samples * seq_len + 1)],
            seq_len=seq_len,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        for rank in range(world_size)
    ]
    for _ in range(2):
        starts = []
        for loader in loaders:
            for inputs, targets in loader:
                assert torch.equal(inputs[:, 1:], targets[:, :-1])
                assert torch.equal(inputs + 1, targets)  # the text counts up
                starts += inputs[:, 0].tolist()
        assert sorted(starts) == [seq_len * i for i in range(num_samples)]


def test_no_sample_is_lost_at_the_end_of_an_epoch():
    """7 samples in batches of 2: the fourth batch runs over into the next epoch."""
    loader = TrainLoader([ids_of(7 * 4 + 1)], seq_len=4, batch_size=2)
    starts = [start // 4 for _ in range(7) for inputs, _ in loader for start in inputs[:, 0].tolist()]
    assert len(starts) == 7 * 4 * 2
    for epoch in range(8):
        assert sorted(starts[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_an_epoch_holds_whole_optimizer_steps():
    assert len(TrainLoader([ids_of(7 * 4 + 1)], seq_len=4, batch_size=2, accumulate=3)) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_goes_on_where_it_was(num_workers):
    def loader():
        return TrainLoader([ids_of(401)], seq_len=4, batch_size=3, num_workers=num_workers)

    whole = [inputs for inputs, _ in loader()]
    first = loader()
    for _ in zip(range(10), first, strict=False):
        state = first.state_dict()
    assert state == {"position": 30}
    second = loader()
    second.load_state_dict(state)
    rest = [inputs for inputs, _ in second]
    assert len(rest) == len(whole)  # the trainer knows how many of them belong to the epoch that was cut short
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[10:], strict=False))


def test_the_stream_goes_on_with_another_number_of_ranks():
    single = TrainLoader([ids_of(401)], seq_len=4, batch_size=4)
    batches = [inputs for _, (inputs, _) in zip(range(12), single, strict=False)]
    pair = [TrainLoader([ids_of(401)], seq_len=4, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for loader in pair:
        loader.load_state_dict({"position": 24})
    halves = [next(iter(loader))[0] for loader in pair]
    assert torch.equal(torch.cat(halves), batches[6])


def test_workers_get_the_name_of_a_mapped_file_and_not_its_contents(data):
    import pickle

    stream = data.train_dataloader().dataset
    assert len(pickle.dumps(stream)) < 1000 < data.train.ids.nbytes
    copy = pickle.loads(pickle.dumps(stream))
    assert torch.equal(next(iter(copy))[0], next(iter(stream))[0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [2, 5, 9, 50, 65])
def test_evaluation_sees_every_token_once(num_tokens, world_size):
    targets, counts = [], set()
    for rank in range(world_size):
        batches = OrderedBatches([ids_of(num_tokens)], 4, 2, rank, world_size)
        counts.add(len(list(batches)))
        for inputs, target in batches:
            assert inputs.shape == target.shape == (2, 4)
            seen = target != -100
            assert torch.equal(inputs[seen] + 1, target[seen])
            targets += target[seen].tolist()
    assert sorted(targets) == list(range(1, num_tokens))
    assert len(counts) == 1  # all ranks take the same number of batches
