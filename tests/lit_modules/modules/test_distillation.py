"""Distillation: its losses, and teachers of every origin."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.nn import functional as F

from lit_modules.modules.distillation import Distillation, Teacher
from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from tests.lit_modules.modules.tiny_module import CONFIG, INPUT, NAMES, export_classifier, module
from tokenformer import from_pretrained

DATA = SimpleNamespace(**INPUT, image_size=16, class_names=NAMES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_classifier(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def batch():
    """Images, smoothed targets, logits of a student."""
    draw = torch.Generator().manual_seed(0)
    images, targets, logits = (torch.randn(size, generator=draw) for size in ((4, 3, 16, 16), (4, 3), (4, 3)))
    return images, targets.softmax(dim=-1), logits.requires_grad_()


def test_losses_are_those_of_the_formulas(exported, batch):
    images, targets, student = batch
    base = F.cross_entropy(student, targets)
    with torch.no_grad():
        theirs = from_pretrained(exported)(images)[:, [2, 1, 0]]  # its classes come in another order
    hard, soft = (
        Teacher(Distillation(teacher=str(exported), **how), CONFIG, DATA)
        for how in ({"kind": "hard"}, {"kind": "soft", "alpha": 0.1, "temperature": 3.0})
    )
    assert torch.allclose(hard.logits(images), theirs)
    picked = student.log_softmax(-1)[torch.arange(4), theirs.argmax(-1)]
    assert torch.allclose(hard.loss(student, images, base), (base - picked.mean()) / 2)
    p, q = (theirs / 3).softmax(-1), (student / 3).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(dim=-1).mean()
    assert torch.allclose(soft.loss(student, images, base), 0.9 * base + 0.1 * 9 * divergence)
    none = Teacher(Distillation(teacher=str(exported), kind="soft", alpha=0.0), CONFIG, DATA)
    (expected,), (got,) = (
        torch.autograd.grad(x, student)
        for x in (F.cross_entropy(student, targets), none.loss(student, images, F.cross_entropy(student, targets)))
    )
    assert torch.equal(none.loss(student, images, base), base)
    assert torch.equal(got, expected)


def test_a_teacher_leaves_no_trace(exported):
    """Not in the random numbers, nor in what is saved, trained and averaged."""
    made = module("all", distill={"teacher": str(exported)})
    names, state = set(dict(made.named_parameters())), torch.get_rng_state()
    made.teacher = Teacher(made.distill, CONFIG, DATA)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(dict(made.named_parameters())) == names
    assert deepcopy(made).teacher is made.teacher
    made.train()
    assert not any(part.training for part in made.teacher.model.modules())
    assert not any(p.requires_grad for p in made.teacher.model.parameters())


def test_a_teacher_of_timm_gets_its_own_pixels(tmp_path, batch):
    """By name with a file of weights, with timm's own way to pretrained ones, and as it was trained here."""
    images, *_ = batch
    torch.manual_seed(2)
    model = timm.create_model("test_vit", num_classes=3, img_size=16).eval()
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    mean, std = (torch.tensor(INPUT[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model((images * std + mean - 0.5) / 0.5)
    file = str(tmp_path / "teacher.pth")
    overlay = {"file": file, "num_classes": 3, "input_size": (3, 16, 16)}
    for args in ({"checkpoint_path": file}, {"pretrained_cfg_overlay": overlay}):
        teacher = Teacher(Distillation(teacher="test_vit", timm_args=args), CONFIG, DATA)
        assert torch.allclose(teacher.logits(images), expected, atol=1e-5)
    overlay["num_classes"] = 10
    with pytest.raises(ValueError, match="knows 10 classes, the student 3"):
        Teacher(Distillation(teacher="test_vit", timm_args={"pretrained_cfg_overlay": overlay}), CONFIG, DATA)
    hyper = dict(VisionModule(CONFIG, OptimConfig(), timm_model="test_vit", timm_args={"pretrained": True}).hparams)
    saved = {"state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}
    saved |= {"hyper_parameters": hyper, "pytorch-lightning_version": "2", "class_names": NAMES}
    torch.save(saved | {"preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3}}, tmp_path / "teacher.ckpt")
    teacher = Teacher(Distillation(teacher=str(tmp_path / "teacher.ckpt")), CONFIG, DATA)
    assert torch.allclose(teacher.logits(images), expected, atol=1e-5)
    torch.save(saved, tmp_path / "teacher.ckpt")
    with pytest.raises(ValueError, match="the model does not say the mean"):
        Teacher(Distillation(teacher=str(tmp_path / "teacher.ckpt")), CONFIG, DATA)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mean": INPUT["mean"]}, "the datamodule does not say the std"),
        (INPUT | {"class_names": ["bright", "dark", "green"]}, "knows other classes than the data"),
    ],
)
def test_what_a_teacher_must_know_of_the_data(exported, data, message):
    with pytest.raises(ValueError, match=message):
        Teacher(Distillation(teacher=str(exported)), CONFIG, SimpleNamespace(**data))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "test_vitt"}, "model.distill.teacher='test_vitt': timm has no such model: did you mean test_vit"),
        ({"kind": "medium"}, "distill.kind='medium': choose hard or soft"),
        ({"alpha": 2.0}, "distill.alpha=2.0: must lie between 0 and 1"),
        ({"kind": "soft", "temperature": 0.0}, "distill.temperature=0.0: must be above 0"),
        ({"temperature": 2.0}, "distill.temperature=2.0: is of kind: soft"),
        ({"timm_args": {"depth": 2}}, "distill.timm_args are of a timm model by its name"),
        ({"teacher": "test_vit", "timm_args": {"checkpoint_path": "nowhere"}}, "teacher='test_vit' .*no such file"),
        ({"classes": 10}, "knows 3 classes, the student 10"),
    ],
)
def test_what_is_refused(exported, settings, message):
    config = replace(CONFIG, num_classes=settings.pop("classes", 3))
    with pytest.raises(ValueError, match=message):
        Teacher(Distillation(**{"teacher": str(exported)} | settings), config, DATA)
