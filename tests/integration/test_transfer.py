"""What is made of a trained image model: a linear probe, features, a student."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from pyarrow.parquet import read_table

from lit_modules.cli import main
from lit_modules.modules.vision import VisionModule
from tests.integration.growing import checkpoint_of, difference, fit
from tests.integration.tiny import GROW_ONCE, rows, write_vision
from tests.lit_modules.modules.tiny_module import CONFIG, INPUT, export_classifier
from tokenformer import TokenFormerViT, from_pretrained, save_pretrained


@pytest.fixture
def sharded(monkeypatch):
    """Options of FSDP2 on one device, in this process and on one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    strategy = ["--trainer.strategy.class_path=FSDP2", "--trainer.strategy.save_distributed_checkpoint=false"]
    yield [*strategy, "--trainer.devices=1"]
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_classifier(tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images, exported):
    """(options, run folder): a probe whose ffn grows tokens of its own, with an average and a teacher."""
    folder = tmp_path_factory.mktemp("probe")
    config = write_vision(folder, images, [GROW_ONCE, {"class_path": "EMA", "init_args": {"decay": 0.5}}])
    options = [
        f"--model.init_from={exported}",
        "--model.train=[head, '*.ffn.segments.1.*']",
        "--model.optim.weight_decay=0.5",
    ]
    options += [f"--model.distill.teacher={exported}", "--model.distill.kind=soft", "--model.distill.temperature=2.0"]
    modes, seen = {}, VisionModule.batch_loss

    def batch_loss(self, batch):
        if self.training:
            modes[self.trainer.global_step] = {name for name, part in self.model.named_modules() if part.training}
        return seen(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionModule, "batch_loss", batch_loss)
        main(fit(config, folder / "run", *options))
    return SimpleNamespace(config=config, options=options, run=folder / "run", modes=modes)


def test_nothing_but_what_is_named_is_trained(trained, exported):
    before = {f"model.{name}": tensor for name, tensor in from_pretrained(exported).state_dict().items()}
    saved = torch.load(checkpoint_of(trained.run, 8), weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys()  # nothing of the teacher's
    for state in (saved["state_dict"], saved["current_model_state"]):
        for name, tensor in before.items():
            assert torch.equal(state[name], tensor) != name.startswith("model.head."), name
    first = torch.load(checkpoint_of(trained.run, 1), weights_only=True)["current_model_state"]
    distance = (first["model.head.weight"] - before["model.head.weight"]).norm()
    assert distance > before["model.head.weight"].norm()  # it began as another one
    (group, _), (optimizer,) = saved["optimizer_states"][0]["param_groups"], saved["optimizer_states"]
    assert len(optimizer["state"]) == 2 + 2 * 2  # keys and values of two blocks
    new = next(name for name in group["param_names"] if "keys" in name)
    assert saved["current_model_state"][new].any()


def test_what_is_frozen_is_in_eval_mode_after_validation_and_growth_too(trained):
    assert list(trained.modes) == list(range(8))
    assert all(trained.modes[step] == {"head"} for step in range(6))
    grown = trained.modes[7]
    assert {"head", "backbone.blocks.1.ffn.segments.1"} <= grown
    assert not any("drop_path" in name or name.endswith(("segments.0", "proj.segments.1")) for name in grown)


@pytest.mark.parametrize("strategy", ["auto", "sharded"])
def test_a_probe_with_a_teacher_resumes_to_the_same_bits(trained, tmp_path, strategy, request):
    """In FSDP2 too, where what has grown and is frozen is given back after each pass."""
    options = [*trained.options, *(request.getfixturevalue("sharded") if strategy == "sharded" else [])]
    main(fit(trained.config, tmp_path / "run", *options, resume=checkpoint_of(trained.run, 5)))
    assert difference(trained.run, tmp_path / "run", 8) == 0
    for column in ("train/loss", "train/flops", "val/loss"):
        assert rows(tmp_path / "run", column) == [pair for pair in rows(trained.run, column) if pair[0] >= 5], column
    assert dict(rows(trained.run, "train/flops"))[0] == 3 * 4 * CONFIG.flops_per_image()  # the student's alone


@pytest.mark.parametrize("form", ["exported", "checkpoint", "sharded"])
def test_features_are_what_timm_gives_before_the_classifier(trained, exported, images, tmp_path, form, request):
    whole = form == "checkpoint"
    options = request.getfixturevalue("sharded") if form == "sharded" else []
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "1.png").symlink_to(images / "val" / "dark" / "1.png")
    (tmp_path / "some" / "2.png").write_bytes(b"no image")
    path = checkpoint_of(trained.run, 8) if whole else exported
    command = ["predict", str(path), f"--data.predict_source={tmp_path / 'some'}", "--model.predict_features=true"]
    with pytest.warns(UserWarning, match="its row has no prediction"):
        main([*command, *options, "--data.num_workers=0", f"--run_dir={tmp_path / 'run'}"])
    table = read_table(tmp_path / "run" / "predictions.parquet")
    assert str(table.schema.field("features").type) == "list<element: float>"
    read, unreadable = table.to_pylist()
    assert unreadable["features"] is None
    model = VisionModule.load_from_checkpoint(path).model.eval() if whole else from_pretrained(path)
    transform = timm.data.create_transform(16, interpolation="bicubic", crop_pct=0.875, **({} if whole else INPUT))
    pixels = transform(Image.open(images / "val" / "dark" / "1.png"))[None]
    with torch.no_grad():
        features = model.forward_head(model.forward_features(pixels), pre_logits=True)
        probabilities = model(pixels).softmax(dim=-1)
    assert read["features"] == pytest.approx(features[0].tolist(), abs=1e-5)
    assert read["probabilities"] == pytest.approx(sorted(probabilities[0].tolist(), reverse=True), abs=1e-6)


TWICE = "--trainer.callbacks.init_args.stages=[{at_step: 1, factor: 2.0}, {at_step: 2, factor: 2.0}]"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.train=head"], r"model.train=head freezes what growth adds: add '\*.segments.\[1-9\]\*'"),
        (["--model.train=[head, '*.segments.1.*']", TWICE], r"segments.1.\*'\] freezes what growth adds"),
        (["--model.distill.teacher=COARSE"], r"takes no images of the shape \(3, 16, 16\)"),
    ],
)
def test_what_is_refused_before_the_first_step(exported, images, tmp_path, options, message):
    save_pretrained(TokenFormerViT(replace(CONFIG, patch_size=32, image_size=32)), tmp_path / "COARSE")
    options = [option.replace("COARSE", f"{tmp_path}/COARSE") for option in options]
    config = write_vision(tmp_path, images, [GROW_ONCE])
    with pytest.raises(ValueError, match=message):
        main(fit(config, tmp_path / "run", f"--model.init_from={exported}", *options))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_new_classifier_is_not_evaluated(exported, images, tmp_path):
    command = ["validate", "--config", str(write_vision(tmp_path, images)), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(
        ValueError, match="model.train=head begins with a new one, its classifier would be a random one"
    ):
        main([*command, f"--model.init_from={exported}", "--model.train=head"])
