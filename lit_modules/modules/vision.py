"""VisionModule: training, evaluation and prediction of an image classifier. B batch, C classes, D channels.

One file: Lightning asks one class for all of it.
"""

from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassAccuracy

from lit_modules.modules.base import TokenFormerModule
from lit_modules.modules.classes import match_checkpoint, match_initial
from lit_modules.modules.distillation import Distillation, Teacher
from lit_modules.modules.from_timm import WEIGHTS, check_name, create
from lit_modules.modules.recomputing import check_recomputing
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.trained import Train, as_patterns
from lit_modules.runs.logs import is_log_step
from lit_modules.strategies.ranks import data_parallel_rank
from lit_modules.strategies.sharding import shard
from tokenformer import TokenFormerViT, ViTConfig
from tokenformer.backbone import blocks_of
from tokenformer.config import widened

IGNORE = -100  # label of rows that fill up a batch, and of images that have none

TrainBatch = tuple[Tensor, Tensor]  # images (B, 3, H, W), labels (B,) or soft targets (B, C)
EvalBatch = tuple[Tensor, Tensor, Tensor]  # images, labels (B,), places in the split (B,), -1 where it only fills up

PROBE_IMAGES = 16  # enough to see a change; a whole batch would take longer than the growth


class VisionModule(TokenFormerModule):
    """A TokenFormerViT, Transformer baseline (`config.baseline`) or any timm model, that learns to name images.

    Logs what TokenFormerModule logs, and `val/loss` (cross-entropy in nats, no smoothing), `val/top1` and `val/top5`
    (shares of 1), over all images, each once; those of a phase of the data are `val/NAME/loss` and `val/NAME/top1`.
    With `data.skip_unreadable` also `train/unreadable`, how many training images could not be read since the run was
    started or resumed.

    Args:
        config: sizes and options of the model.
        optim: the optimizer and its schedule.
        timm_model: name of a timm model to train in place of `config`, which then only says `num_classes`,
            `image_size`, `in_channels` and `drop_path`.
        timm_args: further arguments of `timm.create_model`, such as {embed_dim: 96, depth: 4}.
        label_smoothing: share of a target that is spread over all classes, in training.
        init_from: folder of an exported or imported model, or a checkpoint, to start from in place of random weights,
            grown or not. In a YAML and on the command line `config` takes its sizes from there.
        train: all, head (a new classifier on frozen features, a linear probe), or patterns of the names of parameters,
            such as `backbone.blocks.11.*`; the rest is frozen, in eval mode.
        distill: a teacher whose predictions are learned too, in training; evaluation goes by the labels.
        predict_features: `predict` writes what the classifier reads, too.
        compile: compile each block with torch.compile: a minute at the start, faster steps.
        checkpoint_activations: keep only each block's input for the backward pass; less memory, a third more work.
        recompute_scores: keep no scores of Pattention layers for the backward pass; less memory, a sixth more of their
            work. Goes without checkpoint_activations, which keeps none anyway.

    Raises:
        ValueError: for a name that timm does not know; in `setup`, when data and model don't fit.
        RuntimeError: when an evaluation has not seen each image once.
    """

    config: ViTConfig
    samples = "images"
    predict_option = "--data.predict_source FOLDER"

    def __init__(
        self,
        config: ViTConfig,
        optim: OptimConfig,
        timm_model: str | None = None,
        timm_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        init_from: str | None = None,
        train: Train = "all",
        distill: Distillation | None = None,
        predict_features: bool = False,
        compile: bool = False,
        checkpoint_activations: bool = False,
        recompute_scores: bool = False,
    ) -> None:
        # From a checkpoint they come as dictionaries, since nothing else is stored: no code runs when one is read.
        super().__init__(OptimConfig(**optim) if isinstance(optim, dict) else optim, init_from, train)
        self.config = ViTConfig(**config) if isinstance(config, dict) else config
        self.timm_model, self.timm_args, self.label_smoothing = timm_model, timm_args or {}, label_smoothing
        self.compile_blocks, self.checkpoint_activations = compile, checkpoint_activations
        self.recompute_scores, self.predict_features = recompute_scores, predict_features
        self.distill = Distillation(**distill) if isinstance(distill, dict) else distill
        self.teacher: Teacher | None = None
        check_recomputing(self)
        if timm_model is not None and recompute_scores:
            raise ValueError(f"model.recompute_scores=true: the timm model {timm_model} has no scores; leave it out")
        if timm_model is not None:
            check_name(timm_model, "model.timm_model")
        if timm_model is not None and init_from is not None:
            raise ValueError(
                f"model.init_from={init_from!r}: holds no timm model; give model.timm_args checkpoint_path"
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing={label_smoothing}: must be at least 0 and below 1")
        weights = init_from is not None or any(map(self.timm_args.get, WEIGHTS))
        if "head" in as_patterns(train) and not weights:
            raise ValueError(
                f"model.train={train}: needs trained features: give model.init_from, an exported model or a "
                "checkpoint, or model.timm_model with pretrained or checkpoint_path in model.timm_args"
            )
        timm_model_and_args = {"timm_model": timm_model, "timm_args": timm_args}
        self.save_hyperparameters({"config": asdict(self.config), "optim": asdict(self.optim)} | timm_model_and_args)
        self.model: nn.Module | None = None
        classes = self.config.num_classes
        shared = {"num_classes": classes, "average": "micro", "ignore_index": IGNORE, "validate_args": False}
        self._top1 = MulticlassAccuracy(**shared)  # type: ignore[arg-type]
        self._top5 = MulticlassAccuracy(**shared, top_k=min(5, classes))  # type: ignore[arg-type]

    def build_model(self, width: int = 1) -> nn.Module:
        """The model before any growth, `width` times as wide."""
        config = self.config
        if self.timm_model is None:
            return self.start_structure(TokenFormerViT(widened(config, width)))
        drop_path = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        return create(self.timm_model, drop_path | self.timm_args, config, "model.timm_model")

    def set_model(self, model: nn.Module) -> None:
        """Make this the model: as it is to be trained, checkpointed, compiled and sharded."""
        self.model = model
        if self.checkpoint_activations:
            model.set_grad_checkpointing()  # type: ignore[operator]
        if self.recompute_scores:
            model.backbone.recompute_scores()  # type: ignore[operator, union-attr]
        if self.compile_blocks:
            for block in blocks_of(model) or [model]:
                block.compile()
        if self._device_mesh is not None:
            shard(model, self._device_mesh)
        self._flops: dict[torch.Size, int] = {}  # of an image, for a timm model

    def setup(self, stage: str) -> None:
        """Check model, data and teacher against each other before any work is done."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self._check_data(data)
        if stage == "fit" and self.distill is not None and self.teacher is None:
            self.teacher = Teacher(self.distill, self.config, data)

    def _check_data(self, data: Any) -> None:
        if self.config.in_channels != (channels := getattr(data, "in_channels", 3)):
            raise ValueError(
                f"model.config.in_channels={self.config.in_channels}: data.in_channels={channels}; set both"
            )
        if getattr(data, "num_classes", self.config.num_classes) != self.config.num_classes:
            raise ValueError(
                f"model.config.num_classes={self.config.num_classes} but the data has {data.num_classes} classes"
            )
        if not hasattr(data, "image_size"):  # of the user's own
            return
        if self.timm_model is not None and data.image_size != self.config.image_size:
            raise ValueError(
                f"data.image_size={data.image_size}: {self.timm_model} is built for "
                f"model.config.image_size={self.config.image_size}; set both"
            )
        if self.timm_model is None and data.image_size % self.config.patch_size:
            raise ValueError(
                f"data.image_size={data.image_size} is not a whole number of patches of "
                f"model.config.patch_size={self.config.patch_size}"
            )
        if self.init_from is not None:
            self._head_fits = match_initial(self.init_from, data)

    def on_train_start(self) -> None:
        """Say that the classifier is new, if it is."""
        super().on_train_start()
        if self._head_is_new:
            rank_zero_info(f"the classifier is new: {self._why_new()}")
        self._head_is_new = False

    def on_validation_start(self) -> None:
        """Refuse to evaluate a classifier that nobody has trained."""
        self._refuse_new_head()

    def on_test_start(self) -> None:
        """Refuse to evaluate a classifier that nobody has trained."""
        self._refuse_new_head()

    def on_predict_start(self) -> None:
        """Refuse to predict by a classifier that nobody has trained."""
        self._refuse_new_head()

    def _refuse_new_head(self) -> None:
        if self._head_is_new and self.trainer.state.fn != TrainerFn.FITTING:
            raise ValueError(
                f"{self._why_new()}, its classifier would be a random one: train it first, and give --ckpt_path; or "
                "give the data that it was trained on"
            )

    def _why_new(self) -> str:
        if "head" in as_patterns(self.trained):
            return f"model.train={self.trained} begins with a new one"
        names = getattr(self.trainer.datamodule, "class_names", [])  # type: ignore[attr-defined]
        classes = f"{self.config.num_classes} of data.source" + (f" ({', '.join(names[:6])}, ...)" if names else "")
        return f"model.init_from={self.init_from} has other classes than the {classes}"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history, what the outputs stand for, and what evaluation does to an image."""
        super().on_save_checkpoint(checkpoint)
        data = getattr(self.trainer, "datamodule", None)
        checkpoint |= {name: getattr(data, name) for name in ("class_names", "preprocessing") if hasattr(data, name)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the size of the saved model, and the order of its classes; refuse one that knows others."""
        super().on_load_checkpoint(checkpoint)
        data: Any = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        saved = checkpoint.get("class_names")
        if saved is not None and hasattr(data, "class_names"):
            match_checkpoint(saved, data)

    def on_train_batch_end(self, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        """Log; also how many images could not be read, where those are passed over."""
        data: Any = getattr(self.trainer, "datamodule", None)
        new_step = self.trainer.global_step != self._step
        if new_step and is_log_step(self.trainer) and getattr(data, "skip_unreadable", False):
            self.log("train/unreadable", float(data.unreadable), sync_dist=True, reduce_fx="sum")
        super().on_train_batch_end(outputs, batch, batch_idx)

    def batch_loss(self, batch: TrainBatch) -> Tensor:
        """Mean cross-entropy of the batch in nats, targets smoothed; with a teacher, what :class:`Teacher` says."""
        images, targets = batch
        logits = self._model(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return loss if self.teacher is None else self.teacher.loss(logits, images, loss)

    def probe_loss(self, batch: TrainBatch) -> Tensor:
        """What growth must not change: the loss of the beginning of a batch."""
        images, targets = batch
        return self.batch_loss((images[:PROBE_IMAGES], targets[:PROBE_IMAGES]))

    def num_tokens(self, batch: TrainBatch) -> int:
        """Tokens of the batch's images, the class token too; of a model that is no ViT, those that a ViT would have."""
        return len(batch[0]) * self.config.num_tokens(batch[0].shape[-1])

    def tokens_per_batch(self, data: Any) -> int | None:
        """Training tokens of a batch of this datamodule on one device."""
        return data.batch_size * self.config.num_tokens(data.image_size)

    def training_flops(self, batch: TrainBatch) -> int:
        """FLOPs that a batch costs at the model's present size: forward, and twice that for backward."""
        images, _ = batch
        if isinstance(self.model, TokenFormerViT):
            return 3 * len(images) * self.model.flops_per_image(images.shape[-1])
        if images.shape[1:] not in self._flops:
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                self.build_model().eval()(torch.empty(1, *images.shape[1:]))
            self._flops[images.shape[1:]] = counter.get_total_flops()
        return 3 * len(images) * self._flops[images.shape[1:]]

    def start_evaluation(self, trainer: Any, stage: str) -> None:
        """Reset the sums; of a class map, only classes that have images are told apart."""
        self._top1.reset()
        self._top5.reset()
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self._names = [phase.name for phase in getattr(getattr(trainer, "datamodule", None), "phases", ())]
        self._sums = torch.zeros(max(1, len(self._names)), 3, dtype=wide, device=self.device)  # nats, right, images
        self._absent: Tensor | None = None  # (C), true of the classes that are ruled out
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "some_classes") and (some := data.some_classes(stage)) is not None:
            self._absent = torch.ones(self.config.num_classes, dtype=torch.bool, device=self.device)
            self._absent[some] = False
            rank_zero_info(f"{len(some)} of {self.config.num_classes} classes have images: the others are ruled out")

    def evaluate(self, batch: EvalBatch, dataset: int = 0) -> dict[str, Tensor]:
        """Add the batch to the sums; its logits (B, C) and losses (B,)."""
        images, labels, *_ = batch
        logits = self._model(images).float()
        if self._absent is not None:
            logits = logits.masked_fill(self._absent, -torch.inf)
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        self._top1.update(logits, labels)
        self._top5.update(logits, labels)
        right = (logits.argmax(dim=1) == labels).sum()
        sums = torch.stack([losses.sum(), right, (labels != IGNORE).sum()])
        self._sums[dataset if self._names else 0] += sums.to(self._sums)
        return {"logits": logits, "losses": losses}

    def evaluation(self, trainer: Any, stage: str) -> dict[str, Tensor]:
        """Mean loss and accuracies over all images of all ranks; of phases, of each of them too."""
        # Devices that share the tokens see the same images.
        copies = trainer.world_size // data_parallel_rank(trainer)[1]
        sums = trainer.strategy.reduce(self._sums.clone(), reduce_op="sum") / copies
        nats, _, images = sums.sum(dim=0)
        self.num_evaluated, expected = int(images), self._expected(trainer, stage)
        if expected is not None and self.num_evaluated != expected:
            raise RuntimeError(f"{stage}: {self.num_evaluated:,} images were evaluated, the split has {expected:,}")
        means = {"loss": nats / images, "top1": self._top1.compute(), "top5": self._top5.compute()}
        for name, (nats, right, images) in zip(self._names, sums, strict=bool(self._names)):
            means |= {f"{name}/loss": nats / images, f"{name}/top1": right / images}
        return {name: value.float() for name, value in means.items()}

    def _expected(self, trainer: Any, stage: str) -> int | None:
        """Images of the split; None where only a part of it is asked for."""
        limit = {"val": trainer.limit_val_batches, "test": trainer.limit_test_batches}[stage]
        data: Any = getattr(trainer, "datamodule", None)
        whole = isinstance(limit, float) and limit == 1  # the integer is one batch
        if not whole or trainer.sanity_checking or not hasattr(data, "num_images"):
            return None
        return data.num_images(stage)

    def predict_step(self, batch: EvalBatch, batch_idx: int) -> dict[str, Tensor]:
        """The likeliest classes and their probabilities, (B, 5), and places in the split (or batch); no fillers.

        With `predict_features` what the classifier reads, too, (B, D).
        """
        images, places = batch[0], batch[2] if len(batch) > 2 else torch.arange(len(batch[0]))
        real, model = places >= 0, self._model
        found = {"places": places[real]}
        if self.predict_features:
            tokens = model.forward_features(images)  # type: ignore[operator]
            found["features"] = model.forward_head(tokens, pre_logits=True)[real].float()  # type: ignore[operator]
            logits = model.forward_head(tokens)  # type: ignore[operator]
        else:
            logits = model(images)
        top = logits.float().softmax(dim=-1).topk(min(5, self.config.num_classes))
        return found | {"probabilities": top.values[real], "classes": top.indices[real]}

    @property
    def _model(self) -> nn.Module:
        assert self.model is not None, "configure_model comes first"
        return self.model
