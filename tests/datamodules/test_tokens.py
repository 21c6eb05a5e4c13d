"""Token folders: what is held out, what is reused, what is refused."""

import json
import os

import numpy as np
import pytest

from datamodules import tokens
from datamodules.text import TextDataModule
from datamodules.tokenizer import train_bpe
from datamodules.tokens import FORMAT, TokenFile
from tests.datamodules.conftest import documents_of, module


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


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("fraction", [0.1, 0.9])  # by its hash, the one document would be in one split or in the other
def test_of_one_text_the_end_is_held_out(tmp_path, caplog, fraction, tokenizer):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text + "\n" * 500)  # nothing to learn there
    changes = {"tokenizer": tokenizer, "bpe_vocab_size": 270, "val_fraction": fraction}
    data = module((tmp_path / "input.txt",), tmp_path / "cache", **changes)
    with caplog.at_level("INFO"):
        data.prepare_data()
    data.setup("fit")
    (train,), (val,) = (documents_of(file.ids, data.tokenizer) for file in (data.train, data.val))
    assert train + val == text + "\n" * 500
    assert len(val.rstrip()) == round(fraction * len(text.rstrip()))
    assert caplog.messages == [
        f"too few documents to hold any out: the last {fraction} of each one's text is validation data"
    ]


def test_a_second_call_reuses_the_tokens(corpus, data):
    file = data.folder / "train.bin"
    before = file.stat().st_mtime_ns
    data.prepare_data()
    assert file.stat().st_mtime_ns == before
    assert [path.name for path in data.folder.parent.iterdir()] == [data.folder.name]  # no rubbish


def edit(folder, **changes):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda folder: (folder / "metadata.json").unlink(), "has no metadata.json: it is half-written"),
        (lambda folder: (folder / "metadata.json").write_text("{"), "metadata.json is corrupted: delete"),
        (lambda folder: (folder / "metadata.json").write_bytes(b"\xff"), "metadata.json is corrupted: delete"),
        (lambda folder: (folder / "metadata.json").write_text("[]"), "metadata.json is corrupted: delete"),
        (lambda folder: edit(folder, format=2), "metadata.json has format 2, not 1: delete"),
        (lambda folder: (folder / "metadata.json").write_text("[" * 10**5), "metadata.json is corrupted: delete"),
        (lambda folder: edit(folder, dtype="uint17"), "metadata.json is corrupted: delete"),
        (lambda folder: edit(folder, dtype="object"), "metadata.json is corrupted: delete"),
        (lambda folder: edit(folder, splits={"train": {"tokens": "9"}}), "metadata.json is corrupted: delete"),
        (lambda folder: edit(folder, splits={"train": {"tokens": 0}}), "train.bin has .* bytes instead of 0"),
        (lambda folder: edit(folder, splits={"train": {"token": 1}}), "metadata.json is corrupted: delete"),
        (lambda folder: edit(folder, splits={}), "has no split"),
        (lambda folder: edit(folder, recipe=None), "metadata.json is corrupted: delete"),
        (lambda folder: (folder / "train.bin").write_bytes(b"abc"), "has 3 bytes instead of .*half-written"),
        (lambda folder: (folder / "val.bin").unlink(), "has 0 bytes instead of"),
    ],
)
def test_a_half_written_folder_is_refused(corpus, data, corrupt, message):
    corrupt(data.folder)

    def use():
        data.prepare_data()
        data.setup("fit")

    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_long_text_is_encoded_in_pieces_to_the_same_tokens(tmp_path, monkeypatch, tokenizer):
    text = "".join(f"line number {i}\n" for i in range(300)) + " word" * 300 + "x" * 500
    (tmp_path / "a.txt").write_text(text)
    if tokenizer == "bpe":
        train_bpe([text], 300).save(tmp_path / "tokenizer.json")
        tokenizer = str(tmp_path / "tokenizer.json")
    found = []
    for piece in (2**22, 100):
        monkeypatch.setattr("datamodules.encoding.PIECE", piece)
        made = {"tokenizer": tokenizer, "val_source": str(tmp_path / "a.txt")}
        data = module((tmp_path / "a.txt",), tmp_path / str(piece), **made)
        data.prepare_data()
        data.setup("fit")
        (split,) = (file.split for file in data.train.files)
        assert (split.documents, split.bytes, split.tokens) == (1, len(text), len(data.train.files[0].ids))
        assert documents_of(data.train.ids, data.tokenizer) == [text]
        found.append(data.train.ids.tolist())
    cut = 0 if tokenizer == "bytes" else 100  # the word of x's, which has no place to be cut at
    assert found[0][: len(found[0]) - cut] == found[1][: len(found[0]) - cut]


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


def test_of_two_that_tokenize_at_once_both_have_the_whole_folder(corpus, tmp_path, monkeypatch):
    """The second begins and ends while the first one writes, which then finds a folder in the place of its own."""
    first, second = (module(corpus, tmp_path) for _ in range(2))
    write, seen = tokens._write, []

    def write_twice(folder, *args):
        write(folder, *args)
        if not seen:
            seen.append(first.folder.exists())
            with pytest.warns(UserWarning, match=r"unless another process is writing them, delete what it left"):
                second.prepare_data()
            seen.append((second.folder / "train.bin").stat().st_mtime_ns)

    monkeypatch.setattr(tokens, "_write", write_twice)
    first.prepare_data()
    for data in (first, second):
        data.setup("fit")
        texts = documents_of(data.train.ids, data.tokenizer) + documents_of(data.val.ids, data.tokenizer)
        assert sorted(texts) == sorted(corpus[1])
    assert seen == [False, (first.folder / "train.bin").stat().st_mtime_ns]
    assert list(tmp_path.iterdir()) == [first.folder]


def test_a_shared_cache_can_be_read_by_those_who_may_read_the_place(corpus, tmp_path):
    mask = os.umask(0o027)
    try:
        data = module(corpus, tmp_path)
        data.prepare_data()
    finally:
        os.umask(mask)
    assert data.folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in data.folder.iterdir()} == {0o640}


@pytest.mark.parametrize("target", [None, "a file", "a folder"])
def test_a_link_in_the_place_of_a_token_folder_is_left_alone(corpus, tmp_path, target):
    data, elsewhere = module(corpus, tmp_path / "cache"), tmp_path / "elsewhere"
    data.cache_dir.mkdir()
    if target:
        (elsewhere.write_text if target == "a file" else lambda _: elsewhere.mkdir())("theirs")
    data.folder.symlink_to(elsewhere)
    with pytest.raises(ValueError, match="half-written or not a token folder" if target else "remove what is there"):
        data.prepare_data()
    assert data.folder.is_symlink()
    assert list(data.cache_dir.iterdir()) == [data.folder]
    assert elsewhere.exists() == bool(target)
    assert not elsewhere.is_file() or elsewhere.read_text() == "theirs"
    assert not elsewhere.is_dir() or list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("place", ["a file", "/proc/self"])
def test_a_place_where_no_folder_can_be_made_is_named(corpus, tmp_path, place):
    (tmp_path / "a file").write_text("")
    data = module(corpus, tmp_path / place)
    with pytest.raises(ValueError, match=f"data.cache_dir='.*{place}': no folder can be made there: "):
        data.prepare_data()


def test_an_interrupted_preparation_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    data = module(corpus, tmp_path, num_processes=1)
    monkeypatch.setattr("datamodules.encoding._encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_any_number_of_cores_writes_the_same_file_without_new_processes(corpus, tmp_path, monkeypatch):
    """New processes would run a script again that calls this without `if __name__ == "__main__"`, or a notebook."""

    def start(process):
        raise RuntimeError("a new process was started")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    monkeypatch.setattr("datamodules.encoding.BATCH_CHARACTERS", 1000)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    files = []
    for cores in (1, 3):
        data = module(corpus, tmp_path / str(cores), num_processes=cores, tokenizer="bpe", bpe_vocab_size=300)
        data.prepare_data()
        data.setup("fit")
        files.append((data.folder / "train.bin").read_bytes())
        texts = documents_of(data.train.ids, data.tokenizer) + documents_of(data.val.ids, data.tokenizer)
        assert sorted(texts) == sorted(corpus[1])
    assert files[0] == files[1]
    assert "TOKENIZERS_PARALLELISM" not in os.environ  # the caller's own


def test_token_files_can_be_large_ids(tmp_path):
    ids = np.array([5, 70_000], dtype="<u4")
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    split = {"tokens": 2, "documents": 1, "bytes": 9}
    (tmp_path / "metadata.json").write_text(
        json.dumps({"format": FORMAT, "dtype": "uint32", "splits": {"train": split}})
    )
    assert TokenFile(tmp_path, "train").ids.tolist() == [5, 70_000]
