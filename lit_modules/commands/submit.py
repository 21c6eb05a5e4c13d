"""Train as a Slurm job that requeues itself, and resumes at the exact batch, when it is preempted or out of time.

The config is checked here, overrides included, and against what is asked of Slurm: one task for each device. The run's
folder gets it as submitted.yaml, which the job reads; versions.txt with the packages that are installed; job.sh, the
script that is submitted; and the logs. A dry run prints the script and writes nothing.

  tokenformer submit --config configs/language/openwebtext-124m.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00
  tokenformer submit --config FILE --gpus-per-node 1 --time 2:00:00 --array 0-2 -- --model.optim.lr 3e-4
  tokenformer submit --config FILE --tasks-per-node 2 --time 60 --sbatch=--mem=16G --dry-run

An array trains the config once for each index, which is its seed, in folders of their own below the run's.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from string import Template
from typing import Any

from lit_modules.commands.experiment import ExperimentCLI, run
from lit_modules.commands.plan import num_devices
from lit_modules.commands.run_folder import experiment_folder, new_name

TEMPLATE = Path(__file__).parents[2] / "configs" / "slurm" / "job.sh"


class _Script(Template):
    delimiter = "@"  # "$" is the shell's


class ParsedCLI(ExperimentCLI):
    """Reads a config as `fit` does, and stops there."""

    def _set_seed(self) -> None:
        """No: nothing is run."""

    def before_instantiate_classes(self) -> None:
        """No."""

    def instantiate_classes(self) -> None:
        """No."""

    def _run_subcommand(self, subcommand: str) -> None:
        """No."""


def main(args: list[str]) -> None:
    """The command `tokenformer submit`; its `--help` is this file's docstring.

    Raises:
        ValueError: for a request that contradicts the config, and where there is no Slurm.
    """
    ours, overrides = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    requested = _parser().parse_args(ours)
    given = [part for file in requested.config for part in ("--config", file)] + overrides
    cli = run(["fit", *given], ParsedCLI)
    config = cli.config.fit
    tasks = requested.gpus_per_node or requested.tasks_per_node
    check_request(config.trainer, requested.nodes, tasks, requested.gpus_per_node)
    config.trainer.devices, config.trainer.num_nodes = tasks, requested.nodes
    config.name = config.name or Path(requested.config[0]).stem
    if config.run_dir or config.ckpt_path:
        raise ValueError(
            "run_dir and ckpt_path are the job's own: give --run_dir to submit (before `--`), no ckpt_path"
        )
    folder = requested.run_dir or experiment_folder(config, config.name) / new_name()
    if odd := set(str(folder)) & set("%\\'\""):
        raise ValueError(
            f"--run_dir {folder}: Slurm takes {' '.join(sorted(odd))} in the path of a log for its own signs"
        )
    script = job_script(requested, config.name, tasks, folder)
    if requested.dry_run:
        print(script, end="")
        return
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here: submit on a cluster's login node; --dry-run prints the script only")
    if folder.exists():
        raise ValueError(f"--run_dir {folder} exists: choose another, or resume it by sbatch {folder}/job.sh")
    try:
        (folder / "logs").mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--run_dir {folder}: can't be written to ({error.strerror})") from error
    (folder / "job.sh").write_text(script)
    header = "".join(f"# {line}\n" for line in f"tokenformer submit {shlex.join(args)}".splitlines())
    (folder / "submitted.yaml").write_text(header + cli._parser("fit").dump(config, skip_none=False))
    (folder / "versions.txt").write_text(versions())
    sent = subprocess.run(["sbatch", "--parsable", folder / "job.sh"], capture_output=True, text=True, check=False)
    if sent.returncode:
        raise ValueError(f"sbatch {folder}/job.sh: {sent.stderr.strip()}")
    print(f"job {sent.stdout.strip().split(';')[0]}, run folder {folder}")
    print(f"logs: {folder}/{'N/' * bool(requested.array)}logs/task-0.log, and those of the other tasks")


def check_request(trainer: Any, nodes: int, tasks: int, gpus: int) -> None:
    """Whether a job of this shape is what the config asks for.

    Args:
        trainer: the config's part; devices `auto` or 1 and num_nodes 1 are taken as not set.
        nodes: machines.
        tasks: of each of them, one for a device.
        gpus: of each of them.

    Raises:
        ValueError: if not: names both sides and what to change.
    """
    if nodes < 1 or tasks < 1:
        raise ValueError(f"--nodes {nodes}, {tasks} tasks a node: give at least 1 node and 1 --gpus-per-node")
    option = "--gpus-per-node" if gpus else "--tasks-per-node"
    if str(trainer.devices) not in ("auto", "1", "-1"):
        devices = num_devices(trainer.devices, 1)
        if devices != tasks:
            raise ValueError(
                f"{option} {tasks} contradicts trainer.devices={trainer.devices} of the config: ask for "
                f"{option} {devices}, or add `-- --trainer.devices {tasks}`"
            )
    if trainer.num_nodes not in (1, nodes):
        raise ValueError(
            f"--nodes {nodes} contradicts trainer.num_nodes={trainer.num_nodes} of the config: ask for "
            f"--nodes {trainer.num_nodes}, or add `-- --trainer.num_nodes {nodes}`"
        )
    strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
    if nodes * tasks > 1 and "single" in strategy.lower():
        raise ValueError(
            f"--nodes {nodes} x {option} {tasks} is several devices, trainer.strategy={strategy} is for one: "
            "add `-- --trainer.strategy ddp` (or fsdp2)"
        )
    group = getattr(trainer.strategy, "init_args", {}).get("tensor_parallel_size", 1)
    if nodes * tasks % group:
        raise ValueError(
            f"--nodes {nodes} x {option} {tasks} is {nodes * tasks} devices, which can't be divided into groups of "
            f"trainer.strategy.tensor_parallel_size={group}: ask for a multiple"
        )
    if gpus and trainer.accelerator == "cpu":
        raise ValueError(
            f"--gpus-per-node {gpus} with trainer.accelerator=cpu: add `-- --trainer.accelerator gpu`, or ask for "
            f"--tasks-per-node {gpus} instead"
        )
    if not gpus and trainer.accelerator in ("gpu", "cuda"):
        raise ValueError(f"trainer.accelerator={trainer.accelerator} without GPUs: ask for --gpus-per-node {tasks}")


def job_script(requested: argparse.Namespace, name: str, tasks: int, folder: Path) -> str:
    """The template, filled in.

    Raises:
        ValueError: for a value with a control character: a newline would end its line, and what follows be a command.
    """
    texts: dict[str, Any] = {"name": name, "run_dir": str(folder), "the working directory": str(Path.cwd())}
    texts |= {f"--{key}": value for key, value in vars(requested).items() if key not in ("config", "run_dir")}
    for key, given in texts.items():
        for text in given if isinstance(given, list) else [given]:
            if isinstance(text, str) and not text.isprintable():
                raise ValueError(f"{key}={text!r}: goes into the job's script and has a control character: drop it")
    options = {"gpus-per-node": requested.gpus_per_node or None}
    options |= {key: getattr(requested, key) for key in ("partition", "account", "array")}
    options["cpus-per-task"] = requested.cpus_per_task
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines += [f"#SBATCH {option}" for option in requested.sbatch]
    # Since Slurm 22.05 srun does not take this one over from sbatch.
    for_srun = [f"--cpus-per-task={requested.cpus_per_task}"] if requested.cpus_per_task else []
    command = [sys.executable, "-m", "lit_modules.cli"]
    if requested.container:
        gpus = ["--nv"] if requested.gpus_per_node else []
        command = ["apptainer", "exec", *gpus, "--bind", str(Path.cwd()), requested.container, "tokenformer"]
    values = {
        "name": shlex.quote(name),
        "nodes": requested.nodes,
        "tasks": tasks,
        "time": requested.time,
        "run": shlex.quote(str(folder)),
        "log": "job-%a.log" if requested.array else "job.log",
        "options": "\n".join(lines),
        "task": '"/$SLURM_ARRAY_TASK_ID"' if requested.array else "",
        "command": shlex.join(for_srun + command),
        "config": shlex.quote(str(folder / "submitted.yaml")),
        "overrides": '--seed_everything "$SLURM_ARRAY_TASK_ID"' if requested.array else "",
    }
    # Safe: what is no placeholder of ours stays, such as in USR1@120.
    script = _Script(TEMPLATE.read_text()).safe_substitute(values)
    return "".join(f"{line.rstrip()}\n" for line in script.splitlines())


def versions() -> str:
    """The installed packages, a line each."""
    return "".join(sorted({f"{d.metadata['Name']}=={d.version}\n" for d in distributions()}, key=str.lower))


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "tokenformer submit", description=__doc__, formatter_class=layout, allow_abbrev=False, epilog="-- KEY VALUE ..."
    )
    parser.add_argument("-c", "--config", action="append", required=True, metavar="FILE", help="as of fit; repeatable")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="of each; as many tasks (default: 0)")
    parser.add_argument("--tasks-per-node", type=int, default=1, help="without GPUs: processes of each (default: 1)")
    parser.add_argument("--cpus-per-task", type=int, help="threads and data workers need some (default: the cluster's)")
    parser.add_argument("--time", required=True, help="limit, DAYS-HOURS:MINUTES:SECONDS; then the run is requeued")
    parser.add_argument("--partition", help="where to run")
    parser.add_argument("--account", help="whom to charge")
    parser.add_argument("--array", metavar="0-2", help="a run for each index, which is its seed")
    parser.add_argument("--container", metavar="IMAGE", help="run in it by apptainer; it has tokenformer on its PATH")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other; repeatable")
    parser.add_argument(
        "--run_dir", type=Path, help="the run's folder, a new one (default: runs/NAME/DATE-TIME-RANDOM)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, write and submit nothing")
    return parser
