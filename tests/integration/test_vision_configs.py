"""Every file of configs/vision/: parsed by the command line, run on a shrunken model, counted on meta."""

import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.conftest import write_images
from tests.integration.configs import experiments, given, growth_of, run_shrunken
from tests.integration.growing import checkpoint_of
from tokenformer import TokenFormerViT, ViTConfig, from_pretrained, save_pretrained

EXPERIMENTS = experiments("vision")
CLASSES = {"imagenet": 1000, "tiny": 200, "cifar": 10, "quickstart": 10}
IMAGES = 1281167  # of ImageNet-1k

# facts: computed for the sizes of the paper's table 9. Millions of parameters; their baselines have as many.
PUBLISHED = {
    "imagenet-base": "114.8",
    "imagenet-base-matched": "86.4",
    "imagenet-large": "404.7",
    "imagenet-large-matched": "304.0",
}
BASELINES = {name: f"{name}+parameters" for name in (*PUBLISHED, "imagenet-small", "tiny-imagenet", "cifar-10")}
BASELINES["quickstart"] = "quickstart+quickstart-vision"

# facts: MAE's recipe for a supervised ViT, and what MMPretrain's version of it adds.
RECIPE = {
    "optim": {
        "lr": 1e-4,
        "lr_batch": 256,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.3,
        "schedule": "cosine",
        "min_lr_ratio": 1e-5 / 1.6e-3,
    },
    "data": {
        "image_size": 224,
        "crop": "resized",
        "scale": [0.08, 1.0],
        "hflip": 0.5,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.0,
        "mixup": 0.8,
        "cutmix": 1.0,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    },
}
EPOCHS_AND_DROP_PATH = {"base": (300, 0.1), "large": (200, 0.2)}

# Their ViT-S/16 (arXiv 2205.01580); weight decay is theirs over their learning rate.
PLAIN_VIT = {
    "optim": {
        "lr": 1e-3,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 1e-4 / 1e-3,
        "schedule": "cosine",
        "warmup_steps": 10_000,
        "min_lr_ratio": 0.0,
    },
    "data": {
        "image_size": 224,
        "crop": "resized",
        "scale": [0.05, 1.0],
        "hflip": 0.5,
        "rand_augment": "rand-m10-n2-p1",
        "mixup": 0.2,
        "cutmix": 0.0,
        "crop_pct": 0.875,
    },
}

# Small, and on whatever machine this is. The rest of the file stays as it is.
SHRINK = """
model: {init_args: {config: {depth: 2, dim: 32, num_heads: 2, qkv_tokens: 16, proj_tokens: 16, ffn_tokens: 64},
  optim: {warmup_steps: 1}, compile: false}}
data: {init_args: {source: SOURCE, image_size: SIZE, batch_size: 4, num_workers: 0}}
trainer: {accelerator: cpu, devices: 1, strategy: auto, precision: 32-true, accumulate_grad_batches: 1,
  enable_progress_bar: false, val_check_interval: 2}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """6 images of noise in 3 classes, as train/ and as val/."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 36, 3), dtype=np.uint8)
    return write_images(tmp_path_factory.mktemp("images"), map(Image.fromarray, noise))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_config_runs_on_a_shrunken_model(name, images, tmp_path):
    asked = given(*EXPERIMENTS[name])
    size = 2 * asked["model"]["init_args"]["config"]["patch_size"]
    shrink = SHRINK.replace("SOURCE", str(images)).replace("SIZE", str(size))
    shrink = with_trained_models(asked["model"]["init_args"], shrink, size, tmp_path)
    run_dir = run_shrunken(EXPERIMENTS[name], shrink, tmp_path)
    assert list((run_dir / "checkpoints").glob("best-step-*.ckpt"))
    assert ("val/raw_top1" in (run_dir / "metrics.csv").read_text()) == ("EMA" in class_names(asked))
    changed, saved = yaml.safe_load(shrink), given(run_dir / "config.yaml")
    ran, wanted, small = (config["model"]["init_args"] for config in (saved, asked, changed))
    assert_same(ran, wanted, but=["config", "optim", *small])
    assert_same(ran["config"], wanted["config"], but=["image_size", *small["config"]])
    assert_same(ran["optim"], wanted["optim"], but=small["optim"])
    assert_same(saved["data"]["init_args"], asked["data"]["init_args"], but=changed["data"]["init_args"])
    assert_same(saved["trainer"], asked["trainer"], but=["max_steps", "callbacks", *changed["trainer"]])
    weights = (
        torch.load(checkpoint_of(run_dir, 2), weights_only=True)["state_dict"] if len(EXPERIMENTS[name]) > 1 else {}
    )
    assert all(part.startswith("model.") for part in weights)  # not the teacher's
    if "init_from" in small:
        for part, tensor in from_pretrained(small["init_from"]).state_dict().items():
            assert torch.equal(weights[f"model.{part}"], tensor) != part.startswith("head."), part


def with_trained_models(asked, shrink, size, folder):
    """The settings with something in place of the trained models that a config asks for."""
    settings = yaml.safe_load(shrink)
    model = settings["model"]["init_args"]
    if "init_from" in asked:
        config = asked["config"] | model["config"] | {"image_size": size, "num_classes": 3}
        model["init_from"] = str(folder / "trained")
        save_pretrained(TokenFormerViT(ViTConfig(**config)), folder / "trained")
    if "distill" in asked:
        weights = str(folder / "teacher.pth")
        model["distill"] = {"teacher": "test_vit", "timm_args": {"checkpoint_path": weights}}
        torch.save(timm.create_model("test_vit", num_classes=3, img_size=size).state_dict(), weights)
    return yaml.safe_dump(settings)


def assert_same(got, wanted, but=()):
    """Every key of `wanted` has its value in `got`, except some."""
    wanted = {name: value for name, value in wanted.items() if name not in but}
    assert {name: got[name] for name in wanted} == wanted


def class_names(asked):
    return [callback["class_path"] for callback in asked["trainer"].get("callbacks", [])]


def parts(name):
    """Model, optimizer, data and trainer of a config."""
    asked = given(*EXPERIMENTS[name])
    model = asked["model"]["init_args"]
    return model, model["optim"], asked["data"]["init_args"], asked["trainer"]


def model_config(name):
    model, _, data, _ = parts(name)
    sizes = {"image_size": data["image_size"], "num_classes": CLASSES[re.match(r"\w+", name)[0]]}
    return ViTConfig(**model["config"] | sizes)


def images_per_step(name):
    _, _, data, trainer = parts(name)
    return data["batch_size"] * trainer.get("devices", 1) * trainer.get("accumulate_grad_batches", 1)


def test_the_files():
    of_trained_models = {f"imagenet-base-matched+{overlay}" for overlay in ("linear-probe", "distillation")}
    assert set(EXPERIMENTS) == {*BASELINES, *BASELINES.values(), *of_trained_models, "imagenet-base-growth"}


@pytest.mark.parametrize("name", [f"{name}{overlay}" for name in PUBLISHED for overlay in ("", "+parameters")])
def test_published_sizes_and_recipe(name):
    config = model_config(name)
    with torch.device("meta"):
        model = TokenFormerViT(config)
    num_params = sum(p.numel() for p in model.parameters())
    assert num_params == config.num_params()
    assert f"{num_params / 1e6:.1f}" == PUBLISHED[name.removesuffix("+parameters")]
    assert (config.init, config.scale, config.pool, config.position) == ("official", "fixed", "token", "learned")
    assert_recipe(name)


def assert_recipe(name):
    model, optim, data, trainer = parts(name)
    epochs, drop_path = EPOCHS_AND_DROP_PATH[re.split(r"[-+]", name)[1]]
    assert_same(optim, RECIPE["optim"])
    assert_same(data, RECIPE["data"])
    assert images_per_step(name) == 4096
    assert optim["lr"] * images_per_step(name) / optim["lr_batch"] == pytest.approx(1.6e-3)
    assert optim["warmup_steps"] == round(20 * IMAGES / 4096)
    assert trainer["max_steps"] == round(epochs * IMAGES / 4096)
    assert (model["label_smoothing"], model["config"]["drop_path"]) == (0.1, drop_path)
    assert trainer["gradient_clip_val"] is None
    (ema,) = (callback for callback in trainer["callbacks"] if callback["class_path"] == "EMA")
    assert ema["init_args"] == {"decay": 0.9999, "warmup": True}


@pytest.mark.parametrize("name", ["imagenet-small", "imagenet-small+parameters"])
def test_small_follows_the_plain_vit(name):
    model, optim, data, trainer = parts(name)
    assert_same(optim, PLAIN_VIT["optim"])
    assert_same(data, PLAIN_VIT["data"])
    assert images_per_step(name) == 1024
    assert trainer["max_steps"] == round(90 * IMAGES / 1024)
    assert (trainer["gradient_clip_val"], model["label_smoothing"], model["config"]["drop_path"]) == (1.0, 0.0, 0.0)
    assert (model["config"]["pool"], model["config"]["position"]) == ("avg", "sincos")
    assert "callbacks" not in trainer
    assert abs(model_config(name).num_params() / 22.05e6 - 1) < 0.01  # timm's vit_small_patch16_224


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "+" not in name])
def test_steps_are_the_epochs_that_the_comment_says(name):
    text, batch = EXPERIMENTS[name][0].read_text(), images_per_step(name)
    said = re.search(r"max_steps: (\d+) # .*, (\d+) epochs of (\d+) images", text)
    assert said or name == "quickstart"
    if said:
        steps, epochs, images = map(int, said.groups())
        assert steps == round(epochs * images / batch)
        for warmup, epochs in re.findall(r"warmup_steps: (\d+) # .*, (\d+) epochs", text):
            assert int(warmup) == round(int(epochs) * images / batch)


def grown(name):
    """The size that a config's model ends with."""
    config = model_config(name)
    for stage in growth_of(*EXPERIMENTS[name]).get("stages", []):
        config = replace(config, **{f"{kind}_tokens": stage[kind] for kind in ("qkv", "proj", "ffn")})
    return config


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_differ_in_nothing_but_their_layers(name):
    ours, baseline = grown(name), model_config(BASELINES[name])
    taus = 5 * ours.depth if ours.scale == "learned" else 0
    assert ours.num_params() - taus == baseline.num_params()
    assert baseline == replace(ours, baseline="parameters")
    (model, optim, data, trainer), (model2, optim2, data2, trainer2) = parts(name), parts(BASELINES[name])
    assert data == data2
    assert model["label_smoothing"] == model2["label_smoothing"]
    assert optim == optim2
    kept = [callback for callback in trainer.pop("callbacks", []) if callback["class_path"] != "GrowParameterTokens"]
    assert kept == trainer2.pop("callbacks", [])
    assert trainer == trainer2


def test_growth_goes_from_the_matched_size_to_the_full_one_at_half_time():
    name = "imagenet-base-growth"
    ours = {"scale": "learned", "init": "scaled"}
    assert model_config(name) == replace(model_config("imagenet-base-matched"), **ours)
    assert grown(name) == replace(model_config("imagenet-base"), **ours)
    growth = growth_of(*EXPERIMENTS[name])
    assert [stage["at_step"] for stage in growth["stages"]] == [round(150 * IMAGES / 4096)]
    assert growth["schedule"] == "continue"
    assert class_names(given(*EXPERIMENTS[name])) == ["GrowParameterTokens", "EMA"]
    assert_recipe(name)
