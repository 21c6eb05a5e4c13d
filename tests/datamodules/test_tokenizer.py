"""Text to ids and back."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer

from datamodules.text import TextDataModule
from datamodules.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from tests.datamodules.conftest import documents_of, module


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


def test_truncation_padding_and_dropout_that_a_file_keeps_are_off(corpus, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    train_bpe(corpus[1], 300).save(path)
    plain = HFTokenizer.from_file(path)
    ids, fingerprint = load_tokenizer(path).encode_batch(corpus[1]), load_tokenizer(path).fingerprint
    assert max(map(len, ids)) > 20
    plain.enable_truncation(8)
    plain.enable_padding(length=200, pad_id=1)
    plain.model.dropout = 0.5
    plain.save(path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_batch(corpus[1]) == ids
    assert tokenizer.fingerprint == fingerprint  # tokens made before are of use still
    data = module(corpus, tmp_path, tokenizer=path)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train.ids) + len(data.val.ids) == sum(len(row) + 1 for row in ids)
    tokenizer.save(tmp_path / "exported.json")  # for readers that obey them
    exported = HFTokenizer.from_file(str(tmp_path / "exported.json"))
    assert (exported.truncation, exported.padding, exported.model.dropout) == (None, None, None)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json.*not a tokenizer"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


HOSTILE = {
    "ids far apart": ({"model": {"vocab": {"zz": 10**6}}}, "ids up to 1,000,000 and only 263 tokens: number them"),
    "the largest id": ({"model": {"vocab": {"zz": 2**32 - 1}}}, "ids up to 4,294,967,295 and only 263 tokens"),
    "a negative id": ({"model": {"vocab": {"zz": -1}}}, "not a tokenizer.json, .*integer `-1`"),
    "a pattern without end": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        "one of its patterns fails on a text: .*retry-limit",
    ),
    "nested": (None, "not a tokenizer.json"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_tokenizer_is_refused(tmp_path, hostile):
    """Before the ids beyond its tokens are counted one by one, in the file and in the embedding."""
    changes, message = HOSTILE[hostile]
    path = tmp_path / "tokenizer.json"
    train_bpe(["some text"], 262).save(path)
    content = json.loads(path.read_text())
    for key, value in (changes or {}).items():
        if key == "model":
            content["model"]["vocab"] |= value["vocab"]
        else:
            content[key] = value
    path.write_text(json.dumps(content) if changes else "[" * 10**6)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(path)).encode_batch(["a" * 30 + "b"])


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
