"""Models in folders: what is written is what is read, to the bit; joined segments are the same function."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from tokenformer import (
    LMConfig,
    TokenFormerLM,
    TokenFormerViT,
    ViTConfig,
    from_pretrained,
    grow,
    load_official,
    save_pretrained,
)
from tokenformer.growth import pattention_layers
from tokenformer.interop import consolidated_state, load_checked, load_initial_weights
from tokenformer.net2net import widen

SIZES = {"depth": 2, "dim": 32, "num_heads": 2, "qkv_tokens": 16, "proj_tokens": 16, "ffn_tokens": 32}
IDS = torch.arange(24).view(2, 12) % 64


def language_model(**options):
    torch.manual_seed(0)
    return TokenFormerLM(LMConfig(**SIZES | {"vocab_size": 64, "max_seq_len": 32} | options))


def image_model(**options):
    torch.manual_seed(0)
    return TokenFormerViT(ViTConfig(**SIZES | {"image_size": 16, "patch_size": 4, "num_classes": 5} | options)).eval()


def grown(model, init):
    """Grown three times: two segments under one norm before `init`, one after it."""
    grow(model, qkv=20, ffn=40, init="zero_keys")
    grow(model, qkv=24, ffn=48, proj=20, init=init)
    grow(model, ffn=56, init="zero_keys")
    for layer in pattention_layers(model).values():  # as trained: all of it counts
        for name, parameter in layer.named_parameters():
            if "gain" in name or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize("scale", ["fixed", "learned", "current"])
@pytest.mark.parametrize(
    ("init", "segments"), [("zero_keys", 1), ("random", 1), ("segment_norm", 2), ("pairs", 2), ("anchored", 2)]
)
def test_segments_are_joined_without_changing_the_function(init, segments, scale, tmp_path):
    model = grown(language_model(scale=scale).double(), init)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(IDS)
    save_pretrained(model, tmp_path / "a")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    loaded = from_pretrained(tmp_path / "a")
    torch.testing.assert_close(loaded(IDS), logits, rtol=0, atol=1e-12)
    ffn, old = loaded.backbone.blocks[1].ffn, model.backbone.blocks[1].ffn
    assert (len(ffn.segments), len(old.segments)) == (segments, 4)
    for kind in ("keys", "values"):
        segments = [sorted(layer.segments, key=lambda s: s.is_anchored) for layer in (ffn, old)]
        joined = [torch.cat([getattr(s, kind) for s in parts]) for parts in segments]
        assert torch.equal(*joined)
    assert (loaded.config.qkv_tokens, loaded.config.proj_tokens, loaded.config.ffn_tokens) == (24, 20, 56)
    model.load_state_dict(consolidated_state(model))
    assert torch.equal(model(IDS), loaded(IDS))


def test_a_second_round_trip_writes_the_same_bytes(tmp_path):
    for i, model in enumerate((grown(language_model(), "segment_norm"), image_model(position="sincos"))):
        one, two = tmp_path / f"{i}a", tmp_path / f"{i}b"
        save_pretrained(model, one)
        loaded = from_pretrained(one)
        save_pretrained(loaded, two)
        for name in ("model.safetensors", "config.json"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
        assert not loaded.training
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept_and_tau_is_exact(dtype, tmp_path):
    model = language_model(tie_embeddings=False, vocab_multiple=10).to(dtype)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.backbone.blocks[0].ffn.tau.dtype == torch.float64
    assert torch.equal(loaded(IDS), model(IDS))
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert loaded.config == model.config


def test_layers_of_different_sizes_and_baselines(tmp_path):
    partly = language_model()
    grow(partly, ffn=64, layers="*.blocks.0.*")
    wide = widen(language_model(baseline="parameters", ffn_tokens=128), 2)
    for name, model in (("partly", partly), ("wide", wide)):
        save_pretrained(model, tmp_path / name)
        torch.testing.assert_close(from_pretrained(tmp_path / name)(IDS), model(IDS), rtol=0, atol=1e-6)
    counts = [block.ffn.num_tokens for block in from_pretrained(tmp_path / "partly").backbone.blocks]
    assert counts == [64, 32]


def test_what_is_no_exported_model_is_refused(tmp_path):
    (tmp_path / "step.ckpt").touch()
    with pytest.raises(
        ValueError, match=r"`tokenformer export .*step\.ckpt --out DIR.*; wanted is a folder with config"
    ):
        from_pretrained(tmp_path / "step.ckpt")
    save_pretrained(language_model(), tmp_path / "lm")
    config = json.loads((tmp_path / "lm/config.json").read_text())
    (tmp_path / "lm/config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(
        ValueError, match="model_type='gpt2' is none of tokenformer, tokenformer_vit; .*`tokenformer imp"
    ):
        from_pretrained(tmp_path / "lm")
    (tmp_path / "lm/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: corrupted"):
        from_pretrained(tmp_path / "lm")
    (tmp_path / "lm/config.json").write_text(json.dumps(config | {"depth": 3, "transformers_version": "5"}))
    with pytest.raises(ValueError, match=r"missing tensors: backbone\.blocks\.2\."):
        from_pretrained(tmp_path / "lm")
    (tmp_path / "lm/config.json").write_text(json.dumps(config | {"dim": 64}))
    with pytest.raises(ValueError, match="size mismatch"):
        from_pretrained(tmp_path / "lm")
    (tmp_path / "lm/model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not there, or corrupted"):
        from_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="unknown tensors: other"):
        load_checked(language_model(), language_model().state_dict() | {"other": torch.zeros(1)}, "file")


def test_a_model_starts_from_a_folder(tmp_path):
    source = grown(language_model().double(), "segment_norm")
    save_pretrained(source, tmp_path / "lm")
    same = {"qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 56}
    learned = language_model(**same, scale="learned", max_seq_len=8, vocab_size=60, vocab_multiple=64).double()
    load_initial_weights(learned, tmp_path / "lm")
    torch.testing.assert_close(learned(IDS % 60), source(IDS % 60)[..., :60], rtol=0, atol=1e-12)
    gains = [gain for name, gain in learned.named_parameters() if name.endswith("tau_gain")]
    assert len(gains) == 20  # of two norms in each of ten layers
    with pytest.raises(ValueError, match=r"set model\.config to ffn_tokens=56 \(not 32\)"):
        load_initial_weights(language_model(**same | {"ffn_tokens": 32}), tmp_path / "lm")
    with pytest.raises(ValueError, match="is a language model, this is not"):
        load_initial_weights(image_model(), tmp_path / "lm")
    with pytest.raises(ValueError, match="size mismatch for embedding"):
        load_initial_weights(language_model(**same, vocab_size=300), tmp_path / "lm")


def test_an_image_model_for_other_classes_and_sizes_keeps_all_but_its_head(tmp_path):
    source = image_model()
    save_pretrained(source, tmp_path)
    model = image_model(num_classes=7, image_size=32, drop_path=0.1)
    torch.nn.init.normal_(model.head.weight)
    head = model.head.weight.clone()
    load_initial_weights(model, tmp_path)
    assert torch.equal(model.head.weight, head)
    images = torch.randn(2, 3, 16, 16)
    assert model(images).shape == (2, 7)
    assert torch.equal(model.class_token, source.class_token)
    assert all(
        torch.equal(model.state_dict()[n], t) for n, t in source.state_dict().items() if n.startswith("backbone")
    )
    again = image_model()
    load_initial_weights(again, tmp_path)
    assert torch.equal(again(images), source(images))


@pytest.mark.parametrize("init", [None, "zero_keys", "segment_norm"])
def test_timm_reads_an_exported_model(init, tmp_path):
    model = image_model() if init is None else grown(image_model(), init)
    save_pretrained(model, tmp_path)
    sizes = SIZES | {"img_size": 16, "patch_size": 4, "num_classes": 5}
    path = str(tmp_path / "model.safetensors")
    loaded = timm.create_model("tokenformer_vit_tiny_patch16_224", **sizes, checkpoint_path=path).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), from_pretrained(tmp_path)(images))


def test_all_that_is_wrong_with_a_released_checkpoint_is_listed(golden_lm, tmp_path):
    weights = {name: tensor for name, tensor in golden_lm.items() if name.startswith("sequential.")}
    del weights["sequential.2.mlp.key_param_tokens"], weights["sequential.6.norm.bias"]
    weights["sequential.4.mlp.value_param_tokens"] = torch.zeros(8, 64)
    weights["sequential.3.attention.query.bias"] = torch.zeros(64)
    with pytest.raises(ValueError, match="missing tensors") as error:
        load_official(weights, num_heads=4)
    assert str(error.value) == (
        "missing tensors: sequential.2.mlp.key_param_tokens, sequential.6.norm.bias; "
        "unknown tensors: sequential.3.attention.query.bias; "
        "shapes that contradict the other layers: sequential.4.mlp.value_param_tokens (8, 64), not (160, 64)"
    )
    with pytest.raises(ValueError, match="no matrix .*: not a released TokenFormer"):
        load_official(language_model().state_dict())
    save_pretrained(language_model(), tmp_path / "ours")
    torch.save({"sequential": 1}, tmp_path / "none.bin")
    (tmp_path / "text.txt").write_text("hello")
    for path, said in (
        ("ours", "an exported model"),
        ("none.bin", "no tensors seq"),
        ("text.txt", "no file of tensors"),
    ):
        with pytest.raises(ValueError, match=said):
            load_official(tmp_path / path)


def test_no_bit_of_a_released_checkpoint_is_lost(golden_lm, tmp_path):
    weights = {n: t.half() for n, t in golden_lm.items() if n.startswith("sequential.")}
    save_pretrained(load_official(weights, num_heads=4), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["embedding.weight"], weights["sequential.0.word_embeddings.weight"])
    ours = saved["backbone.blocks.2.attention.out.segments.0.values"]
    assert torch.equal(ours, weights["sequential.4.attention.proj.value_param_tokens"])
    weights["sequential.6.norm.weight"] = golden_lm["sequential.6.norm.weight"]  # in another precision
    assert torch.equal(load_official(weights, num_heads=4).backbone.norm.weight, golden_lm["sequential.6.norm.weight"])
