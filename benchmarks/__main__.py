"""All benchmarks, or those named, each in a process of its own; then the page and its plots.

    python -m benchmarks [NAME ...] [--device cpu]
    python -m benchmarks --check [NAME ...]

`--check` measures the quick cases again, in three rounds, and fails where a ratio is more than 10 % worse than the
stored one. Noise: only a median beyond the range of the stored rounds counts, and only if it is so twice in a row. It
is of use on the machine that the stored figures are from, and on an idle one.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import plots
from benchmarks.check import regressions
from benchmarks.harness import RESULTS, ROOT, Row, key, read_rows

NAMES = ("operator", "memory", "training", "context", "vit", "generation", "data", "optimizer", "start", "scaling")
NAMES += ("growth", "images")
CHECKED = ("operator", "memory", "training", "context", "vit", "generation", "data", "optimizer", "start", "growth")


def run(name: str, *arguments: str) -> None:
    """One benchmark.

    Raises:
        CalledProcessError: when it fails.
    """
    print(f"--- {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=ROOT, check=True)


def worse(name: str) -> list[tuple[Row, Row]]:
    """The quick rows of a benchmark that are worse than the stored ones, each with that."""
    with tempfile.TemporaryDirectory() as folder:
        run(name, "--quick", "--results", folder)
        return regressions(read_rows(Path(folder) / f"{name}.csv"), read_rows(RESULTS / f"{name}.csv"))


def check(names: list[str]) -> None:
    """Exit with 1 if anything is worse, twice."""
    failed = []
    for name in names:
        if first := {key(row) for row, _ in worse(name)}:
            print(f"{name}: {len(first)} worse than stored; once more", flush=True)
            failed += [pair for pair in worse(name) if key(pair[0]) in first]
    for row, stored in failed:
        print(*key(row), f"now {row['ratio']}, stored {stored['ratio']} ({stored['lowest']}-{stored['highest']})")
    if failed:
        sys.exit(f"{len(failed)} ratios are more than 10 % worse than those of benchmarks/results")
    print("no ratio is more than 10 % worse than the stored one")


def main() -> None:
    """Parse the names, run them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--check", action="store_true", help="compare with the stored ratios, write nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    if args.check:
        return check([name for name in args.names or CHECKED if name in CHECKED])
    for name in args.names or NAMES:
        run(name, "--device", args.device)
    plots.main()


if __name__ == "__main__":
    main()
