"""Jobs on a real Slurm cluster of two nodes, which this machine pretends to be."""

import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from lit_modules.cli import main
from tests.conftest import ROOT
from tests.integration.growing import config_of, contents, difference, fit, logged
from tests.integration.slurm_cluster import Cluster, missing

PRECISE = "--trainer.precision=64-true"
pytestmark = pytest.mark.timeout(900)  # a job starts processes on two nodes, and a test has up to four jobs


@pytest.fixture(scope="module")
def cluster():
    if reason := missing():
        pytest.skip(f"needs Slurm: {reason}")
    # Not pytest's own folder, which only its user may enter.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="slurm-") as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)
        cluster = Cluster(Path(folder))
        for name in os.environ.keys() - cluster.env.keys():
            patch.delenv(name)
        for name, value in (cluster.env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        cluster.env = dict(os.environ)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def submit(capsys, config, run, *options):
    """The job's id."""
    main(["submit", "--config", str(config), "--time", "5", "--run_dir", str(run), *options])
    return re.search(r"job (\d+), run folder", capsys.readouterr().out)[1]


def hold(step):
    return ["--trainer.callbacks+=tests.integration.signalling.Hold", f"--trainer.callbacks.step={step}"]


def wait_for(file, logs):
    end = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < end, "\n".join(log.read_text()[-3000:] for log in logs.glob("*.log"))
        time.sleep(0.1)


def test_two_nodes_equal_one_machine_and_a_preempted_job_an_undisturbed_one(cluster, corpus, tmp_path, capsys):
    """Both grow at steps 6 and 10 of 14; the second one is preempted at 8, with an accumulated gradient to be lost."""
    config = config_of(tmp_path, corpus, trainer={"accumulate_grad_batches": 2})
    options = ["--trainer.strategy=ddp", PRECISE, "--data.batch_size=2"]
    request = ["--nodes", "2", "--tasks-per-node", "1", "--"]
    whole, preempted, one = (tmp_path / name for name in ("whole", "preempted", "one"))
    first = submit(capsys, config, whole, *request, *options)
    second = submit(capsys, config, preempted, *request, *options, *hold(8))
    # Meanwhile, the same global batches in one process.
    main([*fit(config, one), PRECISE, "--data.batch_size=4"])
    assert cluster.wait(first)["JobState"] == "COMPLETED", (whole / "logs/task-0.log").read_text()[-3000:]
    assert difference(whole, one) < 1e-9
    assert (whole / "growth.csv").read_text().count("\n") == 3
    assert yaml.safe_load((whole / "config.yaml").read_text())["trainer"]["num_nodes"] == 2

    for rank in range(2):
        wait_for(preempted / f"held-{rank}", preempted / "logs")
    cluster.run("scancel", "--signal=USR1", second)
    job = cluster.wait(second)
    log = (preempted / "logs/task-0.log").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log[-3000:]
    # All stop two steps later, where a validation is due, and before the growth of that step.
    assert re.findall(r"SIGUSR1: saved and stopped after step (\d+)|(grown at step \d+)", log) == [
        ("", "grown at step 6"),
        ("10", ""),
        ("", "grown at step 10"),
    ]
    assert not (preempted / "requeue").exists()
    assert difference(preempted, whole) == 0
    assert logged(preempted) == logged(whole)
    assert {path.name for path in (preempted / "logs").iterdir()} == {"job.log", "task-0.log", "task-1.log"}
    assert re.search(r"^torch==\d", (preempted / "versions.txt").read_text(), re.M)


def test_an_array_has_a_folder_and_a_seed_for_each_task_and_sigterm_ends_one(cluster, corpus, tmp_path, capsys):
    config = config_of(tmp_path, corpus, trainer={"log_every_n_steps": 1})
    saves = ["--checkpoint.every_n_train_steps=100", "--checkpoint.save_top_k=1", "--data.num_workers=1"]
    job = submit(capsys, config, tmp_path / "run", "--array", "0-1", "--", *saves, *hold(3))
    runs = [tmp_path / "run" / index for index in "01"]
    for run in runs:
        wait_for(run / "held-0", run / "logs")
    cluster.run("scancel", "--signal=TERM", f"{job}_0")
    ended = cluster.wait(f"{job}_0")
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "143:0")
    # At step 4 a validation is due; it comes first.
    assert [path.name for path in (runs[0] / "checkpoints").glob("step-*")] == ["step-00000004.ckpt"]
    assert [step for step, _ in logged(runs[0])["val/loss"]] == [3]
    cluster.run("scancel", "--signal=USR1", f"{job}_1")
    ended = cluster.wait(f"{job}_1")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert cluster.job(f"{job}_0")["Restarts"] == "0"  # the array itself was not requeued
    assert contents(runs[1])
    assert [yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] for run in runs] == [0, 1]


def test_a_wrong_number_of_tasks_and_a_missing_srun_are_errors(cluster, corpus, tmp_path):
    config = config_of(tmp_path, corpus)
    command = shlex.join(
        [sys.executable, "-m", "lit_modules.cli", *fit(config, tmp_path / "run", "--trainer.devices=2")]
    )
    script = f"#!/bin/bash\n{command} 2> {tmp_path}/batch.log\nsrun --ntasks=1 --output={tmp_path}/task.log {command}\n"
    job = cluster.wait(cluster.sbatch(script, "--nodes=1", "--ntasks-per-node=2"))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "1:0")
    assert "has 2 tasks, but the command was started without srun" in (tmp_path / "batch.log").read_text()
    # Which Lightning would let pass, and train on one device.
    message = (
        "srun has started 1 tasks on 1 nodes .* trainer.num_nodes=1 x trainer.devices=2: set --nodes=1 and --ntasks"
    )
    assert re.search(message, (tmp_path / "task.log").read_text())
    assert not (tmp_path / "run").exists()
