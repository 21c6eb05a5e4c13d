"""Runs that are killed at random moments and resumed until they end, each compared with one that nobody killed.

    python -m tests.integration.kills --runs 100 --out kills.csv

One process imports everything and forks, so a start costs a second and not eight. Of several processes one is killed,
and then the others, as torchrun and srun do it. Every other kill comes right after a checkpoint was written, where the
next one of the same step is still to be written and those before are to be removed.
"""

import argparse
import csv
import logging
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_modules.commands.experiment  # noqa: F401  before a fork
from lit_modules.cli import main as tokenformer
from tests.conftest import write_corpus
from tests.integration.growing import COLUMNS, config_of, difference, logged
from tests.integration.processes import free_port

EMA = ["--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9"]
DDP = ["--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=2"]
FSDP2 = ["--trainer.strategy=fsdp2", "--trainer.devices=2", "--data.batch_size=2"]
FULL = ["--trainer.strategy.class_path=FSDP2", "--trainer.strategy.save_distributed_checkpoint=false", *FSDP2[1:]]
ASYNCHRONOUS = ["--checkpoint.asynchronous=true"]
MUON = ["--model.optim.name=muon"]
PLATEAU = [{"on_plateau": {"patience": n, "min_delta": 1.0}, "factor": 2.0} for n in (2, 4)]
TOKENS = [{"at_tokens": 600, "factor": 2.0}, {"at_tokens": 2000, "ffn": 100}]

# Number of processes, options of the command line, arguments of the callback.
CASES = {
    "one process": (1, [], {}),
    "asynchronous saves, EMA": (1, [*ASYNCHRONOUS, *EMA], {"scale": "learned", "init": "pairs"}),
    "accumulation, data workers, stages by tokens": (
        1,
        ["--trainer.accumulate_grad_batches=2", "--data.num_workers=1"],
        {"stages": TOKENS},
    ),
    "asynchronous saves, stages on a plateau": (
        1,
        [*ASYNCHRONOUS, "--trainer.val_check_interval=1"],
        {"stages": PLATEAU, "schedule": "continue"},
    ),
    "DDP": (2, DDP, {"scale": "anneal", "anneal_steps": 4}),
    "DDP, asynchronous saves, EMA, accumulation, bf16-mixed": (
        2,
        [*DDP, *ASYNCHRONOUS, *EMA, "--trainer.accumulate_grad_batches=2", "--trainer.precision=bf16-mixed"],
        {},
    ),
    "Muon, anchored": (1, MUON, {"init": "anchored"}),
    "FSDP2": (2, FSDP2, {}),
    "FSDP2, Muon, anchored": (2, [*FSDP2, *MUON], {"init": "anchored"}),
    "FSDP2, full checkpoints, EMA": (2, [*FULL, *EMA], {}),
}


class Job:
    """The processes of a run."""

    def __init__(self, command: list[str], size: int, log: Path) -> None:
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_RANK": "0"}
        self.running = {rank: _fork(command, world | {"LOCAL_RANK": str(rank)}, log) for rank in range(size)}
        self.codes: list[int] = []
        self.began = time.monotonic()

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether all have ended by then. One that fails takes the others with it, a moment later."""
        end, grace = time.monotonic() + seconds, None
        while self.running:
            for rank, pid in [*self.running.items()]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del self.running[rank]
                    self.codes.append(os.waitstatus_to_exitcode(status))
                    if self.codes[-1]:
                        grace = time.monotonic() + (0 if self.codes[-1] < 0 else 10)
            if grace and time.monotonic() > grace:
                self.send(signal.SIGKILL, [*self.running])
            if time.monotonic() > end or until():
                return not self.running
            time.sleep(0.0005)
        return True

    def send(self, number: int, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self.running[rank], number)


def _fork(command: list[str], world: dict[str, str], log: Path) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ.update(world)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        from lightning.pytorch.utilities import rank_zero_only

        rank_zero_only.rank = int(world["LOCAL_RANK"])  # which it takes from the environment when it is imported
        torch.set_num_threads(1)  # makes the pool of threads anew; two threads at once would end the process
        tokenformer(command)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Saves:
    """Whether so many checkpoints have got their names since; for 0 never."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.there = self.now()

    def now(self) -> set[str]:
        return {name for name in os.listdir(self.folder) if name.endswith(".ckpt")} if self.folder.exists() else set()

    def __call__(self) -> bool:
        if self.number:
            new = (now := self.now()) - self.there
            self.number, self.there = max(self.number - len(new), 0), now | self.there
            return not self.number
        return False


def survive(command: list[str], size: int, duration: float, seed: int, log: Path, most: int = 4) -> list[str]:
    """Start a run until it ends by itself, and kill it at random moments; returns how it was killed."""
    choose, kills, folder = random.Random(seed), [], Path(command[-1]) / "checkpoints"
    while True:
        saves = choose.choice((0, choose.randint(1, 8)))
        awaited = Saves(folder, saves)
        moment = 10 * duration if saves else choose.uniform(0, 1.1 * duration)
        job = Job(command, size, log)
        if job.wait(*((moment, awaited) if len(kills) < most else (120,))):
            assert job.codes == [0] * size, f"ended with {job.codes}:\n{log.read_text()[-5000:]}"
            return kills
        number = choose.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        # A terminal sends SIGINT to all; the others come to one.
        hit = [*job.running] if number == signal.SIGINT else [choose.choice([*job.running])]
        job.send(number, hit)
        when = f"save {saves}" if saves else f"{moment:.2f} s"
        kills.append(f"{signal.Signals(number).name} {when}" + (f" rank {hit[0]}" if size > len(hit) else ""))
        assert job.wait(90), f"hangs after {kills[-1]}:\n{log.read_text()[-5000:]}"


def differences(run: Path, whole: Path) -> list[str]:
    """What a run that was killed has that is not as in one that was not; of times nothing."""
    found = []
    if worst := difference(run, whole):
        found.append(f"tensors by {worst}")
    found += [column for column, rows in logged(whole).items() if logged(run)[column] != rows]
    growths = [[row | {"seconds": ""} for row in csv.DictReader((each / "growth.csv").open())] for each in (run, whole)]
    found += ["growth.csv"] if growths[0] != growths[1] else []
    files = [
        sorted(_name(p.relative_to(each)) for p in each.rglob("*") if "tfevents" not in p.name) for each in (run, whole)
    ]
    found += [f"{files[0]} in place of {files[1]}"] if files[0] != files[1] else []
    shown = [scalars(each) for each in (run, whole)]
    found += [f"TensorBoard's {tag}" for tag in shown[1] if shown[0].get(tag) != shown[1][tag]]
    return found


def _name(path: Path) -> str:
    """Of a checkpoint not its step: one that SIGTERM asks for has another."""
    return re.sub(r"/step-\d+", "/step-", str(path))


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says what it leaves out
    events = EventAccumulator(str(run))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag in COLUMNS]
    assert tags, run
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(CASES), help="the cases take turns")
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=CASES, metavar="CASE", help="some of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kills.csv"))
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENFORMER_DEBUG": "1"}
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    corpus = (folder / "corpus.jsonl", write_corpus(folder / "corpus.jsonl"))
    durations: dict[str, float] = {}
    failed = 0
    with given.out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["case", "seed", "kills", "how", "result"])
        for seed, name in zip(range(given.seed, given.seed + given.runs), cycle(given.cases), strict=False):
            size, options, growth = CASES[name]
            place = folder / name
            place.mkdir(exist_ok=True)
            config = config_of(place, corpus, **growth)
            every = ["--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=2", "--ckpt_path=auto"]
            command = ["fit", "--config", str(config), *options, *every, "--run_dir"]
            if name not in durations:
                job = Job([*command, str(place / "whole")], size, place / "whole.log")
                assert job.wait(300), "hangs"
                assert job.codes == [0] * size, (place / "whole.log").read_text()[-5000:]
                durations[name] = time.monotonic() - job.began
            run = place / f"run-{seed}"
            try:
                kills = survive([*command, str(run)], size, durations[name], seed, place / f"run-{seed}.log")
                with ProcessPoolExecutor(1, get_context("fork")) as apart:  # what forks computes nothing
                    wrong = apart.submit(differences, run, place / "whole").result()
            except AssertionError as error:
                kills, wrong = [], [str(error)]
            failed += bool(wrong)
            table.writerow([name, seed, len(kills), "; ".join(kills), "; ".join(wrong) or "equal"])
            file.flush()
            print(f"{name}, seed {seed}: {'; '.join(kills) or 'not killed'}: {'; '.join(wrong) or 'equal'}", flush=True)
    print(f"{given.runs - failed} of {given.runs} equal")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
