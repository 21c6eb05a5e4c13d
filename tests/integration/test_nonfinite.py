"""A step whose loss or gradients are not finite leaves no trace in weights, optimizer and average, on any rank."""

from itertools import pairwise

import pytest
import torch
import yaml

from lit_modules.cli import main
from lit_modules.runs.errors import RunError
from tests.integration.growing import contents, difference
from tests.integration.processes import run_in_processes
from tests.integration.tiny import rows, write_config

HARM = "--trainer.callbacks+=tests.integration.kill.NotFinite"
STEPS = 8


@pytest.fixture
def command(corpus, tmp_path):
    """A run with an average that accumulates two batches and saves after every step."""
    trainer = {"max_steps": STEPS, "log_every_n_steps": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    path = write_config(tmp_path, corpus, trainer=trainer)
    config = yaml.safe_load(path.read_text()) | {"checkpoint": {"every_n_train_steps": 1, "save_top_k": -1}}
    config["trainer"]["callbacks"] = [{"class_path": "EMA", "init_args": {"decay": 0.9, "warmup": False}}]
    path.write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(path), "--data.batch_size=2"]


def assert_left_out(run, step):
    """The checkpoints before and after a step are the same in every bit; those after its neighbours are not."""
    saved = [contents(run, i) for i in range(step - 1, step + 3)]
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(saved)]
    assert changed == [True, False, True]
    assert all(tensor.isfinite().all() for tensor in saved[-1].values())
    assert any(name.startswith("current") for name in saved[0])
    assert any(name.endswith("exp_avg") for name in saved[0])


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("what", "device", "precision", "optimizer"),
    [
        ("loss", "cpu", "32-true", "adamw"),
        ("gradients", "cpu", "bf16-mixed", "muon"),
        pytest.param("loss", "gpu", "16-mixed", "muon", marks=NEEDS_GPU),
        pytest.param("gradients", "gpu", "32-true", "adamw", marks=NEEDS_GPU),
    ],
)
def test_a_step_that_is_not_finite_is_left_out(command, tmp_path, what, device, precision, optimizer):
    command = [*command, f"--model.optim.name={optimizer}"]
    harm = [HARM, "--trainer.callbacks.step=3", f"--trainer.callbacks.what={what}"]
    command = [*command, f"--trainer.accelerator={device}", f"--trainer.precision={precision}"]
    with pytest.warns(UserWarning, match="step 3 are not finite: it is skipped"):
        main([*command, *harm, "--nonfinite.skip=1", "--run_dir", str(tmp_path / "run")])
    assert_left_out(tmp_path / "run", 3)
    assert [step for step, _ in rows(tmp_path / "run", "train/lr")] == list(range(STEPS))
    checkpoint = tmp_path / "run/checkpoints/step-00000004.ckpt"  # right after it
    main([*command, *harm, "--nonfinite.skip=1", "--run_dir", str(tmp_path / "on"), "--ckpt_path", str(checkpoint)])
    assert difference(tmp_path / "run", tmp_path / "on", STEPS) == 0


def test_a_run_stops_at_more_of_them_than_allowed_and_shows_the_batches(command, tmp_path):
    run = tmp_path / "run"
    harm = [HARM, "--trainer.callbacks.step=3", "--trainer.callbacks.steps=2"]
    with pytest.raises(RunError, match=r"step 3 are not finite, of 1 in a row \(losses.*inf\).*nonfinite.skip=N"):
        main([*command, *harm, "--run_dir", str(run)])
    found = torch.load(run / "nonfinite-step-00000003-rank-0.pt", weights_only=True)
    assert found["step"] == 3
    assert [torch.tensor(loss).isfinite().item() for loss in found["losses"]] == [True, False]
    assert [batch[0].shape for batch in found["batches"]] == [(2, 32)] * 2
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-00000003.ckpt"  # the step is to come
    with pytest.raises(RunError, match=r"step 4 are not finite, of 2 in a row"):  # none between the two is forgotten
        main([*command, *harm, "--nonfinite.skip=1", "--run_dir", str(run), "--ckpt_path=last"])
    with pytest.raises(RunError, match=r"step 4 are not finite, of 2 in a row"):  # not by a resume either
        main([*command, *harm, "--nonfinite.skip=1", "--run_dir", str(run), "--ckpt_path=last"])
    main([*command, *harm, "--nonfinite.skip=2", "--run_dir", str(run), "--ckpt_path=last"])


def test_all_ranks_leave_out_what_is_not_finite_on_one(command, tmp_path):
    cases = [("ddp", "loss", "adamw"), ("fsdp2", "gradients", "muon")]
    fits = []
    for strategy, what, optimizer in cases:
        run = ["--run_dir", tmp_path / strategy / what, "--nonfinite.skip=1", HARM, "--trainer.callbacks.step=3"]
        fits.append([*command, f"--trainer.strategy={strategy}", "--trainer.devices=2", *run])
        fits[-1] += [f"--trainer.callbacks.what={what}", f"--model.optim.name={optimizer}"]
    run_in_processes(fits)
    for strategy, what, _ in cases:
        assert_left_out(tmp_path / strategy / what, 3)
