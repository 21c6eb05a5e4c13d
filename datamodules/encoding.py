"""Texts to token ids on all cores, in order and in bounded memory."""

import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from datamodules.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**20  # text that one thread encodes at a time
PIECE = 2**22  # characters of a longer text that are: a tokenizer takes up to 200 bytes for each
PARALLELISM = "TOKENIZERS_PARALLELISM"  # whether the tokenizers package starts threads of its own

Piece = tuple[str, bool]  # of a text, and whether it is the last


def pieces(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, bool]]:
    """(split, piece, whether its text ends there): texts as they are, but those longer than PIECE.

    These are cut where a line begins, or a word: there a tokenizer cuts them, too.
    """
    for split, text in documents:
        start = 0
        while (end := start + PIECE) < len(text):
            middle = start + PIECE // 2
            cut = text.rfind("\n", middle, end) + 1 or max(text.rfind(" ", middle, end), 0) or end
            yield split, text[start:cut], False
            start = cut
        yield split, text[start:], True


def _batches(pieces: Iterable[tuple[str, str, bool]]) -> Iterator[tuple[str, list[Piece]]]:
    """(split, pieces) with about BATCH_CHARACTERS characters."""
    waiting: dict[str, list[Piece]] = {}
    sizes: dict[str, int] = {}
    for split, text, ends in pieces:
        waiting.setdefault(split, []).append((text, ends))
        sizes[split] = sizes.get(split, 0) + len(text)
        if sizes[split] >= BATCH_CHARACTERS:
            sizes[split] = 0
            yield split, waiting.pop(split)
    yield from waiting.items()


Encoded = tuple[str, int, int, bytes]  # split, documents, bytes of text, ids


def encode_all(
    texts: Iterable[tuple[str, str, bool]], tokenizer: Tokenizer, dtype: np.dtype[Any], num_threads: int
) -> Iterator[Encoded]:
    """Encode pieces, in order; a few batches per thread are under way at a time, so that memory stays bounded.

    Threads, since new processes would run the caller's script again; a `tokenizer.json` is obeyed outside of Python.
    """
    under_way: deque[Future[Encoded]] = deque()
    with encoding_threads(num_threads) as pool:
        for batch in _batches(texts):
            if len(under_way) >= 4 * num_threads:
                yield under_way.popleft().result()
            under_way.append(pool.submit(_encode, tokenizer, dtype, *batch))
        while under_way:
            yield under_way.popleft().result()


@contextmanager
def encoding_threads(num_threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that encode; the tokenizers package starts none of its own meanwhile. Default: about one a core."""
    pool = ThreadPoolExecutor(num_threads)
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"  # one thread a core already
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


def _encode(tokenizer: Tokenizer, dtype: np.dtype[Any], split: str, pieces: list[Piece]) -> Encoded:
    ids = array(dtype.char)  # takes lists in half of numpy's time, in which no other thread can work
    for encoded, (_, ends) in zip(tokenizer.encode_batch([text for text, _ in pieces]), pieces, strict=True):
        ids.fromlist(encoded)
        if ends:
            ids.append(tokenizer.end_of_text)
    num_bytes = sum(len(text.encode()) for text, _ in pieces)
    return split, sum(ends for _, ends in pieces), num_bytes, np.asarray(ids).astype(dtype).tobytes()
