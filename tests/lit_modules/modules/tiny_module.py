"""A tiny module for images that is built as in a training, for tests."""

from types import SimpleNamespace

import torch

from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from tests.integration.tiny import TINY_VISION
from tokenformer import TokenFormerViT, ViTConfig, save_pretrained

CONFIG = ViTConfig(**TINY_VISION["model"]["init_args"]["config"], num_classes=3)
NAMES = ["bright", "dark", "grey"]
INPUT = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def module(train="all", **arguments):
    """As if a trainer had it."""
    made = VisionModule(CONFIG, OptimConfig(), train=train, **arguments)
    made._trainer = SimpleNamespace()
    made.configure_model()
    return made


def export_classifier(folder):
    """A model for the three classes, whose numbers are other ones than the data's; its folder."""
    torch.manual_seed(1)
    model = TokenFormerViT(CONFIG)
    model.pretrained_cfg = INPUT | {"label_names": NAMES[::-1]}
    save_pretrained(model, folder)
    return folder
