"""The transformers wrapper: the same files, the same bits, what its users expect of a model and its tokenizer."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'tokenformer[hf]'")

from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import tokenformer.hf as hf
from lit_modules.commands.tokenizers import write_tokenizer_files
from tests.tokenformer.tiny_lm import IDS, LM, SIZES, padded
from tokenformer import LMConfig, TokenFormerLM, TokenFormerViT, ViTConfig, from_pretrained, grow, save_pretrained
from tokenformer.growth import grow_layers, pattention_layers

VIT = ViTConfig(image_size=16, patch_size=4, num_classes=10, init="scaled", **SIZES)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


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
    grow(grown.native, qkv=40, proj=41, ffn=77, init="zero_keys")
    grown.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(IDS), grown(IDS).logits)
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
    config = hf.TokenFormerViTConfig(image_size=16, patch_size=4, **SIZES)
    config.num_labels = 3
    vit = hf.TokenFormerForImageClassification(config)
    out = vit(IMAGES, labels=torch.tensor([0, 2]))
    torch.testing.assert_close(out.loss, -out.logits.log_softmax(1)[[0, 1], [0, 2]].mean())
    vit.config.problem_type = "multi_label_classification"
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    expected = F.binary_cross_entropy_with_logits(out.logits, several)
    torch.testing.assert_close(vit(IMAGES, labels=several).loss, expected)


def test_padding_changes_neither_logits_nor_loss(model):
    rows = [IDS[0], IDS[1, :7], IDS[1, :1]]
    alone = [model(row[None]).logits[0] for row in rows]
    nats = torch.cat([F.cross_entropy(a[:-1], row[1:], reduction="none") for a, row in zip(alone, rows, strict=True)])
    for side in ("right", "left"):
        ids, mask = padded(rows, side, 99)
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        for got, expected, seen in zip(out.logits, alone, mask.bool(), strict=True):
            torch.testing.assert_close(got[seen], expected)
        torch.testing.assert_close(out.loss, nats.mean())
    mask[0, 3] = 0  # a token that nobody sees
    others = [*range(3), *range(4, 12)]
    expected = model(ids[:1, others]).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:1, others], expected)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 11\): must be \(3, 12\)"):
        model(ids, attention_mask=mask[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["language", "vision"])
def test_hidden_states(model, kind):
    given, native = IDS, model.native
    if kind == "vision":
        config = hf.TokenFormerViTConfig(image_size=16, patch_size=4, num_labels=10, rotary_fraction=0.25, **SIZES)
        given, model = IMAGES, hf.TokenFormerForImageClassification(config).eval()
        native = model.native
    out = model(given, output_hidden_states=True)
    assert torch.equal(out.logits, native(given))
    embedded = native._embed(given) if kind == "vision" else native.embedding(given)
    assert torch.equal(out.hidden_states[0], embedded)
    assert torch.equal(out.hidden_states[-1], native.backbone(embedded))
    assert len(out.hidden_states) == SIZES["depth"] + 1
    *_, states = model(given, output_hidden_states=True, return_dict=False)
    assert torch.equal(states[1], out.hidden_states[1])
    assert model(given).hidden_states is None
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(given, output_attentions=True)


@torch.no_grad()
def test_what_forward_takes(model):
    whole = model(IDS).logits
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeddings).logits, whole)
    for given in ({}, {"input_ids": IDS, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
            model(**given)
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([3, 5])).logits, whole[:, [3, 5]])
    # Two texts in a row, told by their positions, do not see each other; positions only count by their distance.
    packed = model(IDS, position_ids=torch.tensor([[*range(7), *range(5)]])).logits
    torch.testing.assert_close(packed[:, :7], whole[:, :7])
    torch.testing.assert_close(packed[:, 7:], model(IDS[:, 7:]).logits)
    torch.testing.assert_close(model(IDS, position_ids=torch.arange(12)[None] + 9).logits, whole)
    spread = model(IDS, position_ids=2 * torch.arange(12)[None], attention_mask=torch.ones_like(IDS)).logits
    assert (spread - whole).abs().max() > 1e-3


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
