"""`--int8` of the commands: they run the model whose weights are rounded."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchao", reason="needs torchao: pip install 'tokenformer[int8]'")

from datamodules.tokenizer import ByteTokenizer
from lit_modules.cli import main
from lit_modules.commands import generate
from lit_modules.commands.tokenizers import save_tokenizer
from tokenformer import LMConfig, TokenFormerLM, from_pretrained, save_pretrained
from tokenformer.int8 import quantize_blocks

SIZES = {"depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 32}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(vocab_size=257, max_seq_len=64, init="scaled", **SIZES))
    with torch.no_grad():
        model.embedding.weight.mul_(10)  # so that its predictions differ
    save_pretrained(model, folder)
    save_tokenizer(ByteTokenizer(), folder, 64)
    return folder


@pytest.fixture(scope="module")
def rounded(exported):
    model = from_pretrained(exported)
    quantize_blocks(model)
    return model


def test_generate(exported, rounded, capsys, monkeypatch):
    models, write = [], generate.write
    monkeypatch.setattr(generate, "write", lambda model, *args, **kw: models.append(model) or write(model, *args, **kw))
    main(["generate", str(exported), "--prompt", "naïve", "--int8"])
    assert len(capsys.readouterr().out) > len("naïve\n")
    ids = torch.tensor([list(b"naive")])
    assert torch.equal(models[0](ids), rounded(ids))
    assert not torch.equal(models[0](ids), from_pretrained(exported)(ids))


def test_evaluate(exported, rounded, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness: pip install 'tokenformer[eval]'")
    from lit_modules.commands.lm_eval_model import LMEvalModel

    text = b"A question of some length: yes"
    nats = {
        name: -_score(model, text, 4) for name, model in (("rounded", rounded), ("whole", from_pretrained(exported)))
    }
    request = SimpleNamespace(args=(text[:-4].decode(), text[-4:].decode()))
    ((score, _),) = LMEvalModel(exported, int8=True).loglikelihood([request], disable_tqdm=True)
    assert -score == pytest.approx(nats["rounded"], abs=1e-4)
    assert abs(nats["rounded"] - nats["whole"]) > 1e-3
    (tmp_path / "piqa.jsonl").write_text(
        json.dumps({"goal": "cut", "sol1": "use a knife", "sol2": "use glue", "label": 0})
    )
    options = ["--tasks", "piqa", "--local", str(tmp_path), "--int8", "--out", str(tmp_path / "scores.json")]
    main(["evaluate", str(exported), *options])
    assert json.loads((tmp_path / "scores.json").read_text())["int8"] is True


@torch.no_grad()
def _score(model, text, length):
    """The log-likelihood of the last bytes."""
    ids = torch.tensor([list(text)])
    logits = model(ids[:, :-1])[0].log_softmax(-1)
    return float(logits[-length:].gather(-1, ids[0, -length:, None]).sum())
