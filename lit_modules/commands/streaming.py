"""A text whose ids come one at a time, as a reader is to see it."""

from typing import Any

NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that are no text


class Text:
    """A text whose ids come one at a time. Gives out what will stay as it is: whole characters, no half of a stop.

    Args:
        tokenizer: of the ids.
        prompt: ids that are there already.
        stop: what ends the text, and is left out.

    Attributes:
        ended: by a stop, the end-of-text token or :meth:`end`.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], stop: list[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        # Ids are decoded together with those before them, since some tokenizers put a space between the two.
        self._before, self._ids = list(prompt), list[int]()
        self._given = 0  # characters of `_ids` that are given out
        self._held = ""  # may be the beginning of a stop
        self.ended = False

    def add(self, new_id: int) -> str:
        """What another id adds."""
        if new_id == self._tokenizer.end_of_text:
            return self.end()
        self._ids.append(new_id)
        start = len(self._tokenizer.decode(self._before))
        text = self._tokenizer.decode(self._before + self._ids)[start:]
        whole = text.rstrip(NO_CHARACTER)  # the bytes at the end may be the first of a character
        piece, self._given = whole[self._given :], len(whole)
        if whole == text:
            self._before, self._ids, self._given = self._ids, [], 0
        return self._until_stop(piece)

    def end(self) -> str:
        """No more ids come: what was held back as the possible beginning of a stop."""
        self.ended = True
        return self._held

    def _until_stop(self, piece: str) -> str:
        text = self._held + piece
        if found := [text.index(stop) for stop in self._stop if stop in text]:
            self.ended = True
            return text[: min(found)]
        beginnings = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
