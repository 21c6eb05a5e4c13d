"""Checkpoints out to folders, and on from there with the commands.

One file: the tests share a trained run, which takes seconds to make.
"""

import argparse
import json
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from PIL import Image
from pyarrow.parquet import read_table
from safetensors.torch import load_file
from timm.utils import CheckpointSaver
from transformers import pipeline

import tokenformer.hf  # noqa: F401
from datamodules.images import ImageDataModule
from datamodules.tokenizer import ByteTokenizer, load_tokenizer
from lit_modules.checkpoints.reading import read_checkpoint
from lit_modules.checkpoints.validation import checksums, find_corruption, latest_valid, write_manifest
from lit_modules.checkpoints.writing import AtomicCheckpointIO
from lit_modules.cli import console, main
from lit_modules.commands.predict import described
from lit_modules.modules.loading import load_model, module_from_checkpoint
from lit_modules.strategies.fsdp2 import FSDP2
from tests.conftest import ASSETS
from tests.integration.growing import checkpoint_of, config_of, contents, fit
from tests.integration.tiny import TINY_VISION, rows
from tokenformer import TokenFormerLM, TokenFormerViT, from_pretrained, grow
from tokenformer.interop import consolidated_state, load_initial_weights

IDS = torch.arange(24).view(2, 12)
EMA = ("--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """(config, run folder): grown twice, once within a norm and once beside it, with an average."""
    folder = tmp_path_factory.mktemp("exported")
    config = config_of(folder, corpus, init="segment_norm")
    main(fit(config, folder / "run", *EMA, "--model.config.scale=learned"))
    return config, folder / "run"


def module_weights(checkpoint, key):
    saved = torch.load(checkpoint, weights_only=True)[key]
    return {name.removeprefix("model."): tensor for name, tensor in saved.items()}


@pytest.mark.parametrize(("weights", "key"), [("average", "state_dict"), ("raw", "current_model_state")])
def test_a_grown_checkpoint_is_exported_to_the_bit(run, weights, key, tmp_path, capsys):
    checkpoint = checkpoint_of(run[1], 14)
    main(["export", str(checkpoint), "--out", str(tmp_path / "model"), "--weights", weights])
    assert "57,470 parameters" in capsys.readouterr().out
    saved = load_file(tmp_path / "model/model.safetensors")
    expected = module_weights(checkpoint, key)
    assert saved.keys() == expected.keys()  # each segment has its own norm: nothing to join
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    model = from_pretrained(tmp_path / "model")
    assert torch.equal(model(IDS), load_model(checkpoint, weights)(IDS))
    assert torch.equal(model(IDS), load_model(tmp_path / "model")(IDS))
    assert not model.training
    tokenizer = load_tokenizer(str(tmp_path / "model/tokenizer.json"))
    assert tokenizer.encode_batch(["as bytes: é"]) == ByteTokenizer().encode_batch(["as bytes: é"])
    with pytest.raises(ValueError, match="exists: choose another"):
        main(["export", str(checkpoint), "--out", str(tmp_path / "model")])


def test_the_card_says_what_the_run_has_recorded(run, tmp_path):
    checkpoint = checkpoint_of(run[1], 14)
    for weights in ("average", "raw"):
        main(["export", str(checkpoint), "--out", str(tmp_path / weights), "--weights", weights])
    card = (tmp_path / "average/README.md").read_text()
    costs = torch.load(checkpoint, weights_only=True)["callbacks"]["Throughput"]
    assert "| parameters | 57,470 |" in card
    assert "feed-forward | 64, 64, 128 |" in card
    assert f"14 optimizer steps, 1,792 tokens, {costs['flops']:.3g} FLOPs" in card
    assert "tokenizer `bytes`, sequences of 32" in card
    growth = [line for line in card.splitlines() if "segment_norm, tau fixed" in line]
    assert growth[0].startswith("| 6 | 768 | 20,586 -> ")
    assert "| 16 -> 32 | 16 -> 32 | 32 -> 64 |" in growth[0]
    assert "-> 57,470 | 32 -> 64 | 32 -> 64 | 64 -> 128 |" in growth[1]
    losses = dict(rows(run[1], "val/loss"))
    assert "after step 12 of 14" in card
    assert f"| `val/loss` | {losses[11]:.5g} |" in card
    assert "raw_" not in card
    raw = dict(rows(run[1], "val/raw_loss"))
    assert f"| `val/raw_loss` | {raw[11]:.5g} |" in (tmp_path / "raw/README.md").read_text()
    early = checkpoint_of(run[1], 8)  # what came later is not its result
    main(["export", str(early), "--out", str(tmp_path / "early")])
    assert "after step 8 of 8" in (tmp_path / "early/README.md").read_text()


def test_a_checkpoint_away_from_its_run_is_exported_without_tokenizer(run, tmp_path, capsys):
    (tmp_path / "alone.ckpt").write_bytes(checkpoint_of(run[1], 14).read_bytes())
    options = ["--factor", "2", "--init", "zero_keys"]
    main(["grow", str(tmp_path / "alone.ckpt"), *options, "--out", str(tmp_path / "grown.ckpt")])
    main(["export", str(tmp_path / "grown.ckpt"), "--out", str(tmp_path / "model"), "--dtype", "bfloat16"])
    assert "no tokenizer was written; " in capsys.readouterr().out
    assert not (tmp_path / "model/tokenizer.json").exists()
    card = (tmp_path / "model/README.md").read_text()
    assert "not measured" in card
    assert "Data: not on record" in card
    assert "best so far: `val/loss`" in card
    model, expected = from_pretrained(tmp_path / "model"), load_model(tmp_path / "grown.ckpt").bfloat16()
    for name, tensor in consolidated_state(expected).items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.backbone.blocks[0].ffn.num_tokens == 256
    assert len(model.backbone.blocks[0].ffn.segments) == 3  # the last two share a norm
    given = ["--tokenizer", "bytes"]
    main(["export", str(tmp_path / "grown.ckpt"), "--out", str(tmp_path / "other"), *given])
    assert (tmp_path / "other/tokenizer.json").exists()


def test_a_sharded_checkpoint_is_exported(corpus, tmp_path):
    config = config_of(tmp_path, corpus, init="segment_norm")
    try:
        main(fit(config, tmp_path / "run", *EMA, "--trainer.strategy=fsdp2", "--trainer.devices=1"))
    finally:
        torch.distributed.destroy_process_group()
    sharded = checkpoint_of(tmp_path / "run", 14)
    assert sharded.is_dir()
    assert latest_valid([checkpoint_of(tmp_path / "run", 12), sharded]) == sharded
    with pytest.raises(ValueError, match=r"a sharded checkpoint: resume it by --trainer\.strategy fsdp2"):
        AtomicCheckpointIO().load_checkpoint(sharded)
    saved = contents(tmp_path / "run")
    for weights, start in (("average", "model."), ("raw", "current_model_state.model.")):
        main(["export", str(sharded), "--out", str(tmp_path / weights), "--weights", weights])
        exported = load_file(tmp_path / weights / "model.safetensors")
        assert len(exported) > 20
        assert all(torch.equal(saved[f"{start}{name}"], tensor) for name, tensor in exported.items())
        assert (tmp_path / weights / "tokenizer.json").exists()
    assert "1,792 tokens" in (tmp_path / "raw/README.md").read_text()

    for part in (next(sharded.glob("*.distcp")), sharded / "meta.pt"):
        whole = part.read_bytes()
        part.write_bytes(whole[:-100])
        assert f"its part {part.name} is" in find_corruption(sharded)
        part.write_bytes(whole)
    assert find_corruption(sharded) is None

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    (sharded / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "its part .metadata is" in find_corruption(sharded)
    write_manifest(sharded, [checksums(sharded, rank=0)])
    with pytest.raises(ValueError, match="which is not part of a checkpoint"):
        read_checkpoint(sharded)
    with pytest.raises(ValueError, match="which is not part of a checkpoint"):
        FSDP2()._load_sharded(sharded)  # what a resumed run does
    assert not (tmp_path / "was here").exists()


def test_the_wrong_kind_of_file_names_the_command(run, tmp_path, monkeypatch):
    golden = tmp_path / "golden.safetensors"
    golden.write_bytes((ASSETS / "golden_lm_small.safetensors").read_bytes())
    exported, out = tmp_path / "exported", ["--out", str(tmp_path / "out")]
    main(["export", str(checkpoint_of(run[1], 14)), "--out", str(exported)])
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.pt")
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}, "pytorch-lightning_version": "2"}, tmp_path / "x.ckpt")
    torch.save({"a": 1}, tmp_path / "y.ckpt")
    torch.save({"a": Path()}, tmp_path / "z.pt")
    (tmp_path / "broken.ckpt").write_bytes(b"half of it")
    for command, path, message in (
        ("export", golden, "`tokenformer import .*; wanted is a checkpoint of `tokenformer fit`"),
        ("export", exported, "is an exported model, for .*; wanted is a checkpoint"),
        ("export", run[1], r"the newest is .*/checkpoints/.*\.ckpt; wanted is a checkpoint"),
        ("export", tmp_path / "x.ckpt", "is the checkpoint of another LightningModule"),
        ("export", tmp_path / "y.ckpt", "is no checkpoint of Lightning"),
        ("export", tmp_path / "z.pt", "`tokenformer import .*; wanted is a checkpoint"),
        ("export", tmp_path / "none.ckpt", "no such file"),
        ("export", tmp_path / "broken.ckpt", "truncated or not a checkpoint"),
        ("export", tmp_path / "pytorch_model.pt", "`tokenformer import .*; wanted is a checkpoint"),
        ("import", exported, "is an exported model, for .*; it has no tensors"),
        ("import", golden, "give num_heads"),
        ("predict", checkpoint_of(run[1], 14), "is no image model"),
        ("predict", exported, "is no image model"),
        ("predict", golden, "`tokenformer import .*; wanted is a checkpoint"),
        ("generate", run[1], "the newest is .*; wanted is a checkpoint"),
        ("grow", golden, "`tokenformer import .*; wanted is a checkpoint in one file"),
        ("grow", run[1], "the newest is .*; wanted is a checkpoint in one file"),
    ):
        rest = {"generate": ["--prompt", "a"], "grow": ["--factor", "2", *out]}
        with pytest.raises(ValueError, match=message):
            main([command, str(path), *rest.get(command, out)])
        assert not list(tmp_path.glob("out*"))
    monkeypatch.setattr(sys, "argv", ["tokenformer", "export", str(checkpoint_of(run[1], 14)), "--out", f"{golden}/x"])
    with pytest.raises(SystemExit, match="error: .*Not a directory"):
        console()
    for path, message in ((run[1], "ckpt_path=.*the newest is"), (exported, "an exported model.*`last` takes")):
        with pytest.raises(ValueError, match=message):
            main(["validate", "--config", str(run[0]), "--ckpt_path", str(path), "--run_dir", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
    module = module_from_checkpoint(read_checkpoint(checkpoint_of(run[1], 14)))
    with pytest.raises(ValueError, match="has a vision model, this run trains a language model"):
        module.on_load_checkpoint({"hyper_parameters": {"config": {"patch_size": 4}}})
    for command in ("import", "export"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])


def test_a_folder_is_trained_on(run, tmp_path):
    """It starts where the exported run ended, whatever its segments; the run of an untouched model gives it back."""
    config, run_dir = run
    main(["export", str(checkpoint_of(run_dir, 12)), "--out", str(tmp_path / "model")])
    settings = yaml.safe_load(config.read_text())
    settings["trainer"] |= {"callbacks": [], "max_steps": 4, "val_check_interval": 4}
    settings["checkpoint"]["every_n_train_steps"] = 4
    (tmp_path / "on.yaml").write_text(yaml.safe_dump(settings))
    start = ["--config", str(tmp_path / "on.yaml"), f"--model.init_from={tmp_path / 'model'}"]
    with pytest.raises(
        ValueError, match=r"other sizes than .*model\.config\.qkv_tokens=16 \(64 there\).*: leave these out"
    ):
        main(["fit", *start, "--run_dir", str(tmp_path / "refused")])
    start += [f"--model.config.{name}" for name in ("qkv_tokens=64", "proj_tokens=64", "ffn_tokens=128")]
    main(["validate", *start, "--run_dir", str(tmp_path / "validated")])
    expected = dict(rows(run_dir, "val/loss"))[11]
    assert rows(tmp_path / "validated", "val/loss")[-1][1] == pytest.approx(expected, rel=1e-5)
    main(["fit", *start, "--run_dir", str(tmp_path / "still"), "--model.optim.lr=1e-30"])
    main(["export", str(checkpoint_of(tmp_path / "still", 4)), "--out", str(tmp_path / "again")])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    resume = ["--ckpt_path", str(checkpoint_of(tmp_path / "still", 4)), "--trainer.max_steps=8"]
    main(["fit", *start, "--run_dir", str(tmp_path / "on"), *resume])
    on = load_model(checkpoint_of(tmp_path / "on", 8))
    assert [segment.num_tokens for segment in on.backbone.blocks[0].ffn.segments] == [32, 32, 64]
    assert not torch.equal(on.embedding.weight, one["embedding.weight"])


def test_checkpoints_of_a_training_are_read_as_they_are(run, tmp_path):
    """One of ours, grown twice, and timm's own: by `init_from` and by `import`."""
    checkpoint = checkpoint_of(run[1], 14)
    for command in ("export", "import"):
        main([command, str(checkpoint), "--out", str(tmp_path / command)])
    one, two = (load_file(tmp_path / command / "model.safetensors") for command in ("export", "import"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    model = from_pretrained(tmp_path / "export")
    fresh = TokenFormerLM(model.config)
    load_initial_weights(fresh, checkpoint)
    assert torch.equal(fresh(IDS), model(IDS))
    with pytest.raises(ValueError, match=r"set model\.config to qkv_tokens=64 \(not 16\)"):
        load_initial_weights(TokenFormerLM(replace(model.config, qkv_tokens=16)), checkpoint)

    name, options = "tokenformer_vit_tiny_patch16_224", {"depth": 2, "dim": 32, "num_heads": 4, "scale": "learned"}
    options |= {"qkv_tokens": 8, "proj_tokens": 8, "ffn_tokens": 16}
    vit = timm.create_model(name, img_size=32, num_classes=5, **options).eval()
    grow(vit, ffn=24, init="random")
    args = argparse.Namespace(model=name, model_kwargs=options, mean=[0.5, 0.5, 0.5], interpolation="")
    saver = CheckpointSaver(vit, torch.optim.SGD(vit.parameters(), 0.1), args=args, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, 1.0)
    main(["import", str(tmp_path / "last.pth.tar"), "--out", str(tmp_path / "vit")])
    images = torch.randn(2, 3, 32, 32)
    imported = from_pretrained(tmp_path / "vit")
    torch.testing.assert_close(imported(images), vit(images), rtol=0, atol=1e-6)
    assert (imported.config.ffn_tokens, imported.pretrained_cfg["mean"]) == (24, [0.5, 0.5, 0.5])
    other = TokenFormerViT(replace(imported.config, num_classes=7))
    load_initial_weights(other, tmp_path / "last.pth.tar")
    torch.testing.assert_close(other.forward_features(images), vit.forward_features(images), rtol=0, atol=1e-5)
    args.model = "resnet18"
    saver.save_checkpoint(1, 2.0)
    torch.save({"a": 1}, tmp_path / "none.ckpt")
    (tmp_path / "half.ckpt").write_bytes(b"half")
    for file, message in (
        ("last.pth.tar", "its model is 'resnet18', not one of tokenformer_vit_tiny"),
        ("none.ckpt", "holds no state_dict"),
        ("half.ckpt", "truncated, or no checkpoint"),
        ("vit/model.safetensors", "a part of the exported model .*; wanted is the folder of an exported model"),
        ("missing.ckpt", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_initial_weights(other, tmp_path / file)


def test_an_image_model_is_exported(tmp_path, monkeypatch):
    settings = json.loads(json.dumps(TINY_VISION))
    settings["model"]["init_args"]["config"] |= {"image_size": 8, "patch_size": 4}
    settings["data"]["init_args"] |= {"source": "digits", "image_size": 8, "batch_size": 64}
    settings["data"]["init_args"] |= {"crop_pct": 0.7, "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3]}
    growth = {"stages": [{"at_step": 4, "factor": 2.0}], "init": "zero_keys"}
    settings["trainer"]["callbacks"] = [{"class_path": "GrowParameterTokens", "init_args": growth}]
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(tmp_path / "digits.yaml"), "--run_dir", str(tmp_path / "run")])
    checkpoint = checkpoint_of(tmp_path / "run", 8)
    main(["export", str(checkpoint), "--out", str(tmp_path / "model"), "--format", "onnx"])
    with pytest.raises(ValueError, match="--tokenizer bytes: leave it out, .* is an image model"):
        main(["export", str(checkpoint), "--out", str(tmp_path / "other"), "--tokenizer", "bytes"])
    model, saved = from_pretrained(tmp_path / "model"), load_model(checkpoint)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in consolidated_state(saved).items())
    assert (len(saved.backbone.blocks[0].ffn.segments), len(model.backbone.blocks[0].ffn.segments)) == (2, 1)
    card = (tmp_path / "model/README.md").read_text()
    assert "| classes | 10 |" in card
    assert f"| `val/top1` | {rows(tmp_path / 'run', 'val/top1')[-1][1]:.5g} |" in card
    assert not (tmp_path / "model/tokenizer.json").exists()
    # the card's lines of Python, of the library and of timm, give the model
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, model.config.in_channels, 8, 8)
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        names = {"images": images}
        exec(snippet, names)
        assert torch.equal(names["model"](images), model(images))
    # the ONNX file too, for any batch and image size
    session = onnxruntime.InferenceSession("model/model.onnx")
    for shape in ((2, 3, 8, 8), (1, 3, 8, 20), (5, 3, 12, 8)):
        images = torch.randn(shape)
        (logits,) = session.run(["logits"], {"pixel_values": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), rtol=0, atol=1e-5)
    # and preprocessing and names of classes go along
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    expected = ImageDataModule(**settings["data"]["init_args"]).eval_transform(photo)
    in_timm = names["model"]
    assert torch.equal(timm.data.create_transform(**timm.data.resolve_model_data_config(in_timm))(photo), expected)
    assert in_timm.pretrained_cfg["label_names"] == list("0123456789")
    classify = pipeline("image-classification", "model")
    (seen,) = classify.image_processor(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(seen, expected)
    said = json.loads(Path("model/preprocessor_config.json").read_text())
    assert (said["size"], said["crop_size"]) == ({"shortest_edge": 11}, {"height": 8, "width": 8})
    assert (said["resample"], said["image_mean"]) == (2, [0.5, 0.4, 0.3])
    probabilities = model(expected[None]).softmax(-1)[0].detach()
    best = classify(photo)[0]
    assert best["label"] == str(int(probabilities.argmax()))
    assert best["score"] == pytest.approx(float(probabilities.max()), abs=1e-6)
    classify.model.save_pretrained("again")
    assert from_pretrained("again").pretrained_cfg == model.pretrained_cfg
    main(["grow", "model", "--factor", "2", "--out", "grown"])
    assert from_pretrained("grown").pretrained_cfg == model.pretrained_cfg
    # of a checkpoint from before it said so, the run's config tells
    older = {name: value for name, value in read_checkpoint(checkpoint).items() if name != "preprocessing"}
    told = described(older, yaml.safe_load(Path("run/config.yaml").read_text()))
    assert told == {name: model.pretrained_cfg[name] for name in told}
    assert told.keys() == {"input_size", "interpolation", "crop_pct", "mean", "std", "label_names"}
    # the model knows what `predict` needs, the training's data may be elsewhere
    Path("photos").mkdir()
    photo.save("photos/one.png")
    monkeypatch.setattr("datamodules.images.open_source", lambda source: pytest.fail(f"{source} was opened"))
    source = ["--data.predict_source=photos", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    ways = [["model"], [str(checkpoint)], ["--config", "run/config.yaml", "--ckpt_path", str(checkpoint)]]
    for i, way in enumerate(ways):
        main(["predict", *way, *source, "--run_dir", f"predicted{i}"])
        (row,) = read_table(f"predicted{i}/predictions.parquet").to_pylist()
        assert row["label"] == best["label"]
        assert row["probabilities"][0] == pytest.approx(float(probabilities.max()), abs=1e-6)
