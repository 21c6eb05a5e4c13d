"""All ways to give documents, and what is wrong with some of them."""

import json

import datasets
import pytest

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
    ("{tmp}/data.csv", r"ends in '\.csv'; give \.txt, \.jsonl or \.parquet"),
    ("{tmp}/null.parquet", "null.parquet: no text in 'text'"),
    ("{tmp}/broken.jsonl", r"broken\.jsonl:2: not JSON"),
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
    datasets.Dataset.from_dict({"text": ["fine", None]}).to_parquet(tmp_path / "null.parquet")
    (tmp_path / "letter.txt").write_text("a")
    data = TextDataModule(spec.replace("{tmp}", str(tmp_path)), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    cache = tmp_path / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []
