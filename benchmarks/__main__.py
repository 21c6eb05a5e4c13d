"""All benchmarks, or those named, each in a process of its own; then the page and its plots.

    python -m benchmarks [NAME ...] [--device cpu]
    python -m benchmarks --check [NAME ...]
    python -m benchmarks gpu [--minutes 8] [--out FOLDER]

`--check` measures the quick cases again, in three rounds, and fails where a ratio is more than 10 % worse than the
stored one. Noise: only a median beyond the range of the stored rounds counts, and only if it is so twice in a row. It
is of use on the machine that the stored figures are from, and on an idle one. `gpu` takes the cases for a GPU in the
order of their worth, and stops in time.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu, plots
from benchmarks.check import is_worse, pairs
from benchmarks.harness import RESULTS, ROOT, Row, key, read_rows

NAMES = ("operator", "memory", "training", "context", "vit", "generation", "data", "optimizer", "start", "scaling")
NAMES += ("growth", "images", "correctness", "others")
CHECKED = ("operator", "memory", "training", "context", "vit", "generation", "data", "optimizer", "start", "growth")


def run(name: str, *arguments: str) -> None:
    """One benchmark.

    Raises:
        CalledProcessError: when it fails.
    """
    print(f"--- {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=ROOT, check=True)


def quick(name: str) -> list[tuple[Row, Row]]:
    """The quick rows of a benchmark, measured now, each with the stored one."""
    with tempfile.TemporaryDirectory() as folder:
        run(name, "--quick", "--results", folder)
        return pairs(read_rows(Path(folder) / f"{name}.csv"), read_rows(RESULTS / f"{name}.csv"))


def check(names: Sequence[str]) -> None:
    """Exit with 1 if anything is worse, twice, or if nothing could be compared."""
    count, failed = 0, []
    for name in names:
        compared = quick(name)
        count += len(compared)
        if first := {key(row) for row, stored in compared if is_worse(row, stored)}:
            print(f"{name}: {len(first)} worse than stored; once more", flush=True)
            failed += [pair for pair in quick(name) if key(pair[0]) in first and is_worse(*pair)]
    for row, stored in failed:
        print(*key(row), f"now {row['ratio']}, stored {stored['ratio']} ({stored['lowest']}-{stored['highest']})")
    if not count:
        sys.exit("nothing to compare: no quick row of these benchmarks has a stored ratio; run them without --check")
    if failed:
        sys.exit(f"{len(failed)} of {count} ratios are more than 10 % worse than those of benchmarks/results")
    print(f"none of {count} ratios is more than 10 % worse than the stored one")


def main() -> None:
    """Parse the names, run them."""
    if sys.argv[1:2] == ["gpu"]:
        return gpu.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--check", action="store_true", help="compare with the stored ratios, write nothing")
    args = parser.parse_args()
    known = CHECKED if args.check else NAMES
    if unknown := set(args.names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    if args.check:
        return check(args.names or CHECKED)
    failed = []
    for name in args.names or NAMES:
        try:
            run(name, "--device", args.device)
        except subprocess.CalledProcessError:
            failed.append(name)
    plots.main()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
