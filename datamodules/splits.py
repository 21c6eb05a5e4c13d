"""Which document is in which split, where some are held out for validation."""

import hashlib
from collections.abc import Iterator

from datamodules.sources import Source


def documents_of(sources: dict[str, Source], held_out: float, ends: bool = False) -> Iterator[tuple[str, str]]:
    """(split, text) of every document that has any text; with `ends`, its end is held out, not some documents."""
    for name, source in sources.items():
        for text in source.documents():
            text = valid_text(text)
            if not text.strip():
                continue
            if name == "train" and ends:
                length = len(text.rstrip())
                cut = length - max(1, round(length * held_out))
                yield from (
                    (split, part) for split, part in (("train", text[:cut]), ("val", text[cut:])) if part.strip()
                )
            else:
                yield "val" if name == "train" and hash_of(text) < held_out else name, text


def too_few(sources: dict[str, Source], held_out: float) -> bool:
    """Whether holding documents out leaves none for training, or none for validation; there is one at least."""
    found = set()
    for split, _ in documents_of({"train": sources["train"]}, held_out):
        found.add(split)
        if len(found) == 2:
            return False
    return bool(found)


def valid_text(text: str) -> str:
    """The text, a ? for half of a surrogate pair: JSON can hold it, UTF-8 and tokenizers can't."""
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")


def hash_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
