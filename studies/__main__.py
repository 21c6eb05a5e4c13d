"""Run a study, or go on with it: measure the rows that studies/results/NAME.csv lacks.

    python -m studies                    # which there are
    python -m studies growth --jobs 2    # two trainings at a time
    python -m studies page               # make docs/study.md from all results

It may be stopped at any time, at the cost of the trainings that run.
"""

import argparse
import sys

from studies import page
from studies.runner import FOLDER, Study


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(known)}; or page")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the cores")
    args = parser.parse_args()
    if args.name is None:
        print("\n".join(known))
    elif args.name == "page":
        page.write()
    else:
        run(args.name, args.jobs)


def run(name: str, jobs: int) -> None:
    """Measure what a study lacks."""
    try:
        study = Study(name)
    except ValueError as error:
        sys.exit(f"error: {error}")
    study.measure(jobs)


if __name__ == "__main__":
    main()
