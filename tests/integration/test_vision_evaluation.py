"""Validation and prediction of images on the command line: the numbers are timm's, and so are the classes."""

import csv
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from pyarrow.parquet import read_table
from timm.data import create_dataset, create_loader
from timm.utils import AverageMeter, accuracy
from torch.nn import functional as F

from datamodules.images import ImageDataModule
from lit_modules.cli import main
from lit_modules.modules.vision import VisionModule
from tests.integration.growing import checkpoint_of, difference, fit
from tests.integration.tiny import rows, write_vision
from tokenformer import TokenFormerViT, from_pretrained


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
