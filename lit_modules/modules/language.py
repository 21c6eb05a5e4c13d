"""LanguageModule: training, evaluation and prediction of a causal language model. B batch, T sequence."""

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_modules.modules.base import TokenFormerModule
from lit_modules.modules.recomputing import check_recomputing
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.trained import Train
from lit_modules.strategies.sharding import shard
from tokenformer import LMConfig, TokenFormerLM
from tokenformer.config import widened
from tokenformer.loss import IGNORE

# input_ids (B, T) and targets (B, T), IGNORE where a target does not count. One with names may have more to say:
# `num_tokens` without padding; `weight` of its loss in the mean over the batches of a step.
Batch = tuple[Tensor, Tensor]

PROBE_TOKENS = 256  # enough to see a change; a whole batch would take longer than the growth


class LanguageModule(TokenFormerModule):
    """A TokenFormer (or Transformer baseline: `config.baseline`) that learns to predict the next token.

    Logs what TokenFormerModule logs (the loss in nats a token), and `val/loss`, `val/perplexity`, `val/bits_per_byte`
    and `val/entropy` (mean entropy of the predictions, nats), over all tokens; those of a named validation set
    and of a phase are `val/NAME/loss` and so on.

    Args:
        config: sizes and options of the model.
        optim: the optimizer and its schedule.
        init_from: folder of an exported or imported model, or a checkpoint, to start from in place of random weights,
            grown or not. In a YAML and on the command line `config` takes its sizes from there.
        train: all, or patterns of the names of parameters, such as `backbone.blocks.11.*`; the rest is frozen.
        compile: compile each block with torch.compile: a minute at the start, faster steps.
        checkpoint_activations: keep only each block's input for the backward pass; less memory, a third more work.
        recompute_scores: keep no scores of Pattention layers for the backward pass; less memory, a sixth more of their
            work. Goes without checkpoint_activations, which keeps none anyway.
    """

    config: LMConfig
    samples = "sequences"
    predict_option = "--data.predict_file FILE"

    def __init__(
        self,
        config: LMConfig,
        optim: OptimConfig,
        init_from: str | None = None,
        train: Train = "all",
        compile: bool = False,
        checkpoint_activations: bool = False,
        recompute_scores: bool = False,
    ) -> None:
        # From a checkpoint they come as dictionaries, since nothing else is stored: no code runs when one is read.
        super().__init__(OptimConfig(**optim) if isinstance(optim, dict) else optim, init_from, train)
        self.config = LMConfig(**config) if isinstance(config, dict) else config
        self.compile_blocks, self.checkpoint_activations = compile, checkpoint_activations
        self.recompute_scores = recompute_scores
        check_recomputing(self)
        self.save_hyperparameters({"config": asdict(self.config), "optim": asdict(self.optim)})
        self.model: TokenFormerLM | None = None

    def training_flops(self, batch: Batch) -> int:
        """FLOPs that a batch costs at the model's present size, padding too: forward, and twice that for backward."""
        ids = batch[0]
        return 3 * ids.numel() * self._model.flops_per_token(ids.shape[1])

    def num_tokens(self, batch: Batch) -> int:
        """Input tokens of a batch, without padding where the batch says how many."""
        return int(getattr(batch, "num_tokens", batch[0].numel()))

    def tokens_per_batch(self, data: Any) -> int | None:
        """Training tokens of a batch of this datamodule on one device; None where it does not say."""
        return getattr(data, "tokens_per_batch", None)

    def build_model(self, width: int = 1) -> TokenFormerLM:
        """The model before any growth, `width` times as wide."""
        return self.start_structure(TokenFormerLM(widened(self.config, width)))

    def set_model(self, model: TokenFormerLM) -> None:  # type: ignore[override]
        """Make this the model: as it is to be trained, checkpointed, compiled and sharded."""
        self.model = model
        model.backbone.checkpoint_activations = self.checkpoint_activations
        model.backbone.recompute_scores(self.recompute_scores)
        if self.compile_blocks:
            for block in model.backbone.blocks:
                block.compile()
        if self._device_mesh is not None:
            shard(model, self._device_mesh)

    def setup(self, stage: str) -> None:
        """Check model and data against each other before any work is done."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "vocab_size", 0) > self.config.vocab_size:
            raise ValueError(
                f"model.config.vocab_size={self.config.vocab_size} but the tokenizer makes ids up to "
                f"{data.vocab_size - 1}: set it to at least {data.vocab_size}"
            )
        requested = getattr(data, "requested_vocab_size", None)
        if requested is not None and data.vocab_size < self.config.vocab_size == requested:
            rank_zero_info(
                f"the text gives a vocabulary of {data.vocab_size}, not data.bpe_vocab_size={self.config.vocab_size}: "
                "the model has as many"
            )
            self.config = replace(self.config, vocab_size=data.vocab_size)
            self.save_hyperparameters({"config": asdict(self.config)})
        if getattr(data, "seq_len", 0) > self.config.max_seq_len:
            raise ValueError(
                f"data.seq_len={data.seq_len} is longer than model.config.max_seq_len={self.config.max_seq_len}"
            )

    def probe_loss(self, batch: Batch) -> Tensor:
        """What growth must not change: the loss of a piece of a batch, from the first target on that counts."""
        ids, targets = batch[:2]
        row, start = divmod(int((targets != IGNORE).flatten().int().argmax()), targets.shape[1])
        piece = slice(row, row + 1), slice(start, start + PROBE_TOKENS)
        return self._model.loss(ids[piece], targets[piece])

    def batch_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats of the targets that count, times the batch's weight where it has one."""
        loss = self._model.loss(*batch[:2])
        return loss * getattr(batch, "weight", 1.0)

    def _evaluated(self, trainer: Any, stage: str) -> dict[str, Any]:
        """The token files of the loaders, None where they are not known, by what their metrics' names begin with."""
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "phases"):
            return {f"{phase.name}/": getattr(phase.data, stage, None) for phase in data.phases}
        found = {"": getattr(data, stage, None)}
        found |= {f"{name}/": tokens for name, tokens in getattr(data, "named", {}).items()}
        num_loaders = len(getattr(trainer, f"num_{stage}_batches"))  # a datamodule of the user's own names none
        return found | {f"{i}/": None for i in range(len(found), num_loaders)}

    def start_evaluation(self, trainer: Any, stage: str) -> None:
        """Reset the sums."""
        # Plain sums, since torchmetrics' weighted mean either leaves out NaN or forgets the weights (1.9).
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        num_loaders = len(self._evaluated(trainer, stage))
        self._sums = torch.zeros(num_loaders, 3, dtype=wide, device=self.device)  # nats, entropy, tokens

    def evaluate(self, batch: Batch, dataset: int = 0) -> dict[str, Tensor]:
        """Add the batch to the sums."""
        nats, entropy = self._model.nats_and_entropy(*batch)
        sums = torch.stack([x.to(self._sums.dtype).sum() for x in (nats, entropy, batch[1] != IGNORE)])
        self._sums[dataset] += sums
        return {}

    def evaluation(self, trainer: Any, stage: str) -> dict[str, Tensor]:
        """Means over all tokens of all ranks, of each loader; of phases, over those of all loaders too."""
        metrics: dict[str, Tensor] = {}
        sums, evaluated = trainer.strategy.reduce(self._sums, reduce_op="sum"), self._evaluated(trainer, stage)
        if "" not in evaluated:
            sums, evaluated = torch.cat([sums, sums.sum(dim=0, keepdim=True)]), evaluated | {"": None}
        for (name, tokens), (nats, entropy, count) in zip(evaluated.items(), sums, strict=True):
            nats, entropy = nats / count, entropy / count
            metrics |= {f"{name}loss": nats, f"{name}perplexity": nats.exp(), f"{name}entropy": entropy}
            if (split := getattr(tokens, "split", None)) is not None:
                metrics[f"{name}bits_per_byte"] = nats / math.log(2) * split.tokens / split.bytes
        return {name: value.float() for name, value in metrics.items()}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Id, cross-entropy and entropy, in nats, of every target that counts."""
        nats, entropy = self._model.nats_and_entropy(*batch)
        counts = batch[1] != IGNORE
        return {"id": batch[1][counts], "nats": nats[counts], "entropy": entropy[counts]}

    @property
    def _model(self) -> TokenFormerLM:
        assert self.model is not None, "configure_model comes first"
        return self.model
