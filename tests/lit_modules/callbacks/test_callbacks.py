"""Callbacks by themselves: the average, the speed, the log, the progress bar."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_modules.callbacks import EMA, GrowParameterTokens, Throughput
from lit_modules.growth.stages import check_room
from lit_modules.modules.vision import VisionModule
from lit_modules.optim.config import OptimConfig
from lit_modules.optim.schedule import LearningRate
from lit_modules.runs.logs import ResumableCSVLogger
from tokenformer import ViTConfig
from tokenformer.hardware import peak_flops


class Counter(LightningModule):
    """One weight that is 0, 1, 2, ... after the steps."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def configure_model(self):
        pass

    def training_step(self, batch, batch_idx):
        return -self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_formula(tmp_path, warmup):
    ema = EMA(decay=0.9, warmup=warmup)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = Counter()
    Trainer(max_steps=20, callbacks=[ema], accelerator="cpu", enable_model_summary=False, **options).fit(
        module, DataLoader(list(range(20)))
    )
    average = 1.0  # after the first step it is the weight
    for step in range(2, 21):
        decay = min(0.9, step / (step + 9)) if warmup else 0.9  # step - 1 were averaged before
        average = decay * average + (1 - decay) * step
    assert module.weight.item() == pytest.approx(average, rel=1e-6)
    assert ema._average_model.n_averaged.device.type == "cpu"


def test_ema_decay_must_be_below_one():
    with pytest.raises(ValueError, match="decay=1.0"):
        EMA(decay=1.0)


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16-mixed", 989e12),
        ("NVIDIA H100 PCIe", "bf16-true", 756e12),
        ("NVIDIA H100 80GB HBM3", "16-mixed", 989e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", None),  # TF32 is off by default
        ("NVIDIA RTX A1000", "bf16-mixed", None),
        ("NVIDIA L40", "bf16-mixed", None),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA L4", "bf16-mixed", 121e12),
        ("NVIDIA H200", "64-true", None),
        ("cpu", "bf16-mixed", None),
        ("Some New GPU", "bf16-mixed", None),
    ],
)
def test_peak_rates(device, precision, expected):
    assert peak_flops(device, precision) == expected


def test_tf32_has_a_peak_when_it_is_on():
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops("NVIDIA A100-SXM4-80GB", "32-true") == 156e12
    finally:
        torch.set_float32_matmul_precision("highest")


def test_speed_counts_waiting_for_data_and_not_validation_or_saving(monkeypatch):
    """A step of 4 x 25 tokens: 1 s for its batch, 2 s of work. After the first, 50 s of validation, 7 s of saving."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lit_modules.callbacks.throughput.time.perf_counter", lambda: clock.now)
    logged = []
    module = SimpleNamespace(
        device=torch.device("cpu"),
        training_flops=lambda batch: 5 * batch[0].numel(),
        num_tokens=lambda batch: batch[0].numel(),
        samples="images",
        log_dict=logged.append,
        growths=[],
    )
    loader = SimpleNamespace(waited=0.5)  # before the training began
    trainer = SimpleNamespace(
        global_step=0,
        distributed_sampler_kwargs={"rank": 1, "num_replicas": 2},
        world_size=2,
        log_every_n_steps=2,
        precision="32-true",
        train_dataloader=loader,
    )
    speed = Throughput()
    speed.on_train_start(trainer, module)
    for step in range(4):
        clock.now += 1
        loader.waited += 1
        speed.on_train_batch_start(trainer)
        clock.now += 2
        trainer.global_step += 1
        speed.on_train_batch_end(trainer, module, None, (torch.zeros(4, 25), None), step)
        if step == 0:
            speed.on_validation_start(trainer)
            clock.now += 50
            speed.on_save_checkpoint(trainer)
            clock.now += 7
    # 2 steps of 200 tokens in 6 s; the pause ends where the next batch is waited for
    assert [row["train/tokens_per_second"] for row in logged] == pytest.approx([400 / 6, 400 / 6])
    assert [row["train/images_per_second"] for row in logged] == pytest.approx([16 / 6, 16 / 6])
    assert [row["train/images"] for row in logged] == [16, 32]
    assert [row["train/data_wait"] for row in logged] == pytest.approx([2 / 6, 2 / 6])
    assert [row["train/flops"] for row in logged] == [2000, 4000]
    assert [row["train/seconds"] for row in logged] == [6, 12]


def test_growth_is_not_training_time(monkeypatch):
    """It happens within an interval, or in the pause after a validation, which is left out already."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("lit_modules.callbacks.throughput.time.perf_counter", lambda: clock.now)
    logged = []
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=logged.append, growths=[], samples="sequences")
    module.training_flops, module.num_tokens = lambda batch: 1, lambda batch: 100
    trainer = SimpleNamespace(
        global_step=0,
        distributed_sampler_kwargs=None,
        world_size=1,
        log_every_n_steps=1,
        precision="32-true",
        train_dataloader=None,
    )
    speed = Throughput()
    speed.on_train_start(trainer, module)
    for step, validated in enumerate((False, True)):
        if validated:
            speed.on_validation_start(trainer)
        clock.now += 30
        speed.exclude(30)
        speed.on_train_batch_start(trainer)
        clock.now += 2
        trainer.global_step += 1
        speed.on_train_batch_end(trainer, module, None, (torch.zeros(1, 100), None), step)
        module.growths = [{"tokens": 100, "flops": 1}]
    assert [row["train/seconds"] for row in logged] == [2, 4]
    assert [row["train/stage"] for row in logged] == [0, 1]
    assert [row["train/stage_tokens"] for row in logged] == [100, 100]
    assert [row["train/stage_flops"] for row in logged] == [1, 1]


@pytest.mark.parametrize(("mode", "validations_since"), [("max", 0), ("min", 2)])
def test_an_accuracy_that_rises_is_no_plateau(mode, validations_since):
    stage = {"on_plateau": {"monitor": "val/top1", "mode": mode, "patience": 9}, "factor": 2.0}
    growth = GrowParameterTokens([stage])
    module = VisionModule(ViTConfig(num_classes=10), OptimConfig())
    for accuracy in (0.1, 0.2, 0.3):
        metrics = {"val/top1": torch.tensor(accuracy)}
        growth.on_validation_end(SimpleNamespace(callback_metrics=metrics, sanity_checking=False), module)
    assert growth.state_dict()["bad"] == validations_since


def log_steps(folder, steps, **extra):
    logger = ResumableCSVLogger(str(folder))
    for step in steps:
        logger.log_metrics({"loss": float(step), **extra}, step)
    logger.save()


def test_csv_log_goes_on_and_replaces_what_was_lost(tmp_path):
    log_steps(tmp_path, range(5))
    log_steps(tmp_path, range(3, 7), accuracy=1.0)  # killed after step 4, resumed after step 2
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [(step, float(step)) for step in range(7)]
    assert [row["accuracy"] for row in rows] == ["", "", "", "1.0", "1.0", "1.0", "1.0"]


def test_a_growth_in_the_middle_of_a_phase_has_room_for_its_warm_up():
    """The schedule begins anew with the next phase, whatever the growth wants."""
    rate = LearningRate(OptimConfig(warmup_steps=200))
    check_room([250], 600, rate, True, 0)
    rate.restarts = [0, 300]
    with pytest.raises(ValueError, match="warmup_steps=200 don't fit into steps 250 to 300"):
        check_room([250], 600, rate, True, 0)


def test_processes_grow_together_where_their_batches_differ_in_length():
    """By what the first has counted: one that grew alone would wait for the others for ever."""
    callback, counter = GrowParameterTokens(stages=[{"at_tokens": 100, "factor": 2.0}]), Throughput()
    counter.tokens = 90
    first = SimpleNamespace(broadcast=lambda due: True)
    trainer = SimpleNamespace(callbacks=[counter], strategy=first, datamodule=object())
    for per_batch, due in ((None, True), (64, False)):
        module = SimpleNamespace(tokens_per_batch=lambda data, per_batch=per_batch: per_batch)
        assert callback._is_due(callback.stages[0], trainer, module) is due
