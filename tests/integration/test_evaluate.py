"""Zero-shot evaluation: the harness's scores, whichever way the model comes to it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: pip install 'tokenformer[eval]'")

from datamodules.tokenizer import ByteTokenizer, train_bpe
from lit_modules.cli import main
from lit_modules.commands.evaluate import PUBLISHED, TASKS, evaluate, table
from lit_modules.commands.lm_eval_model import LMEvalModel, local_tasks
from lit_modules.commands.tokenizers import save_tokenizer
from tests.integration.tiny import write_config
from tokenformer import LMConfig, TokenFormerLM, TokenFormerViT, ViTConfig, from_pretrained, save_pretrained

SIZES = {"depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 32}
PIQA = [
    {"goal": "boil an egg", "sol1": "put it in hot water", "sol2": "put it in the sun", "label": 0},
    {"goal": "dry a shirt", "sol1": "wet it", "sol2": "hang it up outside", "label": 1},
    {"goal": "cut", "sol1": "use a knife", "sol2": "use glue", "label": 0},
]


def write_model(folder, tokenizer, max_seq_len):
    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len, init="scaled", **SIZES))
    with torch.no_grad():
        model.embedding.weight.mul_(10)  # so that its predictions differ
    save_pretrained(model, folder)
    save_tokenizer(tokenizer, folder, max_seq_len)
    return folder


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bytes"), ByteTokenizer(), 96)


@pytest.fixture
def piqa(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "piqa_valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    return tmp_path / "rows"


def asked(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def nats(native, context, continuation):
    """Cross-entropy of the bytes of a continuation, one at a time."""
    ids, start = list(context + continuation), len(context)
    total = 0.0
    with torch.no_grad():
        for i in range(start, len(ids)):
            seen = torch.tensor([ids[max(0, i - native.config.max_seq_len) : i]])
            total -= float(native(seen)[0, -1].log_softmax(-1)[ids[i]])
    return total


def test_command_gives_the_scores_of_the_definition(byte_model, piqa, tmp_path, capsys):
    out = tmp_path / "results" / "scores.json"
    main(["evaluate", str(byte_model), "--tasks", "piqa", "--local", str(piqa), "--batch_size", "2", "--out", str(out)])
    native = from_pretrained(byte_model)
    expected = {"acc": [], "acc_norm": []}
    for row in PIQA:
        prompt = f"Question: {row['goal']}\nAnswer:".encode()
        choices = [f" {row[name]}".encode() for name in ("sol1", "sol2")]
        each = [nats(native, prompt, choice) for choice in choices]
        per_byte = [n / (len(choice) - 1) for n, choice in zip(each, choices, strict=True)]
        expected["acc"].append(each.index(min(each)) == row["label"])
        expected["acc_norm"].append(per_byte.index(min(per_byte)) == row["label"])
    report = json.loads(out.read_text())
    assert {(row["task"], row["metric"], row["rows"]) for row in report["scores"]} == {
        ("piqa", "acc", 3),
        ("piqa", "acc_norm", 3),
    }
    for row in report["scores"]:
        right = expected[row["metric"]]
        assert row["value"] == pytest.approx(sum(right) / 3)
        assert row["stderr"] == pytest.approx(math.sqrt(row["value"] * (1 - row["value"]) / 2))
    assert report["parameters"] == native.num_params()
    printed = capsys.readouterr().out
    assert f"| {100 * sum(expected['acc']) / 3:.1f}" in printed
    assert "not comparable" in printed
    assert all(name in printed for name in PUBLISHED)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_are_the_models(byte_model, batch_size, monkeypatch):
    model = LMEvalModel(byte_model, batch_size)
    native = model.model
    shapes = []
    hidden = native.hidden
    monkeypatch.setattr(native, "hidden", lambda ids, *rest: shapes.append(tuple(ids.shape)) or hidden(ids, *rest))
    likeliest = chr(int(native(torch.tensor([list(b"ab")]))[0, -1].argmax()))
    shapes.clear()
    pairs = [
        ("A question of some length:", " yes"),
        ("ab", likeliest),
        ("", "no context"),
        ("x" * 90, "y" * 20),
        ("q", "rs"),
    ]
    with pytest.warns(UserWarning, match="1 of 5 texts lose their beginning: max_seq_len=96"):
        scores = model.loglikelihood(asked(*pairs), disable_tqdm=True)
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths, reverse=True)
    assert shapes[0] == (min(batch_size, 5), 96)
    for (context, continuation), (score, greedy) in zip(pairs, scores, strict=True):
        before = (list(context.encode()) or [256])[-(97 - len(continuation)) :]
        assert score == pytest.approx(-nats(native, before, list(continuation.encode())), rel=1e-5)
        assert greedy == (continuation == likeliest)
    with pytest.raises(ValueError, match="a continuation has 100 tokens, more than max_seq_len=96"):
        model.loglikelihood(asked(("a", "b" * 100)), disable_tqdm=True)


@pytest.mark.parametrize("others", [[], [("ab", " cd")]])
def test_a_continuation_without_a_token_is_not_certain(tmp_path, others):
    """The harness's own class for transformers (0.4.13) ends in an assertion there."""
    tokenizer = train_bpe(["Answer"] * 3, 262)
    assert [len(tokenizer.encode_batch([text])[0]) for text in ("Ans", "Answer")] == [2, 1]
    model = LMEvalModel(write_model(tmp_path, tokenizer, 64))
    with pytest.raises(ValueError, match=rf"1 of {1 + len(others)} continuations .* such as 'wer' after 'Ans'"):
        model.loglikelihood(asked(("Ans", "wer"), *others), disable_tqdm=True)
    ((score, _),) = model.loglikelihood(asked(("Ans", " wer")), disable_tqdm=True)
    assert score < 0


def test_rolling_likelihood_counts_each_token_once(byte_model):
    model = LMEvalModel(byte_model)
    texts = ["short", "long enough for several windows, " * 8, ""]
    totals = model.loglikelihood_rolling(asked(*((text,) for text in texts)), disable_tqdm=True)
    assert totals[0] == pytest.approx(-nats(model.model, [256], list(texts[0].encode())), rel=1e-5)
    ids = list(texts[1].encode())  # 264: windows of 96, 96 and 72 with as much before them as fits
    windows = [([256], ids[:96]), ([ids[95]], ids[96:192]), (ids[167:192], ids[192:])]
    expected = -sum(nats(model.model, *window) for window in windows)
    assert totals[1] == pytest.approx(expected, rel=1e-5)
    assert totals[2] == 0


def test_generation_stops_where_it_is_told(byte_model):
    model = LMEvalModel(byte_model, batch_size=2)
    prompts = ["The quick", "A", "Once upon a time"]
    plain = model.generate_until(asked(*((p, {"until": [], "max_gen_toks": 6}) for p in prompts)), disable_tqdm=True)
    for prompt, text in zip(prompts, plain, strict=True):
        ids = list(prompt.encode())
        for _ in range(6):
            ids.append(int(model.model(torch.tensor([ids]))[0, -1].argmax()))
        assert text == ByteTokenizer().decode(ids[len(prompt) :])
    stop = plain[0][2:4]
    settings = {"until": [stop], "max_gen_toks": 6, "do_sample": False}
    assert model.generate_until(asked((prompts[0], settings)), disable_tqdm=True) == [plain[0].split(stop)[0]]
    with pytest.raises(ValueError, match="max_gen_toks=256: leaves no room"):
        model.generate_until(asked(("a", {"until": ["\n"]})), disable_tqdm=True)


def test_scores_are_those_of_the_harness_on_transformers(shared_data, tmp_path, monkeypatch):
    pytest.importorskip(
        "accelerate", reason="the harness's own class needs accelerate: pip install 'tokenformer[eval]'"
    )
    from lm_eval.models.huggingface import HFLM

    import tokenformer.hf  # noqa: F401 - registers

    rows = shared_data / "eval"
    texts = (line for path in sorted(rows.glob("*.jsonl")) for line in path.read_text().splitlines())
    folder = write_model(tmp_path, train_bpe(texts, 700), 512)
    models = {"ours": LMEvalModel(folder, 16), "theirs": HFLM(pretrained=str(folder), batch_size=16, device="cpu")}
    likelihoods, scores = {}, {}
    for name, model in models.items():
        scored = model._loglikelihood_tokens

        def recorded(requests, *args, name=name, scored=scored, **kwargs):
            found = scored(requests, *args, **kwargs)
            likelihoods[name] = list(zip(requests, found, strict=True))
            return found

        monkeypatch.setattr(model, "_loglikelihood_tokens", recorded)
        scores[name] = evaluate(model, TASKS, rows, limit=10)
    for (asked_ours, ours), (asked_theirs, theirs) in zip(*likelihoods.values(), strict=True):
        assert asked_ours == asked_theirs  # texts and ids
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
        assert ours[1] == theirs[1]
    assert len(likelihoods["ours"]) == 10 * (1 + 4 + 2 + 4 + 4 + 2)
    for ours, theirs in zip(scores["ours"], scores["theirs"], strict=True):
        if ours["metric"] == "perplexity":  # an exponential of likelihoods, which differ in the last bit of float32
            assert ours["value"] == pytest.approx(theirs["value"], rel=1e-6)
        else:
            assert ours == theirs
    assert {row["task"] for row in scores["ours"]} == set(TASKS)


def test_checkpoint_of_a_run(tmp_path, corpus, piqa, capsys):
    config = write_config(tmp_path, corpus, trainer={"max_steps": 2, "val_check_interval": 2})
    settings = "--data.seq_len=96", "--checkpoint.every_n_train_steps=2", "--model.optim.warmup_steps=1"
    main(["fit", "--config", str(config), "--run_dir", str(tmp_path / "run"), *settings])
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002.ckpt"
    capsys.readouterr()
    main(["evaluate", str(checkpoint), "--tasks", "piqa", "--local", str(piqa), "--out", str(tmp_path / "run.json")])
    main(["export", str(checkpoint), "--out", str(tmp_path / "exported")])
    command = ["evaluate", str(tmp_path / "exported"), "--tasks", "piqa", "--local", str(piqa)]
    main([*command, "--out", str(tmp_path / "exported.json")])
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("run.json", "exported.json"))
    assert one["scores"] == other["scores"]


def test_table_says_what_can_be_compared():
    rows = [{"task": task, "metric": "acc", "value": 0.1 * i, "rows": 200} for i, task in enumerate(TASKS, 1)]
    rows += [{"task": t, "metric": "acc_norm", "value": 0.75, "rows": 200} for t in ("hellaswag", "arc_challenge")]
    rows += [{"task": "lambada_openai", "metric": "perplexity", "value": 16.384, "rows": 200}]
    lines = table("ours", rows, whole=False).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["ours *", "16.38", "10.0", "75.0", "30.0", "40.0", "75.0", "60.0", f"{290 / 6:.1f}"]
    assert lines[-1].startswith("* on 200 rows of each task, not comparable")
    assert "*" not in table("ours", rows, whole=True)
    for published in PUBLISHED.values():
        assert sum(published[1:7]) / 6 == pytest.approx(published[7], abs=0.06)


def test_mistakes_are_named(byte_model, piqa, tmp_path, monkeypatch):
    def refused(*args):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - what it says is checked by the caller
            main(["evaluate", *map(str, args)])
        return str(error.value)

    save_pretrained(TokenFormerViT(ViTConfig(image_size=16, patch_size=4, num_classes=3, **SIZES)), tmp_path / "vit")
    assert "is an image model" in refused(tmp_path / "vit", "--local", piqa)
    assert "needs one file hellaswag*.jsonl, has none" in refused(byte_model, "--tasks", "hellaswag", "--local", piqa)
    assert "no format for mmlu" in refused(byte_model, "--tasks", "mmlu", "--local", piqa)
    assert "--local nowhere: no such folder" in refused(byte_model, "--local", "nowhere")
    assert "--limit 0: must be at least 1" in refused(byte_model, "--limit", 0)
    assert "segments=[1]: choose among 0 to 0" in refused(byte_model, "--segments", 1, "--local", piqa)
    assert "x.safetensors: no adapter" in refused(byte_model, "--adapter", "x.safetensors", "--local", piqa)
    assert "batch_size=0" in refused(byte_model, "--batch_size", 0, "--local", piqa)
    known = SimpleNamespace(all_tasks=["piqa"])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults: known)  # the real one takes seconds
    assert "no such task; `lm_eval ls tasks`" in refused(byte_model, "--tasks", "piqqa")

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("lm_eval.simple_evaluate", unreachable)
    assert "no network: without a network give --local DIR" in refused(byte_model, "--tasks", "piqa")
    assert "--device nonsense: " in refused(byte_model, "--device", "nonsense", "--local", piqa)
    released = tmp_path / "pytorch_model.bin"
    torch.save({}, released)
    assert "tokenformer import" in refused(released, "--local", piqa)


def test_local_prompts_are_the_harnesss(shared_data):
    """HellaSwag's files say what the harness makes of them."""
    (task,) = local_tasks(["hellaswag"], shared_data / "eval")
    made = [task.doc_to_text(doc) for doc in task.eval_docs]
    lines = (shared_data / "eval" / "hellaswag_val.jsonl").read_text().splitlines()
    assert made == [json.loads(line)["query"] for line in lines]
