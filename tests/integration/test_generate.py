"""`tokenformer generate` on an exported folder and on a checkpoint; half characters and half stops are not shown."""

import io
import re
import runpy
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from datamodules.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from lit_modules.callbacks import SampleText
from lit_modules.cli import main
from lit_modules.commands.generate import Text, write
from lit_modules.commands.tokenizers import save_tokenizer
from tests.conftest import ROOT
from tests.integration.processes import free_port
from tests.integration.tiny import write_config
from tokenformer import LMConfig, TokenFormerLM, TokenFormerViT, ViTConfig, generate, save_pretrained
from tokenformer.generation import stream
from tokenformer.growth import grow_layers, pattention_layers

SIZES = {"depth": 2, "dim": 32, "num_heads": 2, "qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 32}
ACCENTS = "naïve café 東京 🙂 "


def language_model(vocab_size=257):
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(vocab_size=vocab_size, max_seq_len=64, init="scaled", **SIZES)).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, model, tokenizer) with a BPE."""
    folder = tmp_path_factory.mktemp("exported") / "small"
    tokenizer = train_bpe([ACCENTS] * 3, 280)
    model = language_model(tokenizer.vocab_size)
    save_pretrained(model, folder)
    save_tokenizer(tokenizer, folder, 64)
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, corpus):
    """A run of bytes with EMA."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, corpus, trainer={"max_steps": 4})
    main(["fit", "--config", str(config), "--run_dir", str(folder / "run"), "--trainer.callbacks=EMA"])
    return folder / "run"


def printed(capsys, *args):
    capsys.readouterr()
    main(["generate", *map(str, args)])
    return capsys.readouterr().out


def test_the_example_of_device_and_cloud_writes_the_same_text(exported, capsys, monkeypatch):
    """In a process that is the only one; tests/tokenformer/test_shared_tokens.py has two."""
    world = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in world.items():
        monkeypatch.setenv(name, str(value))
    expected = printed(capsys, exported[0], "--prompt", "naïve", "--temperature", 0)
    monkeypatch.setattr(sys, "argv", ["device_cloud.py", str(exported[0]), "--prompt", "naïve"])
    runpy.run_path(str(ROOT / "examples/device_cloud.py"), run_name="__main__")
    assert capsys.readouterr().out == expected


def test_greedy_text_of_an_exported_model(exported, capsys):
    folder, model, tokenizer = exported
    (ids,) = tokenizer.encode_batch(["naïve"])
    (row,) = generate(model, [[tokenizer.end_of_text, *ids]], 20, temperature=0, stop=[[tokenizer.end_of_text]])
    out = printed(capsys, folder, "--prompt", "naïve", "--max_new_tokens", 20, "--temperature", 0)
    assert out.startswith("naïve")
    assert len(out) > len("naïve\n")
    assert out == tokenizer.decode(row).rstrip("\N{REPLACEMENT CHARACTER}") + "\n"


def test_a_checkpoint_writes_with_its_average_and_its_runs_tokenizer(run_dir, capsys):
    path = run_dir / "checkpoints/step-00000004.ckpt"
    saved = torch.load(path, weights_only=True)
    states = saved["state_dict"], saved["current_model_state"]
    average, raw = ({k.removeprefix("model."): t for k, t in state.items()} for state in states)
    assert not torch.equal(average["embedding.weight"], raw["embedding.weight"])
    model = TokenFormerLM(LMConfig(**saved["hyper_parameters"]["config"])).eval()
    model.load_state_dict(average)
    pieces = write(model, ByteTokenizer(), ["the token"], 30, temperature=0.7)
    expected = "".join(piece for _, piece in pieces if piece)
    assert printed(capsys, path, "--prompt", "the token", "--max_new_tokens", 30) == f"the token{expected}\n"


def test_a_grown_model_writes_as_before_its_growth(exported, tmp_path, capsys):
    _, model, tokenizer = exported
    grown = deepcopy(model)
    for _ in range(2):
        grow_layers(grown, dict.fromkeys(pattention_layers(grown), 8), init="pairs")
        torch.nn.init.normal_(grown.backbone.blocks[0].ffn.segments[-1].values)
    save_pretrained(grown, tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model", 64)
    base = "--prompt", "a", "--temperature", 2
    texts = [printed(capsys, tmp_path / "model", *base, "--segments", *words) for words in ("0", ["first", 1], ["all"])]
    assert texts[0] == texts[1] == printed(capsys, exported[0], *base) != texts[2]
    with pytest.raises(ValueError, match="--segments first: give all, first K, of PHASE, or numbers such as 0 2"):
        main(["generate", str(tmp_path / "model"), "--prompt", "a", "--segments", "first"])
    with pytest.raises(ValueError, match="choose among 0 to 2"):
        main(["generate", str(tmp_path / "model"), "--prompt", "a", "--segments", "0", "3"])


def test_the_seed_and_the_sampling_settings_count(exported, capsys):
    base = exported[0], "--prompt", "a", "--temperature", 2

    texts = [printed(capsys, *base, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = printed(capsys, *base[:3], "--temperature", 0)
    assert printed(capsys, *base, "--top_k", 1) == printed(capsys, *base, "--top_p", 1e-6) == greedy != texts[0]


def test_several_prompts_come_one_after_the_other_as_they_would_alone(exported, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("two\nlines, ï", encoding="utf-8")
    settings = "--max_new_tokens", 12, "--temperature", 0
    alone = [printed(capsys, exported[0], "--prompt", text, *settings) for text in ("naïve", "", "two\nlines, ï")]
    prompts = "--prompt", "naïve", "--prompt_file", tmp_path / "p.txt", "--prompt", ""
    together = printed(capsys, exported[0], *prompts, *settings)
    assert together == "".join(f"--- {i} of 3 ---\n{text}" for i, text in enumerate(alone, 1))


def test_text_is_shown_as_it_is_written(exported, capsys):
    _, model, tokenizer = exported
    seen = []
    for row, piece in write(model, tokenizer, ["na", "naïve"], 10, temperature=1.0):
        seen.append((row, piece))
    assert [row for row, _ in seen[:4]] == [0, 1, 0, 1]
    assert seen.count((0, None)) == seen.count((1, None)) == 1


@pytest.mark.parametrize("kind", ["bytes", "bpe", "tokenizer.json of bytes"])
def test_no_half_characters(kind, tmp_path):
    """Whatever ids come one by one, what is given out is a beginning of the whole text, and in the end all of it."""
    tokenizer = train_bpe(["cafe"] * 3, 260) if kind == "bpe" else ByteTokenizer()  # splits all of ACCENTS into bytes
    if "json" in kind:
        tokenizer.save(tmp_path / "t.json")
        tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    (ids,) = tokenizer.encode_batch([ACCENTS])
    assert len(ids) > len(ACCENTS) + 5
    text, shown = Text(tokenizer, [tokenizer.end_of_text, *ids[:4]], []), ACCENTS[:3]
    assert tokenizer.decode(ids[:4]) == shown
    for new_id in ids[4:]:
        shown += text.add(new_id)
        assert ACCENTS.startswith(shown)
    assert shown + text.end() == ACCENTS
    cut = Text(tokenizer, [tokenizer.end_of_text], [])  # ends within the last character
    assert "".join(map(cut.add, ids[:-2])) + cut.end() == ACCENTS[:-2]


def test_bytes_that_are_no_text_do_not_hold_up_the_rest():
    text = Text(ByteTokenizer(), [256], [])
    assert [text.add(i) for i in (0xFF, ord("a"), 0xC3, 0xC3, 0xA9)] == ["", "\ufffda", "", "", "\ufffdé"]


def test_stops_end_a_text_and_are_left_out():
    ids = list(b"one, two; three")

    def cut(*stop):
        text, shown = Text(ByteTokenizer(), [256], list(stop)), []
        for new_id in ids:
            shown.append(text.add(new_id))
            if text.ended:
                return "".join(shown), len(shown)
        return "".join(shown) + text.end(), len(shown)

    assert cut("; t") == ("one, two", 11)
    assert cut("two", "one, ") == ("", 5)
    assert cut("; x") == ("one, two; three", 15)
    assert cut("e!") == ("one, two; three", 15)  # its last letter was held back
    text = Text(ByteTokenizer(), [256], [", x"])
    assert [text.add(i) for i in ids[:6]] == ["o", "n", "e", "", "", ", t"]  # ", " may have been the stop
    assert text.add(256) == ""
    assert text.ended


def test_a_stop_ends_one_text_and_not_the_others(exported):
    _, model, tokenizer = exported
    settings = {"temperature": 1.0, "max_new_tokens": 20}

    def texts(stop=()):
        whole = ["", ""]
        for row, piece in write(model, tokenizer, ["na", "x"], stop=list(stop), **settings):
            whole[row] += piece or ""
        return whole

    first, second = texts()
    stop = next(first[i : i + 2] for i in range(len(first) - 1) if first[i : i + 2] not in second)
    assert texts([stop]) == [first[: first.index(stop)], second]


def test_default_length_is_what_fits(exported, capsys):
    _, model, tokenizer = exported
    ids = "".join(piece or "" for _, piece in write(model, tokenizer, ["na"], temperature=0))
    longest = generate(model, [[tokenizer.end_of_text, *tokenizer.encode_batch(["na"])[0]]], 61, temperature=0)
    assert len(longest[0]) == 64
    assert ids == tokenizer.decode(longest[0])[2:].rstrip("\ufffd")


def test_past_the_context_each_token_sees_the_last_that_fit(exported):
    """As nanoGPT's generate; a shorter text beside it is what it would be alone."""
    _, model, tokenizer = exported
    prompts = [[tokenizer.end_of_text, *tokenizer.encode_batch([text])[0]] for text in ("na", "x " * 40)]
    assert len(prompts[0]) < 64 < len(prompts[1])
    expected = []
    for ids in prompts:
        written = list(ids)
        for _ in range(70):
            written.append(int(model(torch.tensor([written[-64:]]))[0, -1].argmax()))
        expected.append(written[len(ids) :])
    steps = list(stream(model, prompts, 70, temperature=0, crop=True))
    assert [[step[row] for step in steps] for row in (0, 1)] == expected


def test_crop_and_num_samples(exported, capsys):
    args = exported[0], "--prompt", "naïve", "--max_new_tokens", 80, "--temperature", 2
    with pytest.raises(ValueError, match="max_seq_len=64: .*give less of a prompt, or crop"):
        printed(capsys, *args)
    texts = re.split(r"--- \d of 3 ---\n", printed(capsys, *args, "--crop", "--num_samples", 3))[1:]
    assert len(set(texts)) == 3
    assert all(text.startswith("naïve") for text in texts)
    assert texts[0] == printed(capsys, *args, "--crop")
    written = write(exported[1], exported[2], ["na"], crop=True, temperature=0, stop=["\0"])
    assert sum(piece is not None for _, piece in written) > 64  # 256 by default, not what fits


def test_errors_say_what_to_do(exported, run_dir, tmp_path):
    folder, _, _ = exported
    vision = tmp_path / "vision"
    save_pretrained(TokenFormerViT(ViTConfig(image_size=8, patch_size=4, num_classes=3, **SIZES)), vision)
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((run_dir / "checkpoints/step-00000004.ckpt").read_bytes())
    no_tokenizer = tmp_path / "no_tokenizer"
    save_pretrained(language_model(), no_tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    prompt = ["--prompt", "x"]
    for args, message in [
        ([folder], "no prompt: give --prompt TEXT or --prompt_file FILE"),
        ([folder, "--prompt_file", tmp_path / "none.txt"], "none.txt: no such file"),
        ([folder, "--prompt_file", tmp_path / "latin.txt"], "is no UTF-8 text: save it"),
        ([folder, *prompt, "--stop", ""], '--stop "": give a text'),
        ([folder, *prompt, "--max_new_tokens", 63], "max_new_tokens=63 make 65, past the .*max_seq_len=64.*at most 62"),
        ([folder, "--prompt", "x " * 100], "max_seq_len=64: give less of a prompt"),
        ([folder, *prompt, "--top_p", 2], "top_p=2.0"),
        ([folder, *prompt, "--num_samples", 0], "--num_samples 0: must be at least 1"),
        ([folder, *prompt, "--tokenizer", "bytes"], None),
        ([no_tokenizer, *prompt], "has no tokenizer.json.*give one by --tokenizer"),
        ([no_tokenizer, *prompt, "--tokenizer", folder / "tokenizer.json"], "ids up to 276, .*vocab_size=257"),
        ([alone, *prompt], "has no tokenizer.json.*give one by --tokenizer"),
        ([alone, *prompt, "--tokenizer", "bytes"], None),
        ([vision, *prompt], "is an image model and writes no text"),
        ([tmp_path / "nowhere", *prompt], "no such file or folder"),
        ([run_dir / "metrics.csv", *prompt], "neither a checkpoint nor .*; wanted is a checkpoint"),
    ]:
        if message is None:
            main(["generate", *map(str, args)])
            continue
        with pytest.raises(ValueError, match=message):
            main(["generate", *map(str, args)])


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    assert 'tokenformer generate models/150m --prompt "' in capsys.readouterr().out
    main(["--help"])
    assert "tokenformer generate CKPT --prompt TEXT" in capsys.readouterr().out


def test_a_terminal_may_lack_characters(exported, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    main(["generate", str(exported[0]), "--prompt", "a東京", "--max_new_tokens", "1"])
    assert terminal.buffer.getvalue().startswith(b"a??")


def test_a_sample_of_a_training_goes_on_past_the_context(tmp_path):
    class Counting(ByteTokenizer):
        def decode(self, ids):
            self.decoded = ids
            return super().decode(ids)

    tokenizer, model = Counting(), language_model()
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(tokenizer=tokenizer), is_global_zero=True, default_root_dir=tmp_path
    )
    module = SimpleNamespace(model=model, eval=lambda: None)
    SampleText(prompt="def ", max_new_tokens=150, temperature=0).on_train_end(trainer, module)
    ids = tokenizer.decoded
    assert len(ids) == 5 + 150
    assert ids[:64] == generate(model, [ids[:5]], 59, temperature=0)[0]
    assert ids[64:96] == generate(model, [ids[32:64]], 32, temperature=0)[0][32:]  # the second half goes on
    assert (tmp_path / "sample.txt").read_text().startswith("def ")
