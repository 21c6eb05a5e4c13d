"""The command line on images: what a run writes, that it resumes and grows exactly, that its numbers are timm's.

One file: the tests share folders of images and a trained run, which takes seconds to make.
"""

import csv
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from pyarrow.parquet import read_table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import create_dataset, create_loader
from timm.utils import AverageMeter, accuracy
from torch.nn import functional as F

from datamodules.images import ImageDataModule
from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from tests.integration.growing import checkpoint_of, difference, fit
from tests.integration.tiny import GROW_ONCE, rows, write_vision
from tokenformer import LMConfig, TokenFormerViT, ViTConfig, from_pretrained
from tokenformer.growth import pattention_layers


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """(config, run folder) of a run that has grown and learned."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_vision(folder, images, [GROW_ONCE, {"class_path": "LossCurve"}])
    main(fit(config, folder / "run", "--trainer.max_steps=40", "--trainer.val_check_interval=20"))
    return config, folder / "run"


def test_a_run_learns_and_writes_its_logs_and_pictures(trained):
    _, run = trained
    assert {"loss.png", "batch.png", "growth.csv", "metrics.csv"} <= {path.name for path in run.iterdir()}
    assert rows(run, "val/top1")[-1][1] > 0.8
    assert rows(run, "val/top5")[-1][1] == 1  # of three classes
    assert rows(run, "train/images")[-1] == (39, 160)
    assert rows(run, "train/tokens")[-1] == (39, 160 * 5)  # four patches and the class token
    seconds, speed = rows(run, "train/seconds"), rows(run, "train/images_per_second")
    assert speed[1][1] == pytest.approx(4 / (seconds[1][1] - seconds[0][1]), rel=1e-3)
    assert all(0 < share < 1 for _, share in rows(run, "train/data_wait"))
    flops = dict(rows(run, "train/flops"))
    config = VisionModule.load_from_checkpoint(checkpoint_of(run, 3)).model.config
    assert flops[0] == 3 * 4 * config.flops_per_image()
    assert flops[39] - flops[38] > flops[1] - flops[0]


# Everything that draws random numbers or carries state at once: augmentation, mixing, drop path, average, growth.
AT_ONCE = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9", "--trainer.accumulate_grad_batches=2"]
RESUMED = {
    "plain": ([], {}),
    "all at once": (AT_ONCE, {"mixup": 0.8, "cutmix": 1.0, "rand_augment": "rand-m9-mstd0.5", "num_workers": 1}),
    "layer decay, recomputed": (["--model.optim.layer_decay=0.7", "--model.checkpoint_activations=true"], {}),
}


@pytest.mark.parametrize(("options", "data"), RESUMED.values(), ids=RESUMED)
def test_resumed_equals_uninterrupted(images, tmp_path, options, data):
    config = write_vision(tmp_path, images, [GROW_ONCE], **data)
    main(fit(config, tmp_path / "whole", *options))
    for step in (3, 6, 7):
        run = tmp_path / f"from-{step}"
        main(fit(config, run, *options, resume=checkpoint_of(tmp_path / "whole", step)))
        assert difference(tmp_path / "whole", run, 8) == 0, step
        for column in ("train/loss", "train/images", "train/flops", "val/loss", "val/raw_loss", "val/raw_top1"):
            later = [pair for pair in rows(tmp_path / "whole", column) if pair[0] >= step]
            assert rows(run, column) == later, column
    assert bool(rows(tmp_path / "whole", "val/raw_top1")) == ("EMA" in str(options))


def test_checkpoints_at_the_end_of_an_epoch_are_as_exact_as_others(images, tmp_path):
    """30 images, 2 x 4 a step: the epochs end with steps 4 and 8, where no validation follows."""
    config = write_vision(tmp_path, images)
    options = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=6", "--trainer.max_steps=10"]
    main(fit(config, tmp_path / "whole", *options))
    for step in (4, 8):
        main(fit(config, tmp_path / f"from-{step}", *options, resume=checkpoint_of(tmp_path / "whole", step)))
        assert difference(tmp_path / "whole", tmp_path / f"from-{step}", 10) == 0, step
        saved = torch.load(checkpoint_of(tmp_path / "whole", step), weights_only=True)
        assert saved["callbacks"]["Throughput"]["samples"] == 8 * step
    main(fit(config, tmp_path / "sparse", "--checkpoint.every_n_train_steps=8", "--trainer.val_check_interval=100"))
    assert [path.name for path in (tmp_path / "sparse" / "checkpoints").iterdir()] == ["step-00000008.ckpt"]


def test_average_and_weights_are_validated_side_by_side(images, tmp_path):
    config = write_vision(tmp_path, images)
    callbacks = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.99", "--trainer.callbacks.warmup=false"]
    main(fit(config, tmp_path / "both", *callbacks, "--trainer.max_steps=4"))
    main(fit(config, tmp_path / "without", "--trainer.max_steps=4"))
    assert rows(tmp_path / "both", "val/raw_loss") == rows(tmp_path / "without", "val/loss")
    assert rows(tmp_path / "both", "val/loss") != rows(tmp_path / "both", "val/raw_loss")
    saved = torch.load(checkpoint_of(tmp_path / "both", 4), weights_only=True)
    plain = torch.load(checkpoint_of(tmp_path / "without", 4), weights_only=True)
    for name, tensor in plain["state_dict"].items():
        assert torch.equal(saved["current_model_state"][name], tensor), name


def evaluated_as_timm_does(model, source, size, crop_pct, **settings):
    """timm's validate loop: its data set, loader and accuracy; (top1, top5, loss, probabilities of each file)."""
    dataset = create_dataset("", root=str(source / "val"), **settings)
    loader = create_loader(
        dataset, (3, size, size), 16, use_prefetcher=False, interpolation="bicubic", crop_pct=crop_pct, num_workers=0
    )
    meters = [AverageMeter() for _ in range(3)]
    probabilities = []
    with torch.no_grad():
        for inputs, targets in loader:
            logits = model(inputs)
            probabilities += logits.softmax(-1).tolist()
            found = (*accuracy(logits, targets, topk=(1, min(5, logits.shape[1]))), F.cross_entropy(logits, targets))
            for meter, value in zip(meters, found, strict=True):
                meter.update(value.item(), len(inputs))
    return *(meter.avg for meter in meters), dict(zip(dataset.filenames(absolute=True), probabilities, strict=True))


@pytest.mark.parametrize("timm_model", [None, "test_vit", "test_resnet"])
def test_numbers_are_those_of_timms_evaluation(shared_data, tmp_path, caplog, timm_model):
    """1,000 real images of 20 classes, greyscale ones among them; any timm model trains and evaluates alike."""
    source = shared_data / "images" / "tiny-imagenet-20"
    config = write_vision(tmp_path, source, image_size=32, batch_size=64, crop_pct=0.9)
    name = [f"--model.timm_model={timm_model}"] if timm_model else []
    size = ["--model.config.image_size=32", "--trainer.limit_val_batches=2"]
    main(fit(config, tmp_path / "run", *name, *size, "--trainer.max_steps=4"))
    checkpoint = checkpoint_of(tmp_path / "run", 4)
    command = ["--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", str(checkpoint)]
    main(["validate", *command, "--trainer.limit_val_batches=1.0", "--run_dir", str(tmp_path / "validated")])
    main(["predict", *command, "--run_dir", str(tmp_path / "predicted")])

    module = VisionModule.load_from_checkpoint(checkpoint)
    if timm_model:
        model = timm.create_model(timm_model, num_classes=20, **({"img_size": 32} if "vit" in timm_model else {}))
        model.load_state_dict(module.model.state_dict())
    else:
        model = module.model
        assert isinstance(model, TokenFormerViT)
    top1, top5, loss, probabilities = evaluated_as_timm_does(model.eval(), source, 32, 0.9)
    (row,) = csv.DictReader((tmp_path / "validated" / "results.csv").open())
    assert float(row["top1"]) == pytest.approx(top1, abs=1e-3)
    assert float(row["top1_err"]) == pytest.approx(100 - top1, abs=1e-3)
    assert float(row["top5"]) == pytest.approx(top5, abs=1e-3)
    assert (row["count"], row["img_size"], row["crop_pct"], row["interpolation"]) == ("1000", "32", "0.9", "bicubic")
    assert row["model"] == (timm_model or "images")
    assert float(row["param_count"]) == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    assert f"top1 {row['top1']}, " in caplog.text
    assert rows(tmp_path / "validated", "val/loss")[-1][1] == pytest.approx(loss, rel=1e-4)
    predicted = read_table(tmp_path / "predicted" / "predictions.parquet").to_pylist()
    assert len(predicted) == 1000
    names = ImageDataModule(str(source)).class_names
    for image in predicted:
        expected = probabilities[image["file"]]
        assert image["probabilities"] == pytest.approx(sorted(expected, reverse=True)[:5], abs=1e-5)
        assert image["top5"][0] == image["label"]
        assert expected[names.index(image["label"])] == pytest.approx(max(expected), abs=1e-5)
        assert image["target"] == image["file"].split("/")[-2]


def test_results_of_several_evaluations_go_into_one_file(trained, tmp_path):
    config, run = trained
    for command, step in (("validate", 3), ("test", 40)):
        folder = ["--trainer.default_root_dir", str(tmp_path), "--name", "shapes"]
        main([command, "--config", str(config), "--ckpt_path", str(checkpoint_of(run, step)), *folder])
    found = list(csv.DictReader((tmp_path / "shapes" / "results.csv").open()))
    assert [row["model"] for row in found] == ["shapes", "shapes"]
    assert [row["count"] for row in found] == ["23", "23"]
    assert float(found[0]["top1"]) < float(found[1]["top1"])
    assert float(found[0]["param_count"]) < float(found[1]["param_count"])  # grown in between


def test_an_image_that_is_left_out_is_noticed(trained, tmp_path, monkeypatch):
    config, run = trained
    monkeypatch.setattr(ImageDataModule, "num_images", lambda self, split: 24)
    command = ["validate", "--config", str(config), "--ckpt_path", str(checkpoint_of(run, 40))]
    with pytest.raises(RuntimeError, match="23 images were evaluated, the split has 24"):
        main([*command, "--run_dir", str(tmp_path / "run")])


def test_mistakes_are_drawn(images, tmp_path):
    config = write_vision(tmp_path, images)
    main(fit(config, tmp_path / "run", "--trainer.max_steps=2", "--trainer.val_check_interval=1"))
    assert rows(tmp_path / "run", "val/top1")[-1][1] < 1
    picture = Image.open(tmp_path / "run" / "mistakes.png")
    assert len(picture.convert("L").getcolors()) > 50
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"train/batch", "val/mistakes"} <= set(events.Tags()["images"])


def test_predicting_images_without_labels(trained, images, tmp_path):
    config, run = trained
    command = ["predict", "--config", str(config), "--ckpt_path", str(checkpoint_of(run, 40))]
    main([*command, "--data.predict_source", str(images / "train" / "dark"), "--run_dir", str(tmp_path / "run")])
    predicted = read_table(tmp_path / "run" / "predictions.parquet").to_pylist()
    assert [row["target"] for row in predicted] == [None] * 10
    assert [row["file"] for row in predicted] == sorted(str(path) for path in (images / "train" / "dark").iterdir())
    assert sum(row["label"] == "dark" for row in predicted) >= 8


def test_an_image_that_can_not_be_read_loses_no_predictions(trained, images, tmp_path, monkeypatch):
    """It has a row without one; and what was predicted before something else goes wrong can be read."""
    config, run = trained
    shutil.copytree(images / "train" / "dark", tmp_path / "dark")
    (tmp_path / "dark" / "3.png").write_bytes(b"no image")
    command = ["predict", "--config", str(config), "--ckpt_path", str(checkpoint_of(run, 40))]
    command += ["--data.predict_source", str(tmp_path / "dark")]
    with pytest.warns(UserWarning, match=r"3\.png: can't be read as an image: .*its row has no prediction"):
        main([*command, "--run_dir", str(tmp_path / "run")])
    predicted = read_table(tmp_path / "run" / "predictions.parquet").to_pylist()
    assert [row["file"][-5:] for row in predicted] == [f"{i}.png" for i in range(10)]
    unreadable = predicted.pop(3)
    assert [unreadable[name] for name in ("target", "label", "top5", "probabilities")] == [None] * 4
    assert all(row["label"] and len(row["top5"]) == len(row["probabilities"]) == 3 for row in predicted)

    def predict_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise RuntimeError("the device is gone")
        return step(self, batch, batch_idx)

    step = VisionModule.predict_step
    monkeypatch.setattr(VisionModule, "predict_step", predict_step)
    with pytest.raises(RuntimeError, match="the device is gone"):
        main([*command, "--run_dir", str(tmp_path / "stopped")])
    assert read_table(tmp_path / "stopped" / "predictions.parquet").to_pylist() == [*predicted[:3], unreadable]


def test_grey_images_are_trained_on(images, tmp_path):
    config = write_vision(tmp_path, images, in_channels=1)
    grey = ["--model.config.in_channels=1", "--checkpoint.every_n_train_steps=20"]
    main(fit(config, tmp_path / "run", *grey, "--trainer.max_steps=40", "--trainer.val_check_interval=20"))
    assert rows(tmp_path / "run", "val/top1")[-1][1] > 0.8
    saved = torch.load(checkpoint_of(tmp_path / "run", 40), weights_only=True)
    assert saved["state_dict"]["model.patch_embed.proj.weight"].shape[1] == 1
    main(fit(config, tmp_path / "timm", *grey, "--model.timm_model=test_vit", "--trainer.max_steps=2"))
    assert len(rows(tmp_path / "timm", "train/loss")) == 2


def test_the_batch_size_rule(images, tmp_path):
    """4 images x 2 batches a step, of the 256 that the rate is meant for."""
    config = write_vision(tmp_path, images)
    rule = ["--model.optim.lr_batch=256", "--model.optim.schedule=constant", "--model.optim.lr=0.1"]
    main(fit(config, tmp_path / "run", *rule, "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=4"))
    assert rows(tmp_path / "run", "train/lr")[-1][1] == pytest.approx(0.1 * 8 / 256)


def test_a_file_grows_and_trains_on(trained, images, tmp_path):
    config, run = trained
    main(["grow", str(checkpoint_of(run, 3)), "--factor", "2", "--out", str(tmp_path / "grown.ckpt")])
    grown = VisionModule.load_from_checkpoint(tmp_path / "grown.ckpt").model
    before = VisionModule.load_from_checkpoint(checkpoint_of(run, 3)).model
    probe = torch.randn(2, 3, 16, 16)
    assert grown.num_params() > before.num_params()
    assert torch.allclose(grown.eval()(probe), before.eval()(probe), atol=1e-6)
    config = write_vision(tmp_path, images)
    main(fit(config, tmp_path / "run", resume=tmp_path / "grown.ckpt"))
    assert rows(tmp_path / "run", "train/loss")[0][0] == 3


@pytest.mark.parametrize(("kind", "config"), [(VisionModule, ViTConfig), (LanguageModule, LMConfig)])
def test_recompute_scores_reaches_every_layer(kind, config):
    for on in (True, False):
        module = kind(config(depth=2, dim=32, num_heads=2), OptimConfig(), recompute_scores=on)
        module.configure_model()
        layers = pattention_layers(module.model).values()
        assert len(layers) == 10
        assert all(layer.recompute_scores == on for layer in layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.timm_model=vit_bsae_patch16"], "timm has no such model"),
        (["--model.timm_model=test_vit", "--model.timm_args={foo: 1}"], "foo"),
        (["--data.image_size=20"], "data.image_size=20 is not a whole number of patches"),
        (["--model.label_smoothing=1.5"], "label_smoothing=1.5"),
        (["--model.timm_model=test_vit", "--model.recompute_scores=true"], "test_vit has no scores"),
        (["--model.config.in_channels=1"], "model.config.in_channels=1: data.in_channels=3; set both"),
        (["--model.timm_model=test_vit", "--data.image_size=32"], "set both"),
        (["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"], "val_check_interval=3"),
        (["--trainer.reload_dataloaders_every_n_epochs=1"], "same samples"),
    ],
)
def test_what_is_refused(images, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main(fit(write_vision(tmp_path, images), tmp_path / "run", *options))


def test_a_training_does_not_go_on_at_another_image_size(trained, tmp_path):
    """Nor with other classes. Evaluation does."""
    config, run = trained
    resume = ["--ckpt_path", str(checkpoint_of(run, 3)), "--data.image_size=24"]
    with pytest.raises(ValueError, match="model.config .image_size: 16 then, 24 now"):
        main(fit(config, tmp_path / "run", "--model.config.image_size=24", *resume))
    main(["validate", "--config", str(config), *resume, "--run_dir", str(tmp_path / "larger")])
    (row,) = csv.DictReader((tmp_path / "larger" / "results.csv").open())
    assert (row["img_size"], row["count"]) == ("24", "23")


def test_other_classes_are_refused(trained, images, tmp_path):
    config, run = trained
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "val").mkdir()  # which is all that an evaluation needs
    for name, new in (("bright", "bright"), ("dark", "dusk"), ("grey", "grey")):
        (tmp_path / "renamed" / "val" / new).symlink_to(images / "val" / name)
    command = ["validate", "--config", str(config), "--ckpt_path", str(checkpoint_of(run, 3))]
    with pytest.raises(ValueError, match="number 1: 'dark' in the checkpoint, 'dusk' in the data"):
        main([*command, "--data.source", str(tmp_path / "renamed"), "--run_dir", str(tmp_path / "a")])
    (tmp_path / "renamed" / "val" / "dusk").rename(tmp_path / "renamed" / "val" / "dark")
    main([*command, "--data.source", str(tmp_path / "renamed"), "--run_dir", str(tmp_path / "b")])
    with pytest.raises(ValueError, match="has no folder train/"):
        main(fit(config, tmp_path / "c", "--data.source", str(tmp_path / "renamed")))


SIXTY = ["--trainer.max_steps=60", "--trainer.val_check_interval=20", "--checkpoint.every_n_train_steps=10"]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """(config, run, folder) of a run of an older version, which sorted the classes 0, 1, 10, 2 as strings."""
    folder = tmp_path_factory.mktemp("numbered")
    for number, name in enumerate(("0", "1", "10", "2")):
        for split, count in (("train", 6), ("val", 3)):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                color = [60 * number + 5 * i, 200 - 50 * number, 100]
                Image.new("RGB", (16, 16), tuple(color)).save(folder / "data" / split / name / f"{i}.png")
    config = write_vision(folder, folder / "data")
    with pytest.MonkeyPatch.context() as then:
        then.setattr("datamodules.image_sources.naturally", lambda name: name)
        main(fit(config, folder / "run", *SIXTY))
    return config, folder / "run", folder / "data"


def test_a_model_of_an_older_version_keeps_the_order_of_its_classes(numbered, tmp_path, caplog):
    """Resumed to the same bits, evaluated to the same accuracy, exported with its classes."""
    config, run, _ = numbered
    assert rows(run, "val/top1")[-1][1] > 0.8
    main(fit(config, tmp_path / "run", *SIXTY, resume=checkpoint_of(run, 50)))
    assert "the classes are in the order of the checkpoint" in caplog.text
    assert difference(run, tmp_path / "run", 60) == 0
    assert rows(tmp_path / "run", "val/top1")[-1] == rows(run, "val/top1")[-1]
    command = ["--config", str(config), "--ckpt_path", str(checkpoint_of(run, 60))]
    main(["validate", *command, "--run_dir", str(tmp_path / "validated")])
    (row,) = csv.DictReader((tmp_path / "validated" / "results.csv").open())
    assert float(row["top1"]) == pytest.approx(100 * rows(run, "val/top1")[-1][1], abs=1e-3)
    main(["predict", *command, "--run_dir", str(tmp_path / "predicted")])
    predicted = read_table(tmp_path / "predicted" / "predictions.parquet").to_pylist()
    assert sum(image["label"] == image["target"] for image in predicted) >= 0.8 * len(predicted)
    assert all(image["target"] == image["file"].split("/")[-2] for image in predicted)


def test_timm_evaluates_an_export_by_its_class_map(numbered, tmp_path):
    config, run, data = numbered
    main(["export", str(checkpoint_of(run, 60)), "--out", str(tmp_path / "model")])
    classes = tmp_path / "model" / "class_map.txt"
    assert classes.read_text() == "0\n1\n10\n2\n"
    model = from_pretrained(tmp_path / "model")
    top1, *_ = evaluated_as_timm_does(model, data, 16, 0.875, class_map=str(classes))
    assert top1 == pytest.approx(100 * rows(run, "val/top1")[-1][1], abs=1e-3)
    assert evaluated_as_timm_does(model, data, 16, 0.875)[0] < top1  # timm's own order is another one
    start = ["--model.init_from", str(tmp_path / "model")]
    main(["validate", "--config", str(config), *start, "--run_dir", str(tmp_path / "validated")])
    (row,) = csv.DictReader((tmp_path / "validated" / "results.csv").open())
    assert float(row["top1"]) == pytest.approx(top1, abs=1e-3)
    classes.unlink()
    written = tmp_path / "model" / "config.json"
    saved = json.loads(written.read_text())
    assert saved["pretrained_cfg"].pop("label_names") == ["0", "1", "10", "2"]
    written.write_text(json.dumps(saved))
    with pytest.warns(
        UserWarning, match="has no class_map.txt, so its classes are taken to be in the order of the data"
    ):
        main(["validate", "--config", str(config), *start, "--run_dir", str(tmp_path / "unknown")])


def test_some_classes_are_told_apart_as_timm_does(trained, images, tmp_path, caplog):
    """timm's validate.py --valid-labels, by which it evaluates ImageNet-A and -R; here under other names too."""
    config, run = trained
    (tmp_path / "some" / "val").mkdir(parents=True)
    for name, new in (("dark", "n2"), ("bright", "n1")):
        (tmp_path / "some" / "val" / new).symlink_to(images / "val" / name)
    (tmp_path / "classes.txt").write_text("bright\tn1\ndark\tn2\ngrey\tn3\n")
    command = ["validate", "--config", str(config), "--ckpt_path", str(checkpoint_of(run, 3))]
    command += ["--data.source", str(tmp_path / "some"), "--data.class_map", str(tmp_path / "classes.txt")]
    main([*command, "--run_dir", str(tmp_path / "run")])
    (row,) = csv.DictReader((tmp_path / "run" / "results.csv").open())
    model = VisionModule.load_from_checkpoint(checkpoint_of(run, 3)).model.eval()
    top1, _, loss, _ = evaluated_as_timm_does(lambda x: model(x)[:, [0, 1]], tmp_path / "some", 16, 0.875)
    assert (float(row["top1"]), row["count"]) == (pytest.approx(top1, abs=1e-3), "16")
    assert rows(tmp_path / "run", "val/loss")[-1][1] == pytest.approx(loss, rel=1e-4)
    assert "2 of 3 classes have images: the others are ruled out" in caplog.text
    (tmp_path / "some" / "train").symlink_to(images / "train")  # while training too, of weights beside their average
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", f"--data.source={tmp_path / 'some'}"]
    options += [f"--data.class_map={tmp_path / 'classes.txt'}"]
    average = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.01", "--trainer.callbacks.warmup=false"]
    main(fit(write_vision(tmp_path, images), tmp_path / "fit", *options, *average))
    (loss,), (raw,) = (rows(tmp_path / "fit", name) for name in ("val/loss", "val/raw_loss"))
    assert raw == pytest.approx(loss, abs=1e-2)


def test_unreadable_images_are_counted_in_the_log(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    broken = tmp_path / "images" / "train" / "dark" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    config = write_vision(tmp_path, tmp_path / "images", skip_unreadable=True)
    with pytest.warns(UserWarning, match="3.png"):
        main(fit(config, tmp_path / "run"))  # 32 of 30 images
    assert rows(tmp_path / "run", "train/unreadable")[-1][1] == 1
    with pytest.raises(ValueError, match="3.png"):
        main(fit(config, tmp_path / "strict", "--data.skip_unreadable=false"))


def test_growth_at_a_loss_of_zero_is_no_change(trained, images, tmp_path, monkeypatch):
    monkeypatch.setattr(VisionModule, "probe_loss", lambda self, batch: torch.zeros(()))
    main(fit(write_vision(tmp_path, images, [GROW_ONCE]), tmp_path / "run"))
    (row,) = csv.DictReader((tmp_path / "run" / "growth.csv").open())
    assert float(row["loss_after"]) == 0


def test_a_timm_model_does_not_grow(images, tmp_path):
    with pytest.raises(ValueError, match="no Pattention"):
        main(fit(write_vision(tmp_path, images, [GROW_ONCE]), tmp_path / "run", "--model.timm_model=test_vit"))
