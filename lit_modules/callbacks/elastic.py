"""A training of all sizes at once: each step uses the first tokens of every layer, now more of them, now fewer."""

from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from lit_modules.callbacks.grow_tokens import GrowParameterTokens
from lit_modules.modules.base import TokenFormerModule
from lit_modules.runs.logs import is_log_step
from lit_modules.strategies.fsdp2 import FSDP2
from tokenformer.elastic import elastic_layers, use_first

MAX_COMPILED = 6  # of torch's 8 graphs of a block; validation has one


class ElasticTokens(Callback):
    """Nested dropout over tokens: `tokenformer shrink --keep` then makes a model of any of the sizes.

    For each optimizer step a share is drawn, and every layer uses so many of its tokens, the first ones, with the tau
    of as many; of a baseline, every MLP so many of its hidden units. What is drawn depends on seed and step alone, so
    all processes and a resumed run draw the same. Validation is that of the whole model. `train/keep` is the share of
    the step, `train/flops` counts what was computed.

    Args:
        fractions: the shares, each as likely as the others; the largest must be 1.
        seed: of what is drawn.

    Raises:
        ValueError: before training, for other shares, and for what needs all tokens: a growth, tensor parallelism,
            `model.train` other than all, layers with several segments; for more than six shares with compile.
    """

    def __init__(self, fractions: list[float], seed: int = 0) -> None:
        if not fractions or min(fractions) <= 0 or max(fractions) != 1:
            raise ValueError(f"fractions={fractions}: give shares of the tokens above 0 and up to 1, and 1 itself")
        self.fractions, self.seed = fractions, seed

    def check_settings(self, trainer: Trainer, pl_module: TokenFormerModule) -> None:
        """Refuse what can't be trained so; before any data is prepared."""
        if any(isinstance(callback, GrowParameterTokens) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "ElasticTokens and GrowParameterTokens: the new tokens would be those that are left out: grow in one "
                "run, and train elastically in another"
            )
        if isinstance(trainer.strategy, FSDP2) and trainer.strategy.tensor_parallel_size > 1:
            raise ValueError(
                "ElasticTokens: with trainer.strategy.tensor_parallel_size the first tokens are on the first devices "
                "alone: set it to 1"
            )
        if getattr(pl_module, "compile_blocks", False) and len(self.fractions) > MAX_COMPILED:
            raise ValueError(
                f"ElasticTokens: model.compile compiles a block for each of {len(self.fractions)} fractions, and "
                f"torch.compile gives up after some: give at most {MAX_COMPILED}"
            )
        if pl_module.trained != "all":
            raise ValueError(f"ElasticTokens: needs model.train=all, not {pl_module.trained}")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(pl_module, TokenFormerModule):
            raise ValueError(f"ElasticTokens trains the modules of this project, not {type(pl_module).__name__}")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._layers = elastic_layers(pl_module.model)
        for name, layer in self._layers.items():
            if len(getattr(layer, "segments", "1")) > 1:
                raise ValueError(
                    f"ElasticTokens: {name} has several segments, of a growth: `tokenformer export` joins them; start "
                    "from that folder, by model.init_from"
                )

    def share(self, step: int) -> float:
        """Of the tokens that an optimizer step uses."""
        drawn = np.random.SeedSequence((self.seed, step)).generate_state(1, np.uint64)[0]
        return self.fractions[int(drawn % np.uint64(len(self.fractions)))]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._share = self.share(trainer.global_step)
        use_first(self._layers, self._share)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if is_log_step(trainer):
            pl_module.log("train/keep", self._share)
