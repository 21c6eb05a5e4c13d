"""Instruction data: what a row asks and what it answers, as token ids. An example is one text.

A question becomes

    ### Instruction:
    QUESTION

    ### Response:

and its answer follows, then the end of the text. A system message goes in front, an `input` behind the question under a
heading of its own. Rows with `prompt` and `completion` are taken as they are: for templates of one's own.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from datamodules.encoding import encoding_threads
from datamodules.sources import shown
from datamodules.splits import hash_of, valid_text
from datamodules.tokenizer import Tokenizer

QUESTION = "### Instruction:\n{}\n\n### Response:\n"
INPUT = "{}\n\n### Input:\n{}"
# Columns, of which a row has one each; what has no template is taken as it is.
ASKED, INPUTS, ANSWERED, AS_IT_IS = (
    ("instruction", "prompt"),
    ("input", "context"),
    ("output", "response"),
    "completion",
)
UNDERSTOOD = (
    "instruction (input or context) and output or response; prompt and response; prompt and completion; "
    "messages, each with role (system, user, assistant) and content"
)
CHUNK = 1000  # examples that a thread encodes at a time

Part = tuple[str, bool]  # a text, and whether it is an answer: then its tokens and an end of text are targets


def parts_of(row: Any, where: str) -> list[Part]:
    """The texts that an example consists of, in order.

    Raises:
        ValueError: naming the place, for a row that is none.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: holds {shown(row)}, not an object with the fields {UNDERSTOOD}")
    if "messages" in row:
        return _conversation(row["messages"], where)
    asked, answered = (_first(row, names) for names in (ASKED, (*ANSWERED, AS_IT_IS)))
    if asked is None or answered is None:
        raise ValueError(f"{where}: has the fields {list(row)}; understood are {UNDERSTOOD}")
    question, answer = (_text(row[name], name, where) for name in (asked, answered))
    more = None if answered == AS_IT_IS else _first(row, INPUTS)
    if more is not None and row[more]:
        question = INPUT.format(question, _text(row[more], more, where))
    return [(question if answered == AS_IT_IS else QUESTION.format(question), False), (answer, True)]


def _conversation(messages: Any, where: str) -> list[Part]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: 'messages' holds {shown(messages)}, not a list of objects with role and content")
    parts = []
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), _text(message.get("content"), f"content of message {number}", where)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: message {number} has the role {shown(role)}, not system, user or assistant")
        template = {"system": "{}\n\n", "user": QUESTION, "assistant": "{}"}[role]
        parts.append((template.format(content), role == "assistant"))
    return parts


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {what!r} holds {shown(value)}, not text: mend or remove the row")
    return valid_text(value)


def hold_out(examples: list[list[Part]], fraction: float) -> tuple[list[list[Part]], list[list[Part]]]:
    """(rest, held out): a share of the examples, at least one, by the hashes of what is asked, not by their order.

    Examples that ask the same are on the same side.

    Raises:
        ValueError: when all ask the same.
    """
    hashes = [hash_of("".join(text for text, is_answer in parts if not is_answer)) for parts in examples]
    limit = sorted(hashes)[max(1, round(len(hashes) * fraction)) - 1] if hashes else 0
    sides: tuple[list[list[Part]], list[list[Part]]] = ([], [])
    for parts, value in zip(examples, hashes, strict=True):
        sides[value <= limit].append(parts)
    if examples and not sides[0]:
        raise ValueError("data.val_fraction: all examples ask the same, so none is left to train on: give val_source")
    return sides


class Examples:
    """Encoded examples, one after another: each an end of text, then questions and answers, the last one an answer.

    What does not fit into `seq_len` inputs is cut off; examples of which no answer is left, or one is empty, are left
    out. A line says how many. What comes after the last answer is of no use and gone.

    Attributes:
        ids: of all examples, (tokens,).
        is_answer: which of them are targets, (tokens,).
        starts: where each begins, and the end, (examples + 1,).
        num_answers: targets of each, (examples,).

    Raises:
        ValueError: when no example is left.
    """

    def __init__(self, examples: list[list[Part]], tokenizer: Tokenizer, seq_len: int, name: str) -> None:
        chunks = [examples[i : i + CHUNK] for i in range(0, len(examples), CHUNK)]
        with encoding_threads() as threads:
            encoded = threads.map(lambda chunk: list(_encoded(chunk, tokenizer)), chunks)
            kept = [pair for chunk in encoded for pair in chunk if len(_cut(*pair, seq_len)[0])]
        left_out, cut = len(examples) - len(kept), sum(len(ids) > seq_len + 1 for ids, _ in kept)
        if left_out or cut:
            rank_zero_info(
                f"{name}: of {len(examples):,} examples {left_out:,} have no answer, or none within "
                f"data.seq_len={seq_len}, and are left out; {cut:,} are cut to it"
            )
        if not kept:
            raise ValueError(f"{name}: has no example with an answer within data.seq_len={seq_len}")
        ids, is_answer = zip(*(_cut(*pair, seq_len) for pair in kept), strict=True)
        self.ids, self.is_answer = np.concatenate(ids), np.concatenate(is_answer)
        self.starts = np.cumsum([0, *map(len, ids)])
        self.num_answers = np.add.reduceat(self.is_answer, self.starts[:-1], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.num_answers)

    def example(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids, and which of them are targets; both (tokens,)."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.ids[part], self.is_answer[part]

    def fingerprint(self) -> str:
        """Changes when an example does."""
        digest = hashlib.blake2b(self.ids.tobytes(), digest_size=8)
        digest.update(self.is_answer.tobytes())
        return digest.hexdigest()


Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]


def _encoded(examples: list[list[Part]], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Ids of each example, up to its last answer, and which are targets; of one with an empty answer none."""
    texts: Iterable[list[int]] = iter(tokenizer.encode_batch([text for parts in examples for text, _ in parts]))
    for parts in examples:
        ids, marks = [tokenizer.end_of_text], [False]
        for (_, is_answer), part in zip(parts, texts, strict=False):
            part = [*part, tokenizer.end_of_text] if is_answer else part
            ids += part
            marks += [is_answer] * len(part)
        empty = any(is_answer and not text.strip() for text, is_answer in parts)
        yield _cut(np.array(ids, np.int32), np.array(marks), 0 if empty else len(ids))


def _cut(ids: NDArray[np.int32], is_answer: NDArray[np.bool_], seq_len: int) -> Encoded:
    """The last answer's last token, of seq_len + 1, is the end."""
    places = np.flatnonzero(is_answer[: seq_len + 1])
    end = places[-1] + 1 if len(places) else 0
    return ids[:end], is_answer[:end]
