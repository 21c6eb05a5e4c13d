"""From documents to batches: what is held out, what is reused, what is refused, who gets which sample."""

import json

import datasets
import numpy as np
import pytest
import torch

from datamodules.sources import TextFormat, open_source
from datamodules.text import OrderedBatches, TextDataModule, TrainLoader
from datamodules.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from datamodules.tokens import TokenFile


def module(corpus, tmp_path, **changes):
    return TextDataModule(
        **{"source": str(corpus[0]), "seq_len": 16, "batch_size": 4, "cache_dir": str(tmp_path)} | changes
    )


@pytest.fixture
def data(corpus, tmp_path):
    data = module(corpus, tmp_path)
    data.prepare_data()
    data.setup("fit")
    return data


def documents_of(ids, tokenizer):
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1)
    assert len(pieces[-1]) == 0  # every document ends in the end-of-text token
    return [tokenizer.decode(piece.tolist()) for piece in pieces[:-1]]


def test_documents_survive_and_are_never_on_both_sides(corpus, data):
    train, val = (documents_of(file.ids, data.tokenizer) for file in (data.train, data.val))
    assert sorted(train + val) == sorted(corpus[1])
    assert not set(train) & set(val)
    assert 0 < len(val) < 20
    for file, texts in ((data.train, train), (data.val, val)):
        assert file.split.documents == len(texts)
        assert file.split.bytes == sum(len(text.encode()) for text in texts)
        assert file.split.tokens == len(file.ids) == file.split.bytes + len(texts)


def test_equal_texts_are_held_out_together(tmp_path):
    texts = [f"text number {i % 30}" for i in range(300)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = TextDataModule(str(tmp_path / "t.jsonl"), seq_len=4, val_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("fit")
    train, val = (set(documents_of(file.ids, data.tokenizer)) for file in (data.train, data.val))
    assert not train & val
    assert len(train | val) == 30


def test_a_second_call_reuses_the_tokens(corpus, data):
    file = data.folder / "train.bin"
    before = file.stat().st_mtime_ns
    data.prepare_data()
    assert file.stat().st_mtime_ns == before
    assert [path.name for path in data.folder.parent.iterdir()] == [data.folder.name]  # no rubbish


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "metadata.json").unlink(), "has no metadata.json: it is half-written"),
        (lambda folder: (folder / "metadata.json").write_text("{"), "metadata.json is damaged"),
        (lambda folder: (folder / "train.bin").write_bytes(b"abc"), "has 3 bytes instead of .*half-written"),
        (lambda folder: (folder / "val.bin").unlink(), "has 0 bytes instead of"),
    ],
)
def test_a_half_written_folder_is_refused(corpus, data, damage, message):
    damage(data.folder)

    def use():
        data.prepare_data()
        data.setup("fit")

    with pytest.raises(ValueError, match=message):
        use()


def test_tokens_of_other_data_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(100)))
    data = TextDataModule(str(path), seq_len=4, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    path.write_text(path.read_text() + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(ValueError, match="made from other data .*sources.*delete it to tokenize again"):
        data.prepare_data()


def test_tokens_are_of_use_without_their_source(corpus, tmp_path):
    (tmp_path / "c.jsonl").write_text(corpus[0].read_text())
    data = TextDataModule(str(tmp_path / "c.jsonl"), seq_len=4, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    (tmp_path / "c.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"no such file.*the tokens in .* are used as they are"):
        data.prepare_data()
    data.setup("fit")
    assert len(data.train.ids) > 0


def test_what_a_killed_preparation_left_is_named_and_harmless(corpus, tmp_path):
    data = module(corpus, tmp_path)
    leftover = data.folder.with_name(f"{data.folder.name}.partial-old")
    leftover.mkdir()
    with pytest.warns(UserWarning, match=r"delete what it left.*partial-old"):
        data.prepare_data()
    data.setup("fit")


def test_an_interrupted_preparation_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    data = module(corpus, tmp_path, num_processes=1)
    monkeypatch.setattr("datamodules.tokens._encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_several_processes_write_the_same_file(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.tokens.BATCH_CHARACTERS", 1000)
    files = []
    for processes in (1, 2):
        data = module(corpus, tmp_path / str(processes), num_processes=processes)
        data.prepare_data()
        files.append((data.folder / "train.bin").read_bytes())
    assert files[0] == files[1]


# Sources


def texts_of(spec, **form):
    return list(open_source(spec, TextFormat(**form)).documents())


def test_all_file_formats_hold_the_same_documents(corpus, tmp_path):
    path, texts = corpus
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "part.parquet")
    (tmp_path / "all.txt").write_text("\n\n".join(texts))
    for i, text in enumerate(texts):
        (tmp_path / f"one-{i:04}.txt").write_text(text)
    assert texts_of(str(path)) == texts
    assert texts_of(str(tmp_path / "*.parquet")) == texts
    assert texts_of([str(tmp_path / "all.txt")], document_separator="\n\n") == texts
    assert texts_of(str(tmp_path / "one-*.txt")) == texts


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets(corpus, tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    texts = corpus[1]
    rows = datasets.Dataset.from_dict({"content": texts})
    dataset = datasets.DatasetDict({"train": rows, "validation": rows.select(range(5)), "test": rows.select([7])})
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub").mkdir()
    for split, part in dataset.items():
        part.to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    for folder in ("saved", "hub"):
        data = TextDataModule(
            f"hf:{tmp_path / folder}",
            text_field="content",
            seq_len=8,
            streaming=streaming,
            cache_dir=str(tmp_path / f"cache-{folder}"),
        )
        data.prepare_data()
        data.setup("fit")
        assert documents_of(data.train.ids, data.tokenizer) == texts
        assert documents_of(data.val.ids, data.tokenizer) == texts[:5]  # its own validation split
        assert documents_of(data.test.ids, data.tokenizer) == [texts[7]]
    with pytest.raises(ValueError, match="has no split 'dev', but train"):
        open_source(f"hf:{tmp_path / 'saved'}@dev", TextFormat())
    with pytest.raises(ValueError, match="can't be read"):
        open_source("hf:/no/such/folder", TextFormat())


def test_blank_lines_and_half_characters_do_no_harm(tmp_path):
    lines = [json.dumps({"text": f"text {i}"}) for i in range(60)] + ["", '{"text": "half a pair: \\ud800"}', ""]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    for tokenizer in ("bytes", "bpe"):
        data = TextDataModule(
            str(tmp_path / "t.jsonl"), seq_len=4, tokenizer=tokenizer, bpe_vocab_size=270, cache_dir=str(tmp_path / "c")
        )
        data.prepare_data()
        data.setup("fit")
        texts = documents_of(data.train.ids, data.tokenizer) + documents_of(data.val.ids, data.tokenizer)
        assert len(texts) == 61
        assert "half a pair: ?" in texts


def test_the_standard_library_is_there_without_its_tests():
    source = open_source("stdlib", TextFormat())
    names = {path.name for path in source.files}
    assert {"ast.py", "argparse.py"} <= names
    assert not {"test_ast.py", "__pycache__"} & names
    assert sum(path.stat().st_size for path in source.files) > 5e6


BAD_SOURCES = [
    ("no/such/*.txt", "no such file"),
    ("{tmp}/data.csv", r"ends in '\.csv'; give \.txt, \.jsonl or \.parquet"),
    ("{tmp}/null.parquet", "null.parquet: no text in 'text'"),
    ("{tmp}/all-alike.jsonl", "the val split is empty|the train split is empty|leaves none"),
    ("{tmp}/broken.jsonl", r"broken\.jsonl:2: not JSON"),
    ("{tmp}/other.jsonl", r"other\.jsonl:1: no text in 'text'; set data\.text_field to one of \['body'\]"),
    ("{tmp}/empty.txt", "the train split is empty|leaves none"),
    ("{tmp}/one.txt", r"val_fraction=0\.05 of 1 documents leaves none.*val_source.*document_separator"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_SOURCES, ids=[spec for spec, _ in BAD_SOURCES])
def test_bad_sources_are_refused(tmp_path, spec, message):
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": ')
    (tmp_path / "other.jsonl").write_text('{"body": "text"}\n')
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "all-alike.jsonl").write_text('{"text": "the same"}\n' * 50)
    datasets.Dataset.from_dict({"text": ["fine", None]}).to_parquet(tmp_path / "null.parquet")
    (tmp_path / "one.txt").write_text("only one document here")
    data = TextDataModule(spec.replace("{tmp}", str(tmp_path)), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    cache = tmp_path / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []


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


# Tokenizers


def test_bytes_are_utf8_and_an_end_of_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode_batch(["é"]) == [[0xC3, 0xA9]]
    assert tokenizer.decode([0xC3, 0xA9, tokenizer.end_of_text]) == "é"
    assert tokenizer.vocab_size == 257


def test_bpe_is_trained_on_the_training_documents_and_used_again(corpus, tmp_path):
    data = module(corpus, tmp_path, tokenizer="bpe", bpe_vocab_size=300)
    data.prepare_data()
    data.prepare_data()
    data.setup("fit")
    assert data.vocab_size == data.tokenizer.vocab_size == 300
    texts = documents_of(data.train.ids, data.tokenizer) + documents_of(data.val.ids, data.tokenizer)
    assert sorted(texts) == sorted(corpus[1])
    assert len(data.train.ids) < 0.7 * data.train.split.bytes
    assert data.train.ids.dtype == np.uint16


def test_special_tokens_in_a_text_are_ordinary_text():
    tokenizer = train_bpe(["some text"], 270)
    text = "a <|endoftext|> b"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="bpe_vocab_size=100"):
        train_bpe(["x"], 100)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json.*not a tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "vocab_size", "end", "wikitext_tokens"), [("gpt-neox-20b", 50277, 0, 22164), ("gpt2", 50257, 50256, 21779)]
)
def test_published_tokenizers_on_real_text(shared_data, tmp_path, name, vocab_size, end, wikitext_tokens):
    data = TextDataModule(
        str(shared_data / "text/wikitext-2/valid.txt"),
        str(shared_data / "text/wikitext-2/valid.txt"),
        tokenizer=str(shared_data / f"tokenizer/{name}/tokenizer.json"),
        cache_dir=str(tmp_path),
    )
    data.prepare_data()
    data.setup("fit")
    assert (data.vocab_size, data.tokenizer.end_of_text) == (vocab_size, end)
    assert data.val.split.tokens == wikitext_tokens + 1


# Batches


def ids_of(num_tokens):
    return np.arange(num_tokens, dtype=np.uint32)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_sample_comes_exactly_once_in_an_epoch(world_size, num_workers):
    seq_len, batch_size, num_samples = 4, 2, 24
    loaders = [
        TrainLoader(
            ids_of(num_samples * seq_len + 1),
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
    loader = TrainLoader(ids_of(7 * 4 + 1), seq_len=4, batch_size=2)
    starts = [start // 4 for _ in range(7) for inputs, _ in loader for start in inputs[:, 0].tolist()]
    assert len(starts) == 7 * 4 * 2
    for epoch in range(8):
        assert sorted(starts[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_an_epoch_holds_whole_optimizer_steps():
    assert len(TrainLoader(ids_of(7 * 4 + 1), seq_len=4, batch_size=2, accumulate=3)) == 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_goes_on_where_it_was(num_workers):
    def loader():
        return TrainLoader(ids_of(401), seq_len=4, batch_size=3, num_workers=num_workers)

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
    single = TrainLoader(ids_of(401), seq_len=4, batch_size=4)
    batches = [inputs for _, (inputs, _) in zip(range(12), single, strict=False)]
    pair = [TrainLoader(ids_of(401), seq_len=4, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
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
        batches = OrderedBatches(ids_of(num_tokens), 4, 2, rank, world_size)
        counts.add(len(list(batches)))
        for inputs, target in batches:
            assert inputs.shape == target.shape == (2, 4)
            seen = target != -100
            assert torch.equal(inputs[seen] + 1, target[seen])
            targets += target[seen].tolist()
    assert sorted(targets) == list(range(1, num_tokens))
    assert len(counts) == 1  # all ranks take the same number of batches


def test_token_files_can_be_large_ids(tmp_path):
    from datamodules.tokens import FORMAT

    ids = np.array([5, 70_000], dtype="<u4")
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    split = {"tokens": 2, "documents": 1, "bytes": 9}
    (tmp_path / "metadata.json").write_text(
        json.dumps({"format": FORMAT, "dtype": "uint32", "splits": {"train": split}})
    )
    assert TokenFile(tmp_path, "train").ids.tolist() == [5, 70_000]
