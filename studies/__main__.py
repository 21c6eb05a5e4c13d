"""Run a study, or go on with it: measure the rows that studies/results/NAME.csv lacks.

    python -m studies                      # which there are
    python -m studies growth --jobs 2      # two trainings at a time
    python -m studies growth --scale 8     # eight times the steps and three times the widths: for a GPU
    python -m studies growth --jobs 8 --submit --time=8:00:00 --partition=long    # as a Slurm job; the rest is sbatch's
    python -m studies page                 # make docs/study.md from all results
    python -m studies smoke                # each cell of all studies, six steps or so; downloads and keeps nothing

It may be stopped at any time, at the cost of the trainings that run.
"""

import argparse
import contextlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from studies import page
from studies.runner import FOLDER, Study, trainers

SMOKE = 0.005  # of the steps


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(known)}; or page, smoke")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the cores")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps of all trainings; its root, of widths")
    parser.add_argument(
        "--submit", nargs=argparse.REMAINDER, metavar="OPTION", help="send it to Slurm with these options of sbatch"
    )
    args = parser.parse_args()
    if not args.scale > 0:
        parser.error(f"--scale {args.scale:g}: must be above 0")
    if args.name in (None, "page", "smoke") and (args.jobs, args.scale, args.submit) != (1, 1.0, None):
        parser.error(f"--jobs, --scale and --submit are of a study, not of {args.name or 'the list'}")
    if args.name is None:
        print("\n".join(known))
    elif args.name == "page":
        page.write()
    elif args.name == "smoke":
        smoke(known)
    elif args.submit is None:
        known_study(args.name, args.scale).measure(args.jobs)
    else:
        submit(known_study(args.name, args.scale), args.jobs, args.submit)


def known_study(name: str, scale: float) -> Study:
    """The study, or an end with a line."""
    try:
        return Study(name, scale=scale)
    except ValueError as error:
        sys.exit(f"error: {error}")


def submit(study: Study, jobs: int, options: list[str]) -> None:
    """Send a study to Slurm. A job that is preempted is queued again, and goes on; so does one that is sent again."""
    if shutil.which("sbatch") is None:
        sys.exit("error: there is no sbatch here: submit on a cluster's login node")
    log = Path("runs/studies") / f"{study.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "studies", study.name, f"--jobs={jobs}", f"--scale={study.scale:g}"]
    asked = [f"--job-name=study-{study.name}", f"--cpus-per-task={jobs}", "--requeue", "--open-mode=append"]
    asked.append("--dependency=singleton")  # two at once would write over each other's rows
    script = f"#!/bin/bash\nexec {shlex.join(command)}\n"
    sent = subprocess.run(
        ["sbatch", "--parsable", *asked, f"--output={log}", *options], input=script, text=True, stdout=subprocess.PIPE
    )
    if sent.returncode:
        sys.exit(sent.returncode)
    print(f"job {sent.stdout.strip()}, log {log}")


def smoke(names: list[str]) -> None:
    """A short training of each cell of these studies, at the rate where its search begins, and the tables of them."""
    jobs = os.cpu_count() or 1
    with TemporaryDirectory() as folder, contextlib.chdir(folder), trainers(jobs, SMOKE) as processes:
        for name in names:
            shutil.copy(FOLDER / f"{name}.yaml", folder)
            (study := Study(name, Path(folder), SMOKE)).seeds = 1
            lacks = getattr(importlib.import_module(study.module), "lacks", lambda cell: "")
            for cell in [cell for cell in study.cells if lacks(cell)]:
                print(f"left out, since it needs {lacks(cell)}: {cell}")
                study.cells.remove(cell)
            study.measure_in(processes, jobs, search_rates=False)
            print(page.section(study))


if __name__ == "__main__":
    main()
