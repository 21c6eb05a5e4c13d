"""Which folder a run has, and which checkpoint it starts from."""

import re
import secrets
import time
from pathlib import Path

from jsonargparse import Namespace

from lit_modules.checkpoints.reading import read_header
from lit_modules.checkpoints.validation import latest_valid, step_of
from lit_modules.runs.slurm import launch_name


def experiment_folder(config: Namespace, name: str) -> Path:
    """The folder of all runs of a name.

    Raises:
        ValueError: for a name that leads elsewhere.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"name={name}: is a folder in trainer.default_root_dir: without .. and a / in front of it")
    return Path(config.trainer.default_root_dir or "runs") / name


def resolve_run(subcommand: str, config: Namespace) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint that it starts from.

    Raises:
        ValueError: for a folder that holds another run, a checkpoint that is missing or not valid, and one that is not
            the last of the run that it is to be resumed in.
    """
    experiment = experiment_folder(config, config.name)
    given = Path(config.run_dir) if config.run_dir else None
    if config.ckpt_path == "auto" and subcommand == "fit":
        if given is None and launch_name() is None:
            raise ValueError("ckpt_path=auto resumes the run in a folder, or starts one there: give --run_dir")
        folder = given or _new_run_dir(experiment, subcommand)
        there = list(folder.glob("checkpoints/*.ckpt"))
        checkpoint = latest_valid(there)
        if there and checkpoint is None:
            raise ValueError(f"ckpt_path=auto: all checkpoints in {folder} are corrupted: delete them to start again")
        return folder, checkpoint
    checkpoint = Path(config.ckpt_path) if config.ckpt_path else None
    if config.ckpt_path == "last":
        checkpoint = latest_valid(
            given.glob("checkpoints/*.ckpt") if given else experiment.glob("*/checkpoints/*.ckpt")
        )
        if checkpoint is None:
            raise ValueError(f"ckpt_path=last: there is no valid checkpoint in {given or experiment}")
    elif checkpoint:
        try:
            read_header(checkpoint)
        except ValueError as error:
            raise ValueError(f"ckpt_path={error}; `last` takes the newest valid one of {experiment}") from None
    if checkpoint and config.ckpt_path == "last" and subcommand == "fit" and not given:
        return checkpoint.parent.parent, checkpoint  # resumes in the run's own folder
    folder = given or _new_run_dir(experiment, subcommand)
    places = {place.resolve() for place in (checkpoint or Path()).absolute().parents}  # checkpoints/ may be a link
    resumes = subcommand == "fit" and checkpoint is not None and folder.resolve() in places
    if resumes and checkpoint is not None and config.ckpt_path != "last":
        _refuse_later_ones(checkpoint)
    if (folder / "config.yaml").exists() and not resumes:
        raise ValueError(f"run_dir={folder} holds a run already: resume it by --ckpt_path last, or choose another")
    return folder, checkpoint


def replace_links(folder: Path) -> None:
    """Make files of the links to files in a run's folder: what the run writes there it writes nowhere else."""
    for link in folder.iterdir():
        if link.is_symlink() and (link.is_file() or not link.exists()):
            content = link.read_bytes() if link.is_file() else None
            link.unlink()
            if content is not None:
                link.write_bytes(content)


def _refuse_later_ones(checkpoint: Path) -> None:
    """`last` takes the checkpoint of the most steps: it would go on with the steps that were to be replaced."""
    others = [path for path in checkpoint.parent.glob("*.ckpt") if step_of(path) > step_of(checkpoint)]
    if later := latest_valid(others):
        raise ValueError(
            f"ckpt_path={checkpoint}: the run has {later.name} too, which comes after it: go on in a new folder "
            "(--run_dir), or delete the later checkpoints"
        )


def config_name(args: list[str], model: Namespace) -> str:
    """The name of the first config file on the command line, without its ending; `-baseline` follows for a baseline.

    Other files change how it is run.
    """
    file = re.search(r"(?:^|\n)(?:-c|--config)[\n=]([^\n]+)", "\n".join(args))
    baseline = model.init_args.get("config", {}).get("baseline")
    return (Path(file[1]).stem if file else "run") + ("-baseline" if baseline else "")


def _new_run_dir(experiment: Path, subcommand: str) -> Path:
    """A folder that no other run has, even if it starts in the same second."""
    suffix = "" if subcommand == "fit" else f"-{subcommand}"
    return experiment / f"{launch_name() or new_name()}{suffix}"


def new_name() -> str:
    """Date, time and something random."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
