"""The command line on images: what a training writes, that it resumes and grows exactly, what it refuses."""

import csv
import shutil

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_modules.cli import main
from lit_modules.modules.language import LanguageModule
from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from tests.integration.growing import checkpoint_of, difference, fit, saving
from tests.integration.tiny import GROW_ONCE, rows, write_vision
from tokenformer import LMConfig, ViTConfig
from tokenformer.growth import pattention_layers


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
        main(fit(config, run, *options, *saving(every=8), resume=checkpoint_of(tmp_path / "whole", step)))
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


def test_mistakes_are_drawn(images, tmp_path):
    config = write_vision(tmp_path, images)
    main(fit(config, tmp_path / "run", "--trainer.max_steps=2", "--trainer.val_check_interval=1"))
    assert rows(tmp_path / "run", "val/top1")[-1][1] < 1
    picture = Image.open(tmp_path / "run" / "mistakes.png")
    assert len(picture.convert("L").getcolors()) > 50
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"train/batch", "val/mistakes"} <= set(events.Tags()["images"])


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
