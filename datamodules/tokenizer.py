"""Text to token ids and back: bytes, any `tokenizer.json`, or a BPE trained on the corpus."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

# Vocabulary sizes of what many take from the hub, where only the size counts: `plan` needs no network for it.
VOCAB_SIZES = {"hub:EleutherAI/gpt-neox-20b": 50277, "hub:openai-community/gpt2": 50257, "hub:gpt2": 50257}


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer."""

    vocab_size: int
    end_of_text: int
    fingerprint: str

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; what is no text is replaced."""
        ...

    def save(self, path: Path) -> None:
        """Write it as a `tokenizer.json`."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: 256 ids and one more for the end of a text."""

    vocab_size = 257
    end_of_text = 256
    fingerprint = "bytes"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:  # noqa: D102
        return [list(text.encode("utf-8", errors="replace")) for text in texts]

    def decode(self, ids: list[int]) -> str:  # noqa: D102
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Write the `tokenizer.json` of a byte-level BPE without merges, which gives the same ids."""
        vocab = {_byte_name(i): i for i in range(256)}
        tokenizer = HFTokenizer(models.BPE(vocab | {END_OF_TEXT: 256}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        tokenizer.save(str(path))


def _byte_name(byte: int) -> str:
    """How a byte-level BPE writes a byte: printable ones as themselves, the n-th of the others as character 256 + n."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return chr(byte if byte in printable else 256 + sum(other not in printable for other in range(byte)))


class JSONTokenizer:
    """A Hugging Face `tokenizer.json`. A special token's name within a text is encoded as ordinary text.

    What such a file keeps of a training with it, truncation, padding and BPE's dropout, is off: all of a text becomes
    tokens, the same ones every time.

    Raises:
        ValueError: when no end-of-text token is found, and for ids far beyond the number of tokens.
    """

    def __init__(self, tokenizer: HFTokenizer, name: str) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        vocab = tokenizer.get_vocab()
        found = [token for token in END_OF_TEXT_NAMES if token in vocab]
        if not found:
            raise ValueError(f"tokenizer {name}: has none of the end-of-text tokens {', '.join(END_OF_TEXT_NAMES)}")
        self.end_of_text, self._name = vocab[found[0]], name
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > 2 * len(vocab) + 1000:  # each id costs a row of the embedding, and time to write the file
            raise ValueError(
                f"tokenizer {name}: has ids up to {self.vocab_size - 1:,} and only {len(vocab):,} tokens: number them "
                "without gaps"
            )
        self.fingerprint = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:  # noqa: D102
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # which is no Exception
                raise
            raise ValueError(f"tokenizer {self._name}: one of its patterns fails on a text: {error}") from error

    def decode(self, ids: list[int]) -> str:  # noqa: D102
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write the `tokenizer.json`."""
        self._tokenizer.save(str(path))


def load_tokenizer(name: str) -> Tokenizer:
    """`bytes`, the path of a `tokenizer.json`, or `hub:NAME` for one on the Hugging Face hub.

    Raises:
        ValueError: for anything else, or a file that is no tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    if not name.startswith("hub:") and not Path(name).is_file():
        raise ValueError(f"data.tokenizer={name!r}: no such file; give bytes, bpe, hub:NAME or a tokenizer.json")
    try:
        if name.startswith("hub:"):
            return JSONTokenizer(HFTokenizer.from_pretrained(name.removeprefix("hub:")), name)
        return JSONTokenizer(HFTokenizer.from_file(name), name)
    except ValueError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"data.tokenizer={name!r}: not a tokenizer.json, or not to be had: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> JSONTokenizer:
    """A byte-level BPE like GPT-2's, trained on texts.

    Raises:
        ValueError: for a vocabulary too small to hold the 256 bytes and the end of text.
    """
    if vocab_size < 257:
        raise ValueError(f"data.bpe_vocab_size={vocab_size}: needs at least 257, the bytes and the end of text")
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JSONTokenizer(tokenizer, "bpe")
