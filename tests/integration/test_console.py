"""What a user sees of a mistake: the message that names the file, the place and the remedy, not one from inside."""

import sys

import pytest

from lit_modules.cli import console, main
from lit_modules.commands.tokenizers import tokenizer_of
from tests.integration.tiny import write_config


@pytest.fixture
def said(monkeypatch):
    """What the console prints at the end of a command."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["tokenformer", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            console()
        message, *rest = str(ended.value).splitlines()
        assert rest == ["(TOKENFORMER_DEBUG=1 shows where)"]
        return message

    return run


def test_the_message_with_the_place_and_the_remedy_is_printed(corpus, tmp_path, said):
    config = write_config(tmp_path, corpus)
    bad = tmp_path / "bad.jsonl"
    for content, message in (
        (
            b'{"text": "fine"}\n{"text": ',
            f"error: {bad}:2: not JSON (Expecting value at column 10): '{{\"text\":'; each",
        ),
        (
            b'{"text": "caf\xe9"}',
            f'error: {bad}:1, b\'{{"text": "caf\\xe9"}}\': is no UTF-8 text: set data.encoding to',
        ),
        (b'{"text": null}', f"error: {bad}:1: 'text' holds null, not text: mend or remove the row"),
    ):
        bad.write_bytes(content)
        assert said("prepare", "--config", config, f"--data.source={bad}").startswith(message)

    prepare = ["prepare", "--config", str(config), f"--data.cache_dir={tmp_path / 'cache'}"]
    main(prepare)
    (metadata,) = tmp_path.rglob("metadata.json")
    metadata.write_text(metadata.read_text()[:-20])
    assert said(*prepare) == (
        f"error: {metadata} is corrupted: delete {metadata.parent} and run `tokenformer prepare` again"
    )

    (tmp_path / "letter.txt").write_bytes(b"d\xe9j\xe0 vu")
    assert said("generate", tmp_path, "--prompt_file", tmp_path / "letter.txt") == (
        f"error: {tmp_path / 'letter.txt'}:1, b'd\\xe9j\\xe0 vu': is no UTF-8 text: save it as UTF-8"
    )


def test_the_stage_that_can_not_be_done_is_named(corpus, tmp_path, said):
    stages = [{"at_step": 2, "qkv": 64}, {"at_step": 4, "qkv": 32}]
    callbacks = [{"class_path": "GrowParameterTokens", "init_args": {"stages": stages}}]
    config = write_config(tmp_path, corpus, trainer={"callbacks": callbacks})
    message = said("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert message.startswith("error: stage 2 {at_step: 4, qkv: 32}: ")


def test_what_a_class_says_of_its_arguments_comes_without_the_parser_s_frame(corpus, tmp_path, said):
    config = write_config(tmp_path, corpus)
    assert said("fit", "--config", config, "--data.batch_size=0") == "error: data.batch_size=0: must be at least 1"


def test_a_corrupted_config_of_a_run_is_named(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for corrupted in (b"model: [", b"\xff", b"", b"text"):
        (tmp_path / "config.yaml").write_bytes(corrupted)
        with pytest.raises(ValueError, match=r"config\.yaml: corrupted, it is no YAML of a run: restore it"):
            tokenizer_of(tmp_path / "checkpoints/step-00000001.ckpt")
