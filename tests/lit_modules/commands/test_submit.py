"""`tokenformer submit` and what a task checks when it starts; jobs on a real cluster: integration/test_slurm.py."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lit_modules.cli import main
from lit_modules.commands.submit import _parser, check_request, job_script
from lit_modules.runs import slurm
from tests.conftest import ROOT

CONFIG = ROOT / "configs/language/quickstart.yaml"
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
STEP |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_NAME": "bash"}


def script(capsys, *options, config=CONFIG):
    main(["submit", "--config", str(config), "--time", "1:00:00", "--run_dir", "some run", "--dry-run", *options])
    return capsys.readouterr().out


def test_a_dry_run_prints_a_script_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = ["--nodes", "2", "--gpus-per-node", "8", "--partition", "long", "--account", "us", "--cpus-per-task", "6"]
    text = script(capsys, *request, "--sbatch=--mem=64G", "--", "--trainer.accelerator=gpu")
    assert not list(tmp_path.iterdir())
    options = re.findall(r"^#SBATCH --(.*)", text, re.M)
    asked = {
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=1:00:00",
        "partition=long",
        "account=us",
        "mem=64G",
    }
    assert asked | {"signal=USR1@120", "requeue", "open-mode=append", "cpus-per-task=6"} <= set(options)
    assert not any("array" in option for option in options)
    assert "--kill-on-bad-exit=1" in text
    assert 'task-%t.log" \\\n    --cpus-per-task=6 ' in text
    assert "fit --config 'some run/submitted.yaml' --run_dir \"$run\" --ckpt_path auto\n" in text
    assert set(re.findall(r"@\w+", text)) == {"@120"}  # every placeholder is filled in
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_an_array_task_has_a_folder_and_a_seed(capsys):
    text = script(capsys, "--array", "0-2%1")
    assert "#SBATCH --array=0-2%1\n" in text
    assert "run='some run'\"/$SLURM_ARRAY_TASK_ID\"\n" in text
    assert text.split("fit ")[1].startswith("--config 'some run/submitted.yaml' --run_dir \"$run\"")
    assert '--seed_everything "$SLURM_ARRAY_TASK_ID"\n' in text


def test_a_container_is_apptainers(capsys):
    text = script(capsys, "--gpus-per-node", "1", "--container", "our image.sif", "--", "--trainer.accelerator=auto")
    assert f"apptainer exec --nv --bind {os.getcwd()} 'our image.sif' tokenformer fit" in text


def test_contradictions_are_named_with_the_fix():
    with pytest.raises(ValueError, match=r"--gpus-per-node 4 contradicts trainer.devices=8 .*-node 8, .*.devices 4"):
        main(["submit", "--config", str(CONFIG), "--time", "1", "--gpus-per-node=4", "--", "--trainer.devices=8"])
    right = {"devices": "auto", "num_nodes": 1, "strategy": "ddp", "accelerator": "auto"}
    for change, request, message in (
        (
            {"devices": [0, 1]},
            (1, 3, 0),
            r"--tasks-per-node 3 contradicts trainer.devices=\[0, 1\] .*--tasks-per-node 2",
        ),
        ({"num_nodes": 4}, (2, 1, 0), "--nodes 2 contradicts trainer.num_nodes=4 .*--nodes 4, or"),
        ({"strategy": "single_device"}, (2, 1, 0), "trainer.strategy=single_device is for one: .*strategy ddp"),
        ({"accelerator": "cpu"}, (1, 1, 1), "--trainer.accelerator gpu`, or .*--tasks-per-node 1"),
        ({"accelerator": "gpu"}, (1, 2, 0), "trainer.accelerator=gpu without GPUs: ask for --gpus-per-node 2"),
        ({}, (0, 1, 0), "--nodes 0, .* at least 1 node"),
    ):
        with pytest.raises(ValueError, match=message):
            check_request(SimpleNamespace(**right | change), *request)
    for agreed in ({}, {"devices": 8, "num_nodes": 2}, {"devices": -1}, {"devices": "1", "strategy": "fsdp2"}):
        check_request(SimpleNamespace(**right | agreed), 2, 8, 8)


@pytest.mark.parametrize("odd", ["100%j", "a'b", 'a"b', "a\\b"])
def test_a_folder_with_signs_of_slurm_in_its_name_is_refused(odd):
    """The job failed without a log (Slurm 22.05)."""
    with pytest.raises(ValueError, match="--run_dir .*: Slurm takes . in the path of a log"):
        main(["submit", "--config", str(CONFIG), "--time", "1", "--dry-run", "--run_dir", odd])


@pytest.mark.parametrize(
    "option", ["name", "run_dir", "partition", "account", "time", "array", "container", "sbatch", "root"]
)
def test_a_newline_gets_into_no_script(tmp_path, option):
    """In a stranger's YAML it ended a line of the script, and what followed was run."""
    odd = "x\ntouch PWNED\n"
    config = {"name": {"name": odd}, "root": {"trainer": {"default_root_dir": odd}}}.get(option, {})
    (tmp_path / "strange.yaml").write_text(yaml.safe_dump(config))
    given = ["--time", "1", "--config", str(CONFIG), "--config", str(tmp_path / "strange.yaml"), "--dry-run"]
    given += [f"--{option}={odd}"] if not config else []
    with pytest.raises(ValueError, match="goes into the job's script and has a control character"):
        main(["submit", *given])


@pytest.mark.parametrize("odd", ["\r", "\v", "\x85", "\u2028", "\x1b[2K", "\0"])
def test_nor_does_another_control_character(odd):
    asked = _parser().parse_args(["--config", "FILE", "--time", "1", f"--sbatch=--mem=1{odd}touch PWNED"])
    with pytest.raises(ValueError, match="--sbatch='--mem=1.*touch PWNED': goes into the job's script"):
        job_script(asked, "name", 1, Path("run"))


def test_an_override_with_a_newline_is_no_line_of_the_submitted_config(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    ours = ["--config", str(CONFIG), "--time=1", "--run_dir", str(tmp_path / "run")]
    main(["submit", *ours, "--", "--data.text_field", "some\n- column"])
    text = (tmp_path / "run/submitted.yaml").read_text()
    assert text.startswith("# tokenformer submit --config ")
    assert yaml.safe_load(text)["name"] == "quickstart"


@pytest.mark.parametrize("override", ["--run_dir=elsewhere", "--ckpt_path=last"])
def test_a_folder_or_checkpoint_among_the_overrides_is_not_ignored(override):
    with pytest.raises(ValueError, match="run_dir and ckpt_path are the job's own"):
        main(["submit", "--config", str(CONFIG), "--time", "1", "--dry-run", "--", override])


def test_devices_that_cant_be_divided_into_groups_are_refused():
    strategy = [f"--config={ROOT}/configs/strategy/fsdp2-tensor-parallel.yaml", "--time=1", "--dry-run"]
    with pytest.raises(ValueError, match="3 devices, which can't be divided into groups of .*tensor_parallel_size=2"):
        main(["submit", "--config", str(CONFIG), *strategy, "--nodes=3", "--gpus-per-node=1"])
    main(["submit", "--config", str(CONFIG), *strategy, "--nodes=3", "--gpus-per-node=2"])


def test_a_wrong_key_is_an_error_before_anything_is_submitted(capsys):
    with pytest.raises(SystemExit):
        main(["submit", "--config", str(CONFIG), "--time", "1", "--dry-run", "--", "--trainer.max_stepz=3"])
    assert "did you mean 'trainer.max_steps'" in capsys.readouterr().err


def test_without_slurm_a_dry_run_is_suggested(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no sbatch here.*--dry-run"):
        main(["submit", "--config", str(CONFIG), "--time", "1", "--run_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def environ(monkeypatch):
    """Nothing of Slurm or torchrun but what a test sets."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(("devices", "num_nodes"), [(2, 1), (4, 1), (1, 2), (4, 2), (2, 4), (None, 1)])
def test_tasks_that_are_not_one_a_device_are_refused(environ, devices, num_nodes):
    environ(STEP)
    with pytest.raises(ValueError, match=r"srun has started 4 tasks on 2 nodes \(tasks per node: 2\(x2\)\)"):
        slurm.check_tasks(devices, num_nodes)


def test_one_task_a_device_is_right_and_uneven_ones_are_not(environ):
    environ(STEP)
    slurm.check_tasks(2, 2)
    slurm.check_tasks(None, 2)
    environ({"SLURM_STEP_TASKS_PER_NODE": "3,1"})
    for devices in (2, None):
        with pytest.raises(ValueError, match="tasks per node: 3,1"):
            slurm.check_tasks(devices, 2)


def test_a_shell_on_a_node_is_no_task(environ):
    """In a job called bash Lightning would not see Slurm at all; with several tasks each would train on its own."""
    environ(STEP)
    assert slurm.started_by_srun()
    assert [type(plugin).__name__ for plugin in slurm.environment()] == ["SLURMEnvironment"]
    environ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1"})
    assert not slurm.started_by_srun()
    slurm.check_tasks(8, 1)
    assert [type(plugin).__name__ for plugin in slurm.environment()] == ["LightningEnvironment"]


def test_all_processes_of_a_launch_have_one_name(environ):
    assert slurm.launch_name() is None
    environ(STEP)
    names = {}
    for change in ({"SLURM_PROCID": "0"}, {"SLURM_PROCID": "3"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}):
        environ(change)
        names[str(change)] = slurm.launch_name()
    assert list(names.values()) == ["slurm-77.0", "slurm-77.0", "slurm-77.0", "slurm-77.1"]
    environ({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "2"})
    assert slurm.launch_name() == "slurm-70_2.1"
    environ({"TORCHELASTIC_RUN_ID": "abc"})
    assert slurm.launch_name() == "torchrun-abc"
    environ({"TORCHELASTIC_RUN_ID": "none"})
    with pytest.raises(ValueError, match="--standalone .* --rdzv-id NAME, or --run_dir"):
        slurm.launch_name()
