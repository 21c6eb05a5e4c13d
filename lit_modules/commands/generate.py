"""Continue texts with a language model.

CKPT is the folder of an exported or imported model, or a checkpoint of a run, whose tokenizer is found through the
config.yaml of the run (with EMA, the average writes). A prompt is the beginning of a document. A text ends with the
end-of-text token, with a --stop, which is left out, or after --max_new_tokens.

  tokenformer generate models/150m --prompt "The meaning of life is" --temperature 0.8 --top_p 0.95
  tokenformer generate runs/quickstart/20260131-120000-ab12/checkpoints/step-00001400.ckpt --prompt "def " --stop "def "
  tokenformer generate models/150m --prompt "One: " --prompt "Two: " --prompt_file letter.txt --temperature 0
  tokenformer generate models/150m --prompt "Once upon" --num_samples 3 --max_new_tokens 5000 --crop
  tokenformer generate models/150m --interactive --stop "Q:"
  tokenformer generate models/grown --prompt "Once upon" --segments first 2
  tokenformer generate models/150m --prompt "Il y a" --adapter french.safetensors

Prompts are read together and printed one after the other; what is written for one does not depend on the others. The
same seed gives the same texts.

With --interactive, text is read from the terminal (or a pipe) line by line, and the model goes on with it: a language
model continues a text, it was not taught to answer. All that you and it have written is one text, each line of yours
begins a new one, and what no longer fits into the context is dropped at its beginning. Ctrl-C ends what the model
writes; an empty line, `exit` or Ctrl-D ends the session. A --prompt is what the text begins with.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from datamodules.reading import read_text
from lit_modules.commands.interactive import interact
from lit_modules.commands.segments import add_segments, keep_asked
from lit_modules.commands.streaming import Text
from lit_modules.commands.tokenizers import check_tokenizer, tokenizer_of
from lit_modules.modules.loading import ADAPTER_OPTION, INT8_OPTION, load_model
from tokenformer import TokenFormerLM
from tokenformer.generation import stream
from tokenformer.int8 import quantize_blocks

DEFAULT_NEW_TOKENS = 256


def write(
    model: TokenFormerLM,
    tokenizer: Any,
    prompts: list[str],
    max_new_tokens: int | None = None,
    stop: list[str] | None = None,
    seed: int = 0,
    crop: bool = False,
    **sampling: Any,
) -> Iterator[tuple[int, str | None]]:
    """Go on with texts, as it is written.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        prompts: the texts.
        max_new_tokens: for each. Default: 256, or what the context has room for.
        stop: texts that end a text.
        seed: of the sampling.
        crop: go on past the context, as :func:`tokenformer.generation.stream` does.
        sampling: temperature, top_k, top_p of :func:`tokenformer.generate`.

    Yields:
        The number of a prompt and what comes next in its text; None when it has ended.

    Raises:
        ValueError: for settings that can't work, and what is longer than the model's context.
    """
    check_tokenizer(tokenizer, model)
    ids = [[tokenizer.end_of_text, *prompt] for prompt in tokenizer.encode_batch(prompts)]  # a document begins
    if max_new_tokens is None:
        room = model.config.max_seq_len - max(len(row) for row in ids)
        max_new_tokens = DEFAULT_NEW_TOKENS if crop else max(1, min(DEFAULT_NEW_TOKENS, room))
    texts = [Text(tokenizer, row, stop or []) for row in ids]
    generator = torch.Generator().manual_seed(seed)
    settings = {"stop": lambda row, _: texts[row].ended, "generator": generator, "crop": crop, **sampling}
    for step in stream(model, ids, max_new_tokens, **settings):
        for row, new_id in step.items():
            yield row, texts[row].add(new_id)
            if texts[row].ended:
                yield row, None
    for row, text in enumerate(texts):
        if not text.ended:
            yield row, text.end()
            yield row, None


def show(prompts: list[str], pieces: Iterator[tuple[int, str | None]]) -> None:
    """Print texts one after the other: each as it is written, once those before it have ended."""
    headings = [f"--- {i} of {len(prompts)} ---\n" if len(prompts) > 1 else "" for i in range(1, len(prompts) + 1)]
    waiting = [heading + prompt for heading, prompt in zip(headings, prompts, strict=True)]
    ended: set[int] = set()
    turn = 0
    for row, piece in pieces:
        if piece is None:
            ended.add(row)
            waiting[row] += "\n"
        else:
            waiting[row] += piece
        while turn < len(prompts):
            print(waiting[turn], end="", flush=True)
            waiting[turn] = ""
            if turn not in ended:
                break
            turn += 1


def main(args: list[str]) -> None:
    """The command `tokenformer generate`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer generate", description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, metavar="CKPT", help="the folder of an exported model, or a checkpoint")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt_file", action="append", default=[], type=Path, metavar="FILE", help="a prompt, whole")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help=f"of each text (default: {DEFAULT_NEW_TOKENS}, or what the context has room for)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    parser.add_argument("--top_k", type=int, metavar="K", help="sample among the K likeliest tokens")
    parser.add_argument("--top_p", type=float, metavar="P", help="... among those that together have probability P")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; several times too")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    parser.add_argument(
        "--crop", action="store_true", help="go on past the context: each new token sees the last that fit, slowly"
    )
    parser.add_argument("--interactive", action="store_true", help="go on with lines of the terminal, as one text")
    parser.add_argument("--tokenizer", help="bytes, a tokenizer.json or hub:NAME (default: the model's)")
    add_segments(parser)
    parser.add_argument("--adapter", **ADAPTER_OPTION)
    parser.add_argument("--int8", **INT8_OPTION)
    given = vars(parser.parse_args(args))
    source, tokenizer, segments, int8 = (given.pop(name) for name in ("source", "tokenizer", "segments", "int8"))
    num_samples = given.pop("num_samples")
    if num_samples < 1:
        raise ValueError(f"--num_samples {num_samples}: must be at least 1")
    prompts = given.pop("prompt") + [_read(path) for path in given.pop("prompt_file")]
    interactive = given.pop("interactive")
    if interactive:
        if len(prompts) > 1 or num_samples > 1 or given.pop("crop"):
            raise ValueError(
                "--interactive writes one text, and goes on past the context: give at most one --prompt, and neither "
                "--num_samples nor --crop"
            )
        if given["max_new_tokens"] is None:
            given["max_new_tokens"] = DEFAULT_NEW_TOKENS
    prompts = [prompt for prompt in prompts for _ in range(num_samples)]
    if not prompts and not interactive:
        raise ValueError('no prompt: give --prompt TEXT or --prompt_file FILE; --prompt "" begins a document')
    if "" in given["stop"]:
        raise ValueError('--stop "": give a text')
    adapters = given.pop("adapter")
    model = load_model(source, adapters=adapters)
    if not isinstance(model, TokenFormerLM):
        raise ValueError(f"{source} is an image model and writes no text: `tokenformer predict` names images")
    keep_asked(model, source, segments, adapters)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if int8:
        quantize_blocks(model)
    known = tokenizer_of(source, tokenizer)
    if interactive:
        interact(model, known, *prompts, **given)
    else:
        show(prompts, write(model, known, prompts, **given))


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"--prompt_file {path}: no such file")
    return read_text(path, remedy="save it as UTF-8")
