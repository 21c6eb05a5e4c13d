"""Knowledge distillation: a student learns what a trained teacher predicts, too. B batch, C classes, S image size.

The formulas are DeiT's (arXiv 2012.12877, section 4), without a token of their own: y are the targets, Z_s and Z_t the
logits of student and teacher, T the temperature, CE cross-entropy.

    hard   (1 - alpha) CE(Z_s, y) + alpha CE(Z_s, argmax Z_t)
    soft   (1 - alpha) CE(Z_s, y) + alpha T^2 KL(softmax(Z_t / T) || softmax(Z_s / T))
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_modules.checkpoints.reading import read_checkpoint
from lit_modules.modules.from_timm import WEIGHTS, check_name, create
from tokenformer import ViTConfig, from_pretrained
from tokenformer.files import is_exported
from tokenformer.interop import load_checked, load_trained


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What the student learns from which teacher.

    Attributes:
        teacher: name of a timm model, folder of an exported model, or a checkpoint (.ckpt, timm's .pth.tar).
        timm_args: further arguments of `timm.create_model`; {checkpoint_path: FILE} for weights of your own, by default
            {pretrained: true}.
        kind: hard (the teacher's likeliest class) or soft (its probabilities).
        alpha: weight of the teacher; the targets have the rest.
        temperature: of `kind: soft`.
    """

    teacher: str
    timm_args: dict[str, Any] = field(default_factory=dict)
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("hard", "soft"):
            raise ValueError(f"distill.kind={self.kind!r}: choose hard or soft")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"distill.alpha={self.alpha}: must lie between 0 and 1")
        if self.temperature <= 0:
            raise ValueError(f"distill.temperature={self.temperature}: must be above 0")
        if self.kind == "hard" and self.temperature != 1:
            raise ValueError(f"distill.temperature={self.temperature}: is of kind: soft; hard has none")


class Teacher:
    """A trained model in eval mode, which sees the student's images, normalised as it is used to.

    It is no module, so it is no part of checkpoints, averages and parameters, and no strategy wraps or shards it: each
    process has it whole.

    Args:
        settings: which.
        config: the student's.
        data: the datamodule, which says `mean` and `std`; `image_size` and `class_names` if it has them.

    Raises:
        ValueError: for what can't be read, does not take the images, has other classes, or does not say its mean and
            standard deviation.
    """

    def __init__(self, settings: Distillation, config: ViTConfig, data: Any) -> None:
        self.settings, self._data = settings, data
        size = getattr(data, "image_size", config.image_size)
        with torch.random.fork_rng(devices=[]):  # the student draws the numbers that it would draw without
            model: Any = _read(settings, replace(config, image_size=size))
        self.model: Any = model.requires_grad_(False).eval()
        self._place: tuple[torch.device, torch.dtype] | None = None  # where the student's images are
        self._norm = self._conversion(model.pretrained_cfg, config.in_channels)
        images = torch.zeros(1, config.in_channels, size, size)
        try:
            classes = self.logits(images).shape[-1]
        except (RuntimeError, AssertionError) as error:
            raise _refused(settings, f"takes no images of the shape {tuple(images.shape[1:])}: {error}") from error
        if classes != config.num_classes:
            raise _refused(settings, f"knows {classes} classes, the student {config.num_classes}")
        self._place = None

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: the average of a student has no use for one of its own."""
        return self

    def _conversion(self, cfg: dict[str, Any], channels: int) -> list[Tensor] | None:
        """Factor and summand, (C, 1, 1) each, from the data's normalisation to the teacher's; None for the same."""
        stats = []
        for name in ("mean", "std"):
            if not cfg.get(name) or not hasattr(self._data, name):
                whose = "the datamodule" if cfg.get(name) else "the model"
                raise _refused(self.settings, f"{whose} does not say the {name} that its images are normalised by")
            both = [torch.tensor(values, dtype=torch.float64) for values in (cfg[name], getattr(self._data, name))]
            stats.append([values.mean(0, keepdim=True) for values in both] if channels == 1 else both)
        (mean, data_mean), (std, data_std) = stats
        if torch.equal(mean, data_mean) and torch.equal(std, data_std):
            return None
        return [values[:, None, None] for values in (data_std / std, (data_mean - mean) / std)]

    def _classes(self) -> Tensor | None:
        """The teacher's number of each class of the data; None if they are the same, or if one of both does not say."""
        theirs, ours = self.model.pretrained_cfg.get("label_names"), getattr(self._data, "class_names", None)
        if not theirs or not ours or theirs == ours:
            return None
        if sorted(theirs) != sorted(ours):
            raise _refused(self.settings, f"knows other classes than the data: {theirs[:5]}..., not {ours[:5]}...")
        return torch.tensor([theirs.index(name) for name in ours])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, C) of images as the student gets them, (B, channels, S, S)."""
        if self._place != (images.device, images.dtype):  # the first; data may have taken another order of classes
            self._place = images.device, images.dtype
            self.model.to(images)
            self._norm = self._norm and [values.to(images) for values in self._norm]
            self._order = self._classes()
        if self._norm is not None:
            images = images * self._norm[0] + self._norm[1]
        logits: Tensor = self.model(images)
        return logits if self._order is None else logits[:, self._order.to(logits.device)]

    def loss(self, student: Tensor, images: Tensor, targets_loss: Tensor) -> Tensor:
        """What a student with these logits (B, C) minimises; `targets_loss` is its cross-entropy with the targets."""
        settings, teacher = self.settings, self.logits(images)
        if settings.kind == "hard":
            distilled = F.cross_entropy(student, teacher.argmax(dim=-1))
        else:
            ours, theirs = (F.log_softmax(z.float() / settings.temperature, dim=-1) for z in (student, teacher))
            distilled = settings.temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - settings.alpha) * targets_loss + settings.alpha * distilled


def _refused(settings: Distillation, problem: str) -> ValueError:
    return ValueError(f"model.distill.teacher={settings.teacher!r}: {problem}")


def _read(settings: Distillation, config: ViTConfig) -> nn.Module:
    """The model, for images of the config's size and channels."""
    name, path = settings.teacher, Path(settings.teacher)
    if path.exists():
        if settings.timm_args:
            raise _refused(settings, "distill.timm_args are of a timm model by its name, leave them out")
        return from_pretrained(path) if path.is_dir() and is_exported(path) else _from_checkpoint(path, config)
    check_name(name, "model.distill.teacher")
    args = settings.timm_args if "checkpoint_path" in settings.timm_args else {"pretrained": True} | settings.timm_args
    model: Any = create(name, args, config, "model.distill.teacher")
    known = model.pretrained_cfg.get("num_classes")
    if args.get("pretrained") and known != config.num_classes:  # timm would give it a new classifier
        raise _refused(settings, f"knows {known} classes, the student {config.num_classes}")
    return model


def _from_checkpoint(path: Path, config: ViTConfig) -> nn.Module:
    """Of a training by timm, or by this project: of a TokenFormer, or of a timm model."""
    if path.suffix != ".ckpt" or not (name := (saved := read_checkpoint(path))["hyper_parameters"].get("timm_model")):
        return load_trained(path)
    hyper = saved["hyper_parameters"]
    args = {key: value for key, value in (hyper["timm_args"] or {}).items() if key not in WEIGHTS}
    classes = replace(config, num_classes=hyper["config"]["num_classes"])
    model: Any = create(name, args, classes, "model.distill.teacher")
    start = "model."
    load_checked(model, {n.removeprefix(start): t for n, t in saved["state_dict"].items() if n.startswith(start)}, path)
    names = saved.get("class_names")
    model.pretrained_cfg = saved.get("preprocessing", {}) | ({"label_names": names} if names else {})
    return model
