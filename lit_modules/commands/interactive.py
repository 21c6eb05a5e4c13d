"""A language model that goes on with what a user writes, line by line: `tokenformer generate MODEL --interactive`."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from lit_modules.commands.streaming import Text
from lit_modules.commands.tokenizers import check_tokenizer
from tokenformer import TokenFormerLM
from tokenformer.generation import Dialogue, Sampler


def interact(
    model: TokenFormerLM,
    tokenizer: Any,
    prompt: str = "",
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    seed: int = 0,
    **sampling: Any,
) -> None:
    """Read lines from standard input and go on with each; what both have written is one text.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        prompt: what the text begins with.
        max_new_tokens: at most, after each line.
        stop: texts that end what the model writes; they are left out of the text.
        seed: of the sampling.
        sampling: temperature, top_k, top_p of :func:`tokenformer.generate`.

    Raises:
        ValueError: for settings that can't work.
    """
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    check_tokenizer(tokenizer, model)
    (ids,) = tokenizer.encode_batch([prompt])
    sampler = Sampler(1, generator=torch.Generator().manual_seed(seed), **sampling)
    dialogue = Dialogue(model, [tokenizer.end_of_text, *ids], sampler)  # a document begins
    at_terminal, said = sys.stdin.isatty(), False
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives `input` a history and arrow keys)
        _note("the model continues what you write; Ctrl-C stops it, an empty line ends the session")
    while line := _ask("> " if at_terminal else ""):
        follows = dialogue.ids[-1] != tokenizer.end_of_text
        (ids,) = tokenizer.encode_batch(["\n" * follows + line])
        dialogue.ids += ids
        with suppress(KeyboardInterrupt):
            _go_on(dialogue, tokenizer, max_new_tokens, list(stop))
        print(flush=True)
        if dialogue.num_dropped and not said:
            _note("the context is full: from now on the oldest part of the text is dropped")
            said = True


def _ask(prompt: str) -> str:
    try:
        line = input(prompt)
    except EOFError:  # Ctrl-D, or the end of a pipe
        return ""
    return "" if line.strip() in ("", "exit") else line


def _go_on(dialogue: Dialogue, tokenizer: Any, max_new_tokens: int, stop: list[str]) -> None:
    """Let the model write, and print it as it does."""
    text, shown = Text(tokenizer, dialogue.ids, stop), ""
    start = len(dialogue.ids) + dialogue.num_dropped  # since the beginning of all
    for _ in range(max_new_tokens):
        new_id = dialogue.write()
        piece = text.add(new_id)
        shown += piece
        print(piece, end="", flush=True)
        if text.ended:
            break
    else:
        print(text.end(), end="")
        return
    if new_id != tokenizer.end_of_text:  # a stop, which is to be left out; it may have begun within a token
        (ids,) = tokenizer.encode_batch([shown])
        dialogue.ids[max(0, start - dialogue.num_dropped) :] = ids


def _note(text: str) -> None:
    """What is no text of the model's goes elsewhere."""
    print(f"({text})", file=sys.stderr, flush=True)
