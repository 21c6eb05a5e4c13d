"""Our models in timm's registry: the sizes that are published, and what timm's tools do with them."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_loader, create_transform, resolve_data_config
from timm.models import get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, accuracy
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from tests.tokenformer.tiny_vit import GROWN, TINY, build, images
from tokenformer import ViTConfig, grow
from tokenformer.timm_models import SIZES

TINY_TIMM = {"patch_size": 8, "num_classes": 10, "depth": 3, "dim": 32, "num_heads": 4}
TINY_TIMM |= {"qkv_tokens": 24, "proj_tokens": 20, "ffn_tokens": 64}

PUBLISHED = {
    "tokenformer_vit_tiny_patch16_224": 7_456_936,
    "tokenformer_vit_small_patch16_224": 29_068_648,
    "tokenformer_vit_base_matched_patch16_224": 86_447_848,  # paper: 86M
    "tokenformer_vit_base_patch16_224": 114_759_400,  # paper: 109M
    "tokenformer_vit_large_matched_patch16_224": 304_007_144,  # paper: 307M
    "tokenformer_vit_large_patch16_224": 404_670_440,  # paper: 407M
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items(), ids=list(PUBLISHED))
def test_parameter_counts_of_the_registered_sizes(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == model.num_params() == model.config.num_params() == count


def test_every_size_is_registered():
    assert sorted(timm.list_models("tokenformer_vit_*")) == sorted(SIZES) == sorted(PUBLISHED)
    assert ViTConfig().num_params() == PUBLISHED["tokenformer_vit_base_matched_patch16_224"]
    baseline = ViTConfig(baseline="parameters")
    assert (baseline.num_params(), baseline.mlp_hidden) == (
        86_447_848,
        3072,
    )  # its ViT is the usual one, without biases


def create(**arguments):
    torch.manual_seed(0)
    return timm.create_model("tokenformer_vit_tiny_patch16_224", **TINY_TIMM | {"img_size": 32} | arguments).eval()


def test_create_model_takes_timms_arguments_and_the_configs():
    model = create(
        img_size=(48, 48),
        in_chans=1,
        num_classes=7,
        drop_path_rate=0.1,
        drop_rate=0.0,
        global_pool="avg",
        scale="learned",
    )
    changes = {
        "image_size": 48,
        "in_channels": 1,
        "num_classes": 7,
        "drop_path": 0.1,
        "pool": "avg",
        "scale": "learned",
    }
    assert model.config == ViTConfig(**TINY | changes)
    assert model(torch.zeros(2, 1, 48, 48)).shape == (2, 7)
    assert create(position="sincos", baseline="parameters").config == ViTConfig(
        **TINY | {"position": "sincos", "baseline": "parameters"}
    )


BAD_ARGUMENTS = [
    ({"pretrained": True}, RuntimeError, "No pretrained weights exist for tokenformer_vit_tiny_patch16_224"),
    ({"imgsize": 32}, TypeError, "unknown arguments imgsize: choose from .*img_size"),
    ({"in_channels": 1}, TypeError, "unknown arguments in_channels: choose from .*in_chans"),
    ({"img_size": (32, 48)}, ValueError, r"img_size=\(32, 48\): .*square"),
    ({"dynamic_img_size": False}, ValueError, "dynamic_img_size=False: .*leave it out"),
    ({"img_size": 36}, ValueError, "patch_size=8 does not divide image_size=36"),
    ({"drop_rate": 0.1}, ValueError, "drop_rate=0.1: .*drop_path_rate"),
    ({"global_pool": "max"}, ValueError, "pool='max': choose one of token, avg"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS, ids=[str(a) for a, _, _ in BAD_ARGUMENTS])
def test_bad_arguments_are_refused_with_a_fix(arguments, error, message):
    with pytest.raises(error, match=message):
        create(**arguments)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_checkpoint_of_another_image_size_and_grown(tmp_path, suffix):
    model = create()
    grow(model, **GROWN)
    path = tmp_path / f"model.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(
        {"state_dict": model.state_dict()}, path
    )
    loaded = create(img_size=48, checkpoint_path=str(path))
    x = images(model, 48, 48)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        create(num_classes=7, checkpoint_path=str(path))
    # timm's way to weights of another classifier and other channels
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    other = create(**source, num_classes=7, in_chans=1)
    assert torch.equal(other.position, model.position)
    torch.testing.assert_close(other.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))
    assert other(images(other)).shape == (2, 7)


def test_features_only():
    whole = create()
    for grown in (False, True):
        if grown:
            grow(whole, **GROWN)
        features = create(features_only=True, out_indices=(0, -2))
        features.model.load_state_dict(whole.state_dict(), strict=False)
        assert features.feature_info.channels() == [32, 32]
        assert features.feature_info.reduction() == [8, 8]
        assert features.feature_info.module_name() == ["backbone.blocks.0", "backbone.blocks.1"]
        x = images(whole, 32, 48)
        maps = features(x)
        assert [tuple(y.shape) for y in maps] == [(2, 32, 4, 6)] * 2
        assert all(map(torch.equal, maps, whole.forward_intermediates(x, [0, 1], intermediates_only=True)))
        # what is not needed is gone, and the config says so
        assert (features.model.config.depth, features.model.config.num_classes) == (2, 0)
        assert features.model.num_params() == whole.num_params() - sum(
            p.numel() for m in (whole.backbone.blocks[2], whole.backbone.norm, whole.head) for p in m.parameters()
        )
        with FlopCounterMode(display=False) as counter:  # on meta: torch 2.11 does not count the CPU's attention
            copy.deepcopy(features.model).to("meta")(images(whole, batch=1).to("meta"))
        assert counter.get_total_flops() == features.model.flops_per_image()
    assert len(create(features_only=True)(x)) == 3


def test_reset_classifier():
    model = build()
    features = model.forward_features(images(model))
    assert model.get_classifier() is model.head
    model.reset_classifier(7, "token")
    assert model.get_classifier().weight.dtype == torch.float64
    assert not model.head.training
    assert model.forward_head(features).shape == (2, 7)
    assert model.num_classes == model.config.num_classes == 7
    assert model.num_params() == model.config.num_params()
    model.reset_classifier(0)
    assert torch.equal(model.forward_head(features), features[:, 0])
    assert model.num_params() == model.config.num_params()
    with pytest.raises(ValueError, match="global_pool='avg': the model was built for 'token'"):
        model.reset_classifier(7, "avg")
    model.reset_classifier(0, "")  # no pooling
    assert torch.equal(model(images(model)), features)
    model.reset_classifier(0, "token")
    assert torch.equal(model(images(model)), features[:, 0])
    unpooled = create(global_pool="")
    assert unpooled(images(unpooled)).shape == (2, 17, 10)


@pytest.mark.parametrize("position", ["learned", "sincos"])
def test_another_input_size(position):
    model = build(position=position).requires_grad_(False)
    other = build(position=position, image_size=48)
    if position == "learned":
        other.load_state_dict(model.state_dict())
    model.set_input_size(img_size=(48, 48))
    assert model.config == other.config
    assert model.patch_embed.img_size == (48, 48)
    assert torch.equal(model.position, other.position)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_input_size(patch_size=8)
    with pytest.raises(ValueError, match="patch_size=16: the patch embedding is made for 8"):
        model.set_input_size(img_size=48, patch_size=16)
    with pytest.raises(ValueError, match=r"img_size=\(32, 48\): positions are of square images"):
        model.set_input_size(img_size=(32, 48))


def test_a_model_is_made_on_its_device_in_its_precision():
    model = create(device="meta", dtype=torch.bfloat16, position="sincos")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert {t.dtype for name, t in tensors.items() if not name.endswith(".tau")} == {torch.bfloat16}
    assert model.in_chans == 3


def test_intermediates_as_dino_asks_for_them():
    model = build()
    x = images(model, 48, 24)
    expected = model.forward_intermediates(x, 2, norm=True, output_fmt="NLC", intermediates_only=True)
    assert all(map(torch.equal, model.get_intermediate_layers(x, 2, norm=True), expected))
    ((maps, prefix),) = model.get_intermediate_layers(x, [1], reshape=True, return_prefix_tokens=True)
    assert (maps.shape, prefix.shape) == ((2, 32, 6, 3), (2, 1, 32))


def test_torch_fx_as_timm_traces_it():
    model = build()
    grow(model, **GROWN, init="segment_norm")
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    nodes, _ = get_graph_node_names(model, tracer_kwargs=tracer)
    assert "backbone.blocks.1.ffn" in nodes
    traced = create_feature_extractor(model, ["backbone.blocks.1.ffn", nodes[-1]], tracer_kwargs=tracer)
    for x in (images(model), images(model, 48, 24, batch=3)):
        assert torch.equal(traced(x)[nodes[-1]], model(x))
    assert traced(x)["backbone.blocks.1.ffn"].shape == (3, 6 * 3 + 1, 32)


def layers_of(model):
    """Each parameter's name, and how many layers there are from it to the last one."""
    for name, _ in model.named_parameters():
        if name.startswith(("class_token", "position", "patch_embed")):
            yield name, 4
        elif block := re.match(r"backbone\.blocks\.(\d)\.", name):
            yield name, 3 - int(block[1])
        else:
            assert name.startswith(("backbone.norm", "head"))
            yield name, 0


@pytest.mark.parametrize("init", [None, "zero_keys", "segment_norm"])
def test_training_with_timms_layer_decay_and_average(init):
    model = create(scale="learned", norm_affine=True).train()
    if init:
        grow(model, **GROWN, init=init)
    average = ModelEmaV3(model, decay=0.75)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups) == len(list(model.parameters()))
    parameters = dict(model.named_parameters())
    for name, layers in layers_of(model):
        group = groups[parameters[name]]
        assert group["lr_scale"] == pytest.approx(0.75**layers), name
        weight = parameters[name].ndim > 1 and name not in ("class_token", "position")
        assert group["weight_decay"] == (0.05 if weight else 0), name

    before = {name: p.detach().clone() for name, p in parameters.items()}
    x = images(model)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    average.update(model)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p.detach(), 0.75 * before[name] + 0.25 * parameters[name].detach())
    assert not torch.equal(parameters["position"], before["position"])
    assert torch.equal(average.module.backbone.blocks[0].ffn.tau, model.backbone.blocks[0].ffn.tau)
    assert average(x).shape == (2, 10)


class Photos(torch.utils.data.Dataset):
    """Random images, and their numbers for classes; `create_loader` sets the transform."""

    transform = None

    def __len__(self):
        return 6

    def __getitem__(self, i):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), i


def test_timms_validation_loop():
    model = create()
    data = resolve_data_config({"img_size": 32}, model=model)
    assert (data["crop_pct"], data["interpolation"], data["mean"][0]) == (0.875, "bicubic", 0.485)
    assert resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)
    assert model.default_cfg["classifier"] == "head"
    assert model.default_cfg["first_conv"] == "patch_embed.proj"
    loader = create_loader(
        Photos(), batch_size=4, use_prefetcher=False, num_workers=0, persistent_workers=False, **data
    )
    transform = create_transform(**data)
    photos = Photos()
    photos.transform = transform
    correct = seen = 0
    with torch.inference_mode():
        for x, target in loader:
            assert torch.equal(x[0], photos[int(target[0])][0])
            logits = model(x)
            assert logits.shape == (len(x), 10)
            top1, top5 = accuracy(logits, target, topk=(1, 5))
            assert 0 <= top1 <= top5 <= 100
            correct += ((logits.argmax(1) == target).sum() * 100 / len(x) == top1).item()
            seen += len(x)
    assert (seen, correct) == (6, 2)
