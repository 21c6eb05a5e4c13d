"""`tokenformer generate --interactive`: lines in, what the model makes of them out, all of it one text."""

import io
import sys

import pytest
import torch

from datamodules.tokenizer import ByteTokenizer
from lit_modules.cli import main
from lit_modules.commands import interactive
from lit_modules.commands.tokenizers import save_tokenizer
from tokenformer import LMConfig, TokenFormerLM, save_pretrained
from tokenformer.generation import Dialogue, Sampler

END, CONTEXT = 256, 48
INTERRUPT = -1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a model of bytes."""
    folder = tmp_path_factory.mktemp("exported") / "small"
    torch.manual_seed(0)
    sizes = {"depth": 1, "dim": 16, "num_heads": 2, "qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 8}
    save_pretrained(TokenFormerLM(LMConfig(vocab_size=257, max_seq_len=CONTEXT, **sizes)), folder)
    save_tokenizer(ByteTokenizer(), folder, CONTEXT)
    return folder


@pytest.fixture
def session(exported, monkeypatch, capsys):
    """Runs a session with typed lines and what the model is to write; returns (stdout, stderr, its dialogue)."""

    def run(lines, written, *options, terminal=False):
        ids = iter(written)
        dialogues = []

        def choose(self, logits, rows):
            if (new_id := next(ids)) == INTERRUPT:
                raise KeyboardInterrupt
            return [new_id]

        class Kept(Dialogue):
            def __init__(self, *args):
                super().__init__(*args)
                dialogues.append(self)

        monkeypatch.setattr(Sampler, "choose", choose)
        monkeypatch.setattr(interactive, "Dialogue", Kept)
        stdin = io.StringIO(lines)
        stdin.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", stdin)
        main(["generate", str(exported), "--interactive", *options])
        assert next(ids, None) is None  # all was asked for
        return *capsys.readouterr(), dialogues[0]

    return run


def test_both_write_one_text(session):
    out, err, dialogue = session("a b\nf\n", [*b" c d", *b" g", END], "--max_new_tokens", "4")
    assert out == " c d\n g\n"
    assert err == ""
    assert dialogue.ids == [END, *b"a b c d\nf g", END]


def test_a_document_begins_after_the_end_of_one(session):
    _, _, dialogue = session("a\nb\n", [END, END], "--prompt", "0")
    assert dialogue.ids == [END, *b"0\na", END, *b"b", END]


@pytest.mark.parametrize("end", ["", "\n", "exit\n", "  \n"])
def test_a_session_ends(session, end):
    out, _, _ = session(f"a\n{end}" + "more\n" * bool(end), [*b"b", END])
    assert out == "b\n"


def test_a_stop_is_left_out_of_the_text(session):
    out, _, dialogue = session("Q: a\nQ: c\n", [*b" b\nQ:", *b"d", END], "--stop", "\nQ:")
    assert out == " b\nd\n"
    assert dialogue.ids == [END, *b"Q: a b\nQ: cd", END]


def test_ctrl_c_ends_what_the_model_writes_and_not_the_session(session):
    out, _, dialogue = session("a\nc\n", [*b"b", INTERRUPT, *b"d", END])
    assert out == "b\nd\n"
    assert dialogue.ids == [END, *b"ab\ncd", END]


def test_the_oldest_part_is_dropped_and_that_is_said_once(session):
    written = [*b"b" * 20, *b"d" * 20, *b"f" * 20]
    out, err, dialogue = session("a\nc\ne\n", written, "--max_new_tokens", "20")
    assert out == "b" * 20 + "\n" + "d" * 20 + "\n" + "f" * 20 + "\n"
    assert err == "(the context is full: from now on the oldest part of the text is dropped)\n"
    assert len(dialogue.ids) <= CONTEXT + 1
    assert bytes(dialogue.ids) == (b"a" + b"b" * 20 + b"\nc" + b"d" * 20 + b"\ne" + b"f" * 20)[-len(dialogue.ids) :]


def test_a_terminal_shows_where_to_write_and_what_it_is(session):
    out, err, _ = session("a\n", [*b"b", END], terminal=True)
    assert out == "> b\n> "
    assert err == "(the model continues what you write; Ctrl-C stops it, an empty line ends the session)\n"


def test_what_can_not_be_is_refused(exported):
    for options, message in (
        (["--crop"], "--interactive writes one text.*neither --num_samples nor --crop"),
        (["--num_samples", "2"], "--interactive writes one text"),
        (["--prompt", "a", "--prompt", "b"], "at most one --prompt"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
        (["--top_p", "2"], "top_p=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["generate", str(exported), "--interactive", *options])
