"""The transformers wrapper: the same files, the same bits, generate, padding."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'tokenformer[hf]'")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, DynamicCache

import tokenformer.hf as hf
from datamodules.tokenizer import ByteTokenizer
from lit_modules.commands.tokenizers import write_tokenizer_files
from tokenformer import LMConfig, TokenFormerLM, TokenFormerViT, ViTConfig, from_pretrained, grow, save_pretrained
from tokenformer.growth import grow_layers, pattention_layers

SIZES = {"depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 17, "proj_tokens": 19, "ffn_tokens": 50}
LM = LMConfig(vocab_size=257, vocab_multiple=8, max_seq_len=64, init="scaled", **SIZES)
VIT = ViTConfig(image_size=16, patch_size=4, num_classes=10, init="scaled", **SIZES)
IDS = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of bytes as `tokenformer export` writes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    save_pretrained(TokenFormerLM(LM), path)
    ByteTokenizer().save(path / "tokenizer.json")
    write_tokenizer_files(path, ByteTokenizer.end_of_text, LM.max_seq_len)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def grown_lm():
    model = TokenFormerLM(LM)
    grow(model, qkv=40, proj=41, ffn=77)
    return model


def unevenly_grown_lm():
    """Segments with norms of their own, gains of tau, and numbers of tokens that no config has."""
    model = TokenFormerLM(LM)
    grow_layers(model, {"backbone.blocks.0.ffn": 77}, init="segment_norm")
    grow_layers(model, {"backbone.blocks.1.attention.query": 40})
    first = pattention_layers(model)["backbone.blocks.0.attention.key"]
    first.learn_tau()
    with torch.no_grad():
        first.tau_gain.fill_(0.01)
    return model


LANGUAGE = {
    "plain": lambda: TokenFormerLM(LM),
    "grown": grown_lm,
    "unevenly grown": unevenly_grown_lm,
    "untied, with learned tau": lambda: TokenFormerLM(LMConfig(tie_embeddings=False, scale="learned", **SIZES)),
    "baseline": lambda: TokenFormerLM(LMConfig(baseline="width", vocab_size=257, norm_affine=True, **SIZES)),
}
VISION = {
    "plain": lambda: TokenFormerViT(VIT),
    "sincos": lambda: TokenFormerViT(ViTConfig(position="sincos", pool="avg", image_size=16, patch_size=4, **SIZES)),
}
ALL = [pytest.param(make, AutoModelForCausalLM, IDS, id=name) for name, make in LANGUAGE.items()]
ALL += [pytest.param(make, AutoModelForImageClassification, IMAGES, id=f"vision, {n}") for n, make in VISION.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "auto", "given"), ALL)
def test_round_trip_is_exact(tmp_path, make, auto, given, dtype):
    given = given.to(dtype) if given.is_floating_point() else given
    save_pretrained(make().to(dtype), tmp_path / "ours")
    native = from_pretrained(tmp_path / "ours")
    wrapped = auto.from_pretrained(tmp_path / "ours")
    assert not wrapped.training
    with torch.no_grad():
        assert torch.equal(wrapped(given).logits, native(given))

    wrapped.save_pretrained(tmp_path / "theirs")
    again = from_pretrained(tmp_path / "theirs").state_dict()
    state = native.state_dict()
    assert again.keys() == state.keys()
    assert all(again[name].dtype == tensor.dtype and torch.equal(again[name], tensor) for name, tensor in state.items())
    taus = [tensor for name, tensor in state.items() if name.endswith(".tau")]
    assert all(tau.dtype == torch.float64 for tau in taus)
    ours, theirs = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours.items() <= theirs.items()


def test_other_precision_and_shards(folder, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    with torch.no_grad():
        assert torch.equal(half(IDS).logits, from_pretrained(folder).half()(IDS))
    grown = AutoModelForCausalLM.from_pretrained(folder)
    grow(grown.native, qkv=40, proj=41, ffn=77)
    grown.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any("segments.1" in name for name in names)
    assert AutoConfig.from_pretrained(tmp_path).ffn_tokens == 77
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, grown(IDS).logits)


def test_incomplete_files_are_refused(tmp_path):
    model = TokenFormerLM(LM)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 3}))
    with pytest.raises(ValueError, match=r"does not fit its config: missing tensors: backbone\.blocks\.2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ValueError, match=r"mis-shaped tensors: embedding\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_heads": 5}))
    with pytest.raises(ValueError, match="num_heads=5 does not divide dim=32"):
        AutoConfig.from_pretrained(tmp_path)


def test_built_from_a_config_it_starts_as_the_native_model():
    torch.manual_seed(1)
    wrapped = AutoModelForCausalLM.from_config(hf.TokenFormerConfig(max_seq_len=64, **SIZES))
    torch.manual_seed(1)
    native = TokenFormerLM(LMConfig(max_seq_len=64, **SIZES))
    assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), native.parameters(), strict=True))
    assert wrapped.config.num_hidden_layers == 2


def test_another_classifier(tmp_path):
    save_pretrained(TokenFormerViT(VIT), tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    new = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert new(IMAGES).logits.shape == (2, 3)
    assert new.native.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert not new.native.head.bias.any()
    assert torch.equal(new.native.class_token, from_pretrained(tmp_path).class_token)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path)
    wrapped.native.reset_classifier(3)
    wrapped.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    with torch.no_grad():
        assert torch.equal(again(IMAGES).logits, wrapped(IMAGES).logits)


def test_labels_give_the_loss(model):
    labels = IDS.clone()
    labels[0, :5] = -100
    expected = model.native.loss(IDS[:, :-1], labels[:, 1:])
    torch.testing.assert_close(model(IDS, labels=labels).loss, expected)
    with pytest.raises(ValueError, match="logits_to_keep=1: the loss needs all logits"):
        model(IDS, labels=labels, logits_to_keep=1)
    vit = hf.TokenFormerForImageClassification(
        hf.TokenFormerViTConfig(num_labels=3, image_size=16, patch_size=4, **SIZES)
    )
    out = vit(IMAGES, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(out.loss, -out.logits.log_softmax(1)[[0, 1], [0, 2]].mean())


@torch.no_grad()
def test_padding_does_not_change_what_a_row_says(model):
    lengths = [12, 7, 1]
    rows = [IDS[0, :n] for n in lengths]
    alone = [model(row[None]).logits[0] for row in rows]
    for side in ("right", "left"):
        ids, mask = torch.full((3, 12), 99), torch.zeros(3, 12, dtype=torch.long)
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            place = slice(0, n) if side == "right" else slice(12 - n, 12)
            ids[i, place], mask[i, place] = row, 1
        logits = model(ids, attention_mask=mask).logits
        for got, expected, seen in zip(logits, alone, mask.bool(), strict=True):
            torch.testing.assert_close(got[seen], expected)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 11\)"):
        model(ids, attention_mask=mask[:, 1:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_goes_on_as_the_native_model(folder, model, use_cache):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["A token", "grows", "x"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=9, do_sample=False, use_cache=use_cache)
    assert out.shape == (3, 7 + 9)
    for prompt, row in zip(prompts, out, strict=True):
        expected = greedy(model.native, list(prompt.encode()), 9)
        assert row[7:].tolist() == expected
    beams = model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=3, use_cache=use_cache)
    plain = model.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=3, use_cache=not use_cache)
    assert torch.equal(beams, plain)


def greedy(native, ids, count):
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(native(torch.tensor([ids]))[0, -1].argmax())]
    return ids[start:]


@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_text(model):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :7] = 0
    out = model(IDS, attention_mask=mask, use_cache=True)
    for _ in range(3):
        new = out.logits[:, -1:].argmax(-1)
        out = model(new, past_key_values=out.past_key_values, logits_to_keep=1)
    texts = IDS[0], IDS[1, 7:]
    for row, text in enumerate(texts):
        whole = torch.cat((text, torch.tensor(greedy(model.native, text.tolist(), 3))))
        torch.testing.assert_close(out.logits[row, -1], model.native(whole[None])[0, -1])
    out.past_key_values.reorder_cache(torch.tensor([1, 1]))  # as beam search does
    out = model(torch.tensor([[5], [5]]), past_key_values=out.past_key_values)
    expected = model.native(torch.cat((whole, torch.tensor([5])))[None])[0, -1]
    torch.testing.assert_close(out.logits[:, -1], expected.expand(2, -1))


def test_with_a_cache_only_new_tokens_are_read(model, monkeypatch):
    read = []
    native = model.native.hidden
    monkeypatch.setattr(model.native, "hidden", lambda ids, cache=None: read.append(ids.shape[1]) or native(ids, cache))
    model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert read == [12, 1, 1, 1]
    mask = torch.ones_like(IDS)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=4)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        model(IDS, past_key_values=DynamicCache())


def test_generate_ends_with_the_text(folder, model, monkeypatch):
    assert model.generation_config.eos_token_id == 256
    embedding = model.native.embedding.weight
    first = greedy(model.native, IDS[0].tolist(), 1)[0]
    out = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=first)
    assert out.shape == (1, 13)
    assert embedding is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="vocabulary"):
        model.resize_token_embeddings(300)


def test_tokenizer_gives_the_same_ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("A token grows.", " .  , héé\n\t ", "日本 🙂"):
        encoded = tokenizer(text)
        assert encoded.input_ids == list(text.encode())
        assert tokenizer.decode(encoded.input_ids) == text
        assert set(encoded) == {"input_ids", "attention_mask"}
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (256, 64)
    with pytest.raises(ValueError, match="has no token of id 999"):
        write_tokenizer_files(folder, 999, 64)


def test_importing_the_package_leaves_transformers_alone():
    code = "import sys, tokenformer; print('transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
