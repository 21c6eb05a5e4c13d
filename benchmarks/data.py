"""Data: tokenization MB/s, tokens/s of the training loader, the share of a training step spent waiting for it.

    python -m benchmarks.data [--rounds 5] [--device cpu]

Text: the standard library's, twelve times over; the tokenizer is a BPE of 8192 trained on it. Tokenization is all of
`prepare` (reading, encoding in one thread a core, writing), against the tokenizers package's own batch encoding of the
same documents, already in memory, in as many threads. The loader against random windows of the same file, stacked.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer

from benchmarks.harness import Case, Measured, benchmark, in_turn, round_ratios, time_in_turn
from benchmarks.loops import fit, fit_arguments, text
from datamodules.sources import TextFormat, open_source
from datamodules.text import TextDataModule
from datamodules.tokens import prepare
from tokenformer import LMConfig

TOKENIZE, LOAD = ("tokenization MB/s", "tokenizers' own batches"), ("loader tokens/s", "random windows, stacked")
WAIT = ("waiting for data", "training time")
SMALL = {"depth": 4, "dim": 128, "num_heads": 4, "qkv_tokens": 128, "proj_tokens": 128, "ffn_tokens": 512}
CASES = [
    Case("standard library x 12, BPE 8192, all cores", {TOKENIZE: ">= 0.9"}, {"what": "tokenize", "copies": 12}),
    Case("8 x 256 tokens, 0 workers", {LOAD: ""}, {"what": "load", "seq_len": 256, "batch_size": 8}, quick=True),
    Case("4 x 128, 16 x 128 tokens", {WAIT: "<= 0.01"}, {"what": "wait", "sizes": SMALL, "steps": 20}, quick=True),
]


def tokenization(copies: int, rounds: int) -> Measured:
    """Whole `prepare` against `encode_batch_fast`."""
    trained = text(256, 8, 8192).folder / "tokenizer.json"
    documents = list(open_source("stdlib", TextFormat()).documents()) * copies
    megabytes = sum(len(document.encode(errors="replace")) for document in documents) / 1e6
    threads = os.cpu_count() or 1
    peer = Tokenizer.from_file(str(trained))
    peer.encode_special_tokens = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A parquet file, as large text comes; half of a surrogate pair is no UTF-8.
        whole = [document.encode(errors="replace").decode() for document in documents]
        pq.write_table(pa.table({"text": whole}), folder / "text.parquet")
        sources = {"train": open_source(str(folder / "text.parquet"), TextFormat())}

        def ours() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as made:
                prepare(
                    Path(made) / "tokens",
                    sources,
                    str(trained),
                    bpe_vocab_size=8192,
                    val_fraction=0.05,
                    num_threads=threads,
                )

        theirs = partial(peer.encode_batch_fast, whole, add_special_tokens=False)
        seconds = time_in_turn({"ours": ours, "tokenizers": theirs}, rounds)
    columns: dict[str, object] = {"threads": threads}
    columns |= {f"{who}_mb_per_s": f"{megabytes / statistics.median(found):.2f}" for who, found in seconds.items()}
    return {TOKENIZE: round_ratios(seconds, "tokenizers", "ours")}, columns


def random_windows(data: TextDataModule) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The usual few lines: windows of the memory-mapped file at random places."""
    while True:
        starts = torch.randint(len(data.train.ids) - data.seq_len, (data.batch_size,)).tolist()
        x, y = (
            torch.stack(
                [torch.from_numpy(data.train.ids[i + k : i + k + data.seq_len].astype(np.int64)) for i in starts]
            )
            for k in (0, 1)
        )
        yield x, y


def loading(seq_len: int, batch_size: int, rounds: int, batches: int = 500) -> Measured:
    """Batches from both in turn."""
    data = text(seq_len, batch_size, 257)
    streams = {"ours": iter(data.train_dataloader()), "windows": random_windows(data)}
    taking = {name: partial(_take, stream, batches) for name, stream in streams.items()}
    seconds = time_in_turn(taking, rounds)
    tokens = batches * data.tokens_per_batch
    columns: dict[str, object] = {
        f"{name}_tokens_per_s": f"{tokens / statistics.median(found):.0f}" for name, found in seconds.items()
    }
    return {LOAD: round_ratios(seconds, "windows", "ours")}, columns


def _take(stream: Iterator[object], count: int) -> None:
    for _ in islice(stream, count):
        pass


def waiting(sizes: dict[str, int], steps: int, rounds: int) -> Measured:
    """`train/data_wait` of a run, without the log's first line. Of a GPU's run it is in benchmarks.training."""
    data = text(128, 16, 257)
    config = LMConfig(**sizes, vocab_size=data.vocab_size, max_seq_len=data.seq_len)  # type: ignore[arg-type]
    arguments = fit_arguments(config, data, steps, steps // 4, **{"trainer.accelerator": "cpu"})
    shares = in_turn(
        {"fit": lambda: statistics.median(line["train/data_wait"] for line in fit(arguments)[1:])}, rounds, 0
    )
    return {WAIT: shares["fit"]}, {}


def measure(what: str, device: str, rounds: int, **arguments: int) -> Measured:
    """One of the three."""
    if what == "tokenize":
        return tokenization(rounds=rounds, **arguments)
    if what == "load":
        return loading(rounds=rounds, **arguments)
    return waiting(rounds=rounds, **arguments)  # type: ignore[arg-type]


if __name__ == "__main__":
    benchmark("data", CASES, measure, rounds=5)
