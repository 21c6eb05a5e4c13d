"""A tiny module for images that is built as in a training, for tests."""

from types import SimpleNamespace

from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from tests.integration.tiny import TINY_VISION
from tokenformer import ViTConfig

CONFIG = ViTConfig(**TINY_VISION["model"]["init_args"]["config"], num_classes=3)


def module(train="all", **arguments):
    """As if a trainer had it."""
    made = VisionModule(CONFIG, OptimConfig(), train=train, **arguments)
    made._trainer = SimpleNamespace()
    made.configure_model()
    return made
