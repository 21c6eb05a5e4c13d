"""All ways to give documents, and what is wrong with some of them."""

import gzip
import json

import datasets
import pyarrow
import pytest

from datamodules.image_sources import open_source as open_images
from datamodules.sources import TextFormat, open_source
from datamodules.text import TextDataModule
from tests.datamodules.conftest import documents_of


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
    ("{tmp}/data.csv", r"ends in '\.csv'; give \.txt, \.jsonl \(\.gz and \.zst of both\) or \.parquet"),
    ("{tmp}/null.parquet", "null.parquet, row 2: 'text' holds null, not text: .* to another of ..title"),
    ("{tmp}/other.parquet", "other.parquet: no text in 'text'; set data.text_field to one of ..body"),
    ("{tmp}/broken.parquet", "broken.parquet: no parquet file, or corrupted"),
    ("hf:{tmp}/saved", "saved, row 2: 'text' holds null, not text: mend"),
    ("{tmp}/null.jsonl", r"null\.jsonl:1: 'text' holds null, not text: mend or remove the row$"),
    ("{tmp}/number.jsonl", r"number\.jsonl:2: 'text' holds 3\.5, not text: mend .* another of \['id'\]$"),
    ("{tmp}/list.jsonl", r"list\.jsonl:1: holds \['a'\], not an object with the text in 'text'"),
    ("{tmp}/latin.jsonl", r"latin\.jsonl:3, b'.*caf\\xe9.*': is no UTF-8 text: set data\.encoding .*cp1252, latin-1"),
    ("{tmp}/latin.txt", r"latin\.txt:2, b'caf\\xe9 au lait\\n': is no UTF-8 text: set data\.encoding"),
    ("{tmp}/utf-16.txt", "utf-16.txt: is UTF-16 text, not UTF-8: set data.encoding to the file's .utf-16, cp1252"),
    ("{tmp}/utf-16-be.txt", "utf-16-be.txt: is UTF-16-BE text, not UTF-8: set data.encoding"),
    ("{tmp}/utf-32.jsonl", "utf-32.jsonl: is UTF-32 text, not UTF-8: set data.encoding"),
    ("{tmp}/cut.txt.gz", "cut.txt.gz: can't be read, or is corrupted: Truncated"),
    ("{tmp}/cut.jsonl.zst", "cut.jsonl.zst: can't be read, or is corrupted: Truncated"),
    ("{tmp}/plain.txt.gz", "plain.txt.gz: can't be read, or is corrupted"),
    ("{tmp}/plain.tar.gz", r"ends in '\.gz'; give"),
    ("{tmp}/saved", "saved: is a Hugging Face dataset: give it as hf:"),
    ("{tmp}/empty", "empty: this folder has no .txt, .*files"),
    ("{tmp}/link.*", "link.txt: is a link to a file that is not there"),
    ("{tmp}/links", "link.txt: is a link to a file that is not there"),
    (
        "{tmp}/broken.jsonl",
        r"broken\.jsonl:2: not JSON \(Expecting value at column 10\): .*; each line .* is a JSON object: mend",
    ),
    ("{tmp}/other.jsonl", r"other\.jsonl:1: no text in 'text'; set data\.text_field to one of \['body'\]"),
    ("{tmp}/empty.txt", "the train split is empty$"),
    ("{tmp}/letter.txt", r"the train split is empty: its source has no document with text \(1 in the other splits\)"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_SOURCES, ids=[spec for spec, _ in BAD_SOURCES])
def test_bad_sources_are_refused(tmp_path, spec, message):
    (tmp_path / "data.csv").write_text("a,b")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": ')
    (tmp_path / "other.jsonl").write_text('{"body": "text"}\n')
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "null.jsonl").write_text('{"text": null}\n')
    (tmp_path / "number.jsonl").write_text('{"text": "fine", "id": 1}\n{"text": 3.5, "id": 2}\n')
    (tmp_path / "list.jsonl").write_text('["a"]\n')
    (tmp_path / "latin.jsonl").write_bytes('{"text": "fine"}\n\n{"text": "café au lait"}\n'.encode("latin-1"))
    (tmp_path / "latin.txt").write_bytes(("a line\ncafé au lait\n" + "and\n" * 5000).encode("latin-1"))
    for encoding, ending in (("utf-16", "txt"), ("utf-16-be", "txt"), ("utf-32", "jsonl")):
        (tmp_path / f"{encoding}.{ending}").write_text("a text", encoding=encoding)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a text that is cut")[:-9])
    (tmp_path / "cut.jsonl.zst").write_bytes(pyarrow.compress(b'{"text": "cut"}', "zstd", asbytes=True)[:-5])
    for name in ("plain.txt.gz", "plain.tar.gz", "broken.parquet"):
        (tmp_path / name).write_text("neither compressed nor parquet")
    rows = datasets.Dataset.from_dict({"text": ["fine", None], "title": ["a", "b"]})
    rows.to_parquet(tmp_path / "null.parquet")
    rows.rename_column("text", "body").to_parquet(tmp_path / "other.parquet")
    rows.save_to_disk(str(tmp_path / "saved"))
    for folder in ("empty", "links"):
        (tmp_path / folder).mkdir()
    for link in ("link.txt", "links/link.txt"):
        (tmp_path / link).symlink_to(tmp_path / "nothing.txt")
    (tmp_path / "letter.txt").write_text("a")
    data = TextDataModule(spec.replace("{tmp}", str(tmp_path)), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    cache = tmp_path / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-be", "utf-32"])
def test_every_encoding_is_read_compressed_or_not(tmp_path, ending, encoding):
    """UTF-8 with and without a byte order mark needs no setting."""
    texts = ["café\nau lait", "a second text"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    content = ("\r\n--\r\n".join(texts) if "txt" in ending else lines).encode(encoding)
    for compress in ending.split(".")[1:]:
        half = len(content) // 2  # in two parts one after the other, as pigz and cat make them
        parts = content[:half], content[half:]
        codec = {"gz": gzip.compress, "zst": lambda part: pyarrow.compress(part, "zstd", asbytes=True)}[compress]
        content = b"".join(map(codec, parts))
    (tmp_path / f"a.{ending}").write_bytes(content)
    form = {} if encoding.startswith("utf-8") else {"encoding": encoding}
    assert texts_of(str(tmp_path / f"a.{ending}"), document_separator="\n--\n", **form) == texts


@pytest.mark.parametrize("content", [b"a text of even length.", b"one of an odd length", b"caf\xe9"])
def test_the_encoding_that_is_set_is_not_guessed_over(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match="a.txt: is no UTF-16 text: set data.encoding"):
        texts_of(str(tmp_path / "a.txt"), encoding="utf-16")
    for encoding in ("latin-1", "cp1252"):
        assert texts_of(str(tmp_path / "a.txt"), encoding=encoding) == [content.decode("latin-1")]


def test_a_folder_is_all_of_its_text_files(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.jsonl", ".git/d.txt", "deep/.e.txt", "notes.md", "more.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if "jsonl" in name else name)
    with pytest.warns(UserWarning, match=r"3 files are left out \((2 \.md, 1 LICENSE|1 LICENSE, 2 \.md)\)"):
        assert texts_of(f"{tmp_path}/") == ["a.txt", "b.txt", "deep/c.jsonl"]
    (tmp_path / "deep/valid.txt").write_text("not for training")
    (tmp_path / "train.txt").write_text("for training")
    with pytest.raises(ValueError, match=r"not all of its files are for training, as .*deep/valid\.txt: give data\."):
        texts_of(str(tmp_path))


def test_sources_of_all_kinds_in_a_list(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.txt").write_text("three")
    source = open_source([f"hf:{tmp_path / 'saved'}", str(tmp_path / "*.txt"), "stdlib"], TextFormat())
    texts = list(source.documents())
    assert texts[:3] == ["one", "two", "three"]
    assert texts[3:] == texts_of("stdlib")
    before = source.fingerprint()
    (tmp_path / "a.txt").write_text("another")
    assert source.fingerprint() != before


def test_a_separator_from_a_command_line_is_the_one_of_a_config(tmp_path):
    given = [TextDataModule(document_separator=separator) for separator in (r"\n\n", "\n\n", r"\t--\n", "--")]
    assert [data.form.document_separator for data in given] == ["\n\n", "\n\n", "\t--\n", "--"]
    assert given[0].folder == given[1].folder != given[3].folder


HOSTILE = {
    "nested": (b'{"text": "a"}\n' + b"[" * 10**6, "t.jsonl:2: can't be read as JSON"),
    "digits": (b'{"text": "a", "number": ' + b"9" * 10**5 + b"}", "t.jsonl:1: can't be read as JSON .*100000 digits"),
    "zeros": (b'{"text": "a"}\n' + bytes(100), "t.jsonl"),
}


@pytest.mark.parametrize("content", HOSTILE)
def test_a_hostile_line_is_named(tmp_path, content):
    (tmp_path / "t.jsonl").write_bytes(HOSTILE[content][0])
    with pytest.raises(ValueError, match=HOSTILE[content][1]):
        texts_of(str(tmp_path / "t.jsonl"))


@pytest.mark.parametrize("ending", ["txt.gz", "jsonl.zst"])
def test_what_unpacks_to_far_more_is_not_unpacked(tmp_path, ending, monkeypatch):
    monkeypatch.setattr("datamodules.reading.LEAST_INFLATED", 2**16)
    content = bytes(b"a" * 2**22)
    packed = gzip.compress(content) if ending == "txt.gz" else pyarrow.compress(content, "zstd", asbytes=True)
    (tmp_path / f"t.{ending}").write_bytes(packed)
    with pytest.raises(ValueError, match=f"t.{ending}: unpacks to more than 200 times its size"):
        texts_of(str(tmp_path / f"t.{ending}"))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("separator", [None, "\n", "\n\n", "--"])
def test_texts_are_the_same_however_little_is_read_at_a_time(tmp_path, monkeypatch, chunk, separator):
    monkeypatch.setattr("datamodules.reading.CHUNK", chunk)
    text = "one\n\n\ntwo---three\r\n\r\nfour\n\n"
    (tmp_path / "a.txt").write_text(text, newline="")
    text = text.replace("\r\n", "\n")
    expected = text.split(separator) if separator else [text]
    assert texts_of(str(tmp_path / "a.txt"), document_separator=separator) == expected


def test_a_text_or_a_line_that_never_ends_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.reading.LONGEST", 100)
    monkeypatch.setattr("datamodules.reading.CHUNK", 10)
    (tmp_path / "whole.txt").write_text("b" * 90 + "\n" + "b" * 9)
    (tmp_path / "a.txt").write_text("--" + "b" * 10_000)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "b" * 87 + '"}\n' + "b" * 10_000)
    assert [len(text) for text in texts_of(f"{tmp_path}/whole.txt")] == [100]
    for name, message in (
        ("a.txt", r"a\.txt: has a text of more"),
        ("a.jsonl", r"a\.jsonl:2: a line of more"),
    ):
        with pytest.raises(ValueError, match=message):
            texts_of(str(tmp_path / name), document_separator="--")


@pytest.mark.parametrize("start", ["", "a line\n" * 5, "é" * 7 + "\n"])
def test_what_is_no_utf_8_is_shown_wherever_it_is(tmp_path, monkeypatch, start):
    monkeypatch.setattr("datamodules.reading.CHUNK", 3)
    (tmp_path / "a.txt").write_bytes(f"{start}good ".encode() + b"\xc3\n and")
    with pytest.raises(ValueError, match=rf"a\.txt:{start.count(chr(10)) + 1}, b'.*\\xc3'?"):
        texts_of(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["", ":config", "@train", "script", "script/script.py", "../nothing", "-rf", "a b\nc"])
def test_no_name_of_a_data_set_runs_anything(tmp_path, monkeypatch, name):
    """Scripts are no longer run by any version of datasets that is allowed; the others are no data sets."""
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="names no dataset: give" if name[:1] in ":@" else "can't be read: "):
        open_source(f"hf:{name}", TextFormat())
    with pytest.raises(ValueError, match=r"data\.source='hf:"):
        open_images(f"hf:{name}")
    assert not (tmp_path / "was here").exists()
