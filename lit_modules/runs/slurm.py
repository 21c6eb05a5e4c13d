"""What Slurm says of this process, and whether it is what the config asks for; the same name in all processes."""

import os

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment


def started_by_srun() -> bool:
    """Whether this process is a task that `srun` has started for the training.

    Not a shell on a node, in which commands are typed: it is a task too, the only one of a job called so. And not what
    `srun torchrun` has started.
    """
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 0))
    return "TORCHELASTIC_RUN_ID" not in env and (tasks > 1 or (tasks == 1 and not _is_interactive()))


def _is_interactive() -> bool:
    return os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")


def environment() -> list[LightningEnvironment | SLURMEnvironment]:
    """The plugin that tells Lightning where the processes come from; none outside of Slurm jobs, where it finds out."""
    if started_by_srun():
        return [SLURMEnvironment(auto_requeue=False)]
    in_job = "SLURM_JOB_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return [LightningEnvironment()] if in_job else []  # else it waits for tasks that nobody starts


def check_tasks(devices: int | None, num_nodes: int) -> None:
    """One task for each device, before anything waits for the missing ones or trains twice.

    Args:
        devices: of a node; None: as many as it has tasks.
        num_nodes: machines.

    Raises:
        ValueError: if not.
    """
    env = os.environ
    if not started_by_srun():
        tasks = int(env.get("SLURM_NTASKS", 1))
        if tasks > 1 and not ({"SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"} & env.keys()) and not _is_interactive():
            raise ValueError(
                f"this Slurm job has {tasks} tasks, but the command was started without srun and is one process: "
                "write `srun tokenformer ...` in the job's script"
            )
        return
    nodes, tasks = int(env["SLURM_STEP_NUM_NODES"]), int(env["SLURM_STEP_NUM_TASKS"])
    spread = env["SLURM_STEP_TASKS_PER_NODE"]  # such as 8(x2), or 3,1
    per_node = spread.split("(")[0]
    if devices is None and per_node.isdigit():
        devices = int(per_node)
    even = f"{devices}(x{num_nodes})" if num_nodes > 1 else str(devices)
    if spread != even:
        raise ValueError(
            f"srun has started {tasks} tasks on {nodes} nodes (tasks per node: {spread}), the config asks for "
            f"trainer.num_nodes={num_nodes} x trainer.devices={devices or 'auto'}: set --nodes={num_nodes} and "
            f"--ntasks-per-node={devices or 1} in the job's script, or change the config"
        )
    env.setdefault("SLURM_NTASKS_PER_NODE", per_node)  # Lightning wants to see that option, however it came about


def launch_name() -> str | None:
    """A name that all processes of this launch have, and no other launch; None where one process starts the others.

    A job that is requeued keeps it.

    Raises:
        ValueError: for torchrun without an id.
    """
    env = os.environ
    if started_by_srun():
        array = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_JOB_ID" in env else None
        return f"slurm-{array or env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"
    if "TORCHELASTIC_RUN_ID" in env:
        if env["TORCHELASTIC_RUN_ID"] == "none":
            raise ValueError(
                "torchrun was given no id, from which its processes could make one name for the run's folder: "
                "add --standalone (one machine), --rdzv-id NAME, or --run_dir FOLDER"
            )
        return f"torchrun-{env['TORCHELASTIC_RUN_ID']}"
    return None
