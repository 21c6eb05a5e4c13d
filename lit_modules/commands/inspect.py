"""Look inside a model: which parameter tokens fire, on what, how their keys lie, and whether it knows that it guesses.

CKPT is the folder of an exported model, or a checkpoint of a run (which has the segments of each growth apart). It is
shown a text file, or the images in a folder; of those in folders that are called as its classes, these are the classes.
DIR gets

  index.html       all that follows on one page, which needs no network
  segments.csv     a row for each segment of each layer (what it began with, what each growth added): how often its
                   tokens fire, tau, RMS of scores, effective rank and angles of keys beside those of random vectors
  tokens.csv       a row for each parameter token: the share of inputs at which it fires, mean |weight|, and that times
                   the length of its value
  contexts.csv     the inputs at which each token has its largest weights, 5 of each
  predictions.csv  loss, entropy and confidence of each prediction, and whether it was right
  calibration.csv  how often predictions are right, by confidence and by entropy
  losses.csv       loss and accuracy by kind of token, with --ablate also when a part of the model is silent
  *.png            the pictures of the page

A token fires where its score is above 0: its weight is positive there. It is dead if it never does, universal if it
always does.

  tokenformer inspect models/150m --text letters.txt --out inside
  tokenformer inspect runs/quickstart/20260131-120000-ab12/checkpoints/step-00001400.ckpt --text README.md --out inside
  tokenformer inspect models/vit --images photos/val --out inside --ablate

--ablate shows where knowledge sits: it zeroes the value tokens of all feed-forwards, of all projections and of each
block in turn, which takes a pass over the data each.
"""

import argparse
import math
from collections.abc import Iterator
from heapq import nlargest
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from lit_modules.commands.calibration import Calibration
from lit_modules.commands.export import new_folder
from lit_modules.commands.inspect_inputs import Batch, Images, Texts, shown
from lit_modules.commands.inspect_page import SeenSegment, write_page
from lit_modules.modules.loading import Weights, load_model
from lit_modules.runs.tables import append_rows, write_rows
from tokenformer import Pattention
from tokenformer.growth import pattention_layers
from tokenformer.inspection import (
    LayerStatistics,
    Scored,
    geometry,
    parts_of,
    random_geometry,
    segments_of,
    silenced,
    watching,
)

TOP = 5  # inputs of each token
SHOWN = 2000  # predictions on the page
EXAMPLES = 3  # tokens of each segment of the feed-forwards on the page

Rows = list[dict[str, Any]]


def inspect(
    source: Path,
    out: Path,
    text: Path | None = None,
    images: Path | None = None,
    ablate: bool = False,
    weights: Weights = "average",
    tokenizer: str | None = None,
) -> str:
    """Write what is to be seen in a model into a new folder; say the most important of it.

    Args:
        source: a checkpoint or an exported folder.
        out: the folder, which must not be there.
        text: a file, for a language model.
        images: a folder, for an image model.
        ablate: silence parts of the model, too.
        weights: of a checkpoint with an average (EMA): that, or the weights themselves.
        tokenizer: bytes, a file or hub:NAME; default: the model's.

    Raises:
        ValueError: for a model that has no parameter tokens or does not read such data, data that is missing or can't
            be read, a folder that exists.
    """
    with new_folder(out) as folder, torch.no_grad():
        model = load_model(source, weights)
        if not (layers := pattention_layers(model)):
            raise ValueError(f"{source}: is a baseline and has no parameter tokens: give a TokenFormer")
        data = shown(model, source, text, images, tokenizer)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
        found = {name: LayerStatistics(layer.num_tokens, TOP, device) for name, layer in layers.items()}
        calibration, silent = Calibration(data.choices), parts_of(model) if ablate else {}
        sums = {part: torch.zeros(len(data.kinds), 3, dtype=torch.float64) for part in ("nothing", *silent)}
        beginning: Rows = []
        for given in tqdm(data.batches(), "inspect", unit=" batches", disable=None):  # off where nobody looks
            batch = Batch(*(part.to(device) for part in given))
            with watching(model, found, batch.places):
                scored = data.score(batch)
            calibration.add(batch.targets, scored)
            sums["nothing"] += _sums(batch, scored)
            _append(folder / "predictions.csv", rows := _predictions(data, batch, scored))
            beginning += rows[: SHOWN - len(beginning)]
            for part, its_layers in silent.items():
                with silenced(its_layers):
                    sums[part] += _sums(batch, data.score(batch))
        if not beginning:
            raise ValueError(f"--images {images}: none of them can be read")
        segments = [seen for name, layer in layers.items() for seen in _segments(name, layer, found[name])]
        for seen in segments:
            _append(folder / "segments.csv", [seen.row])
            _append(folder / "tokens.csv", seen.tokens)
            _append(folder / "contexts.csv", [row for n in range(len(seen.tokens)) for row in _contexts(seen, n, data)])
        losses = [
            {"silent": part, "kind": kind, "predictions": int(count), "loss": nats / count, "accuracy": right / count}
            for part, of_kinds in sums.items()
            for kind, (count, nats, right) in zip(data.kinds, of_kinds.tolist(), strict=True)
            if count
        ]
        _append(folder / "losses.csv", losses)
        _append(folder / "calibration.csv", calibration.rows())
        examples = [(seen, n) for seen in segments for n in _selective(seen)]
        summary, title = _summary(segments, losses, calibration), f"{source.name} on {text or images}"
        write_page(folder, title, summary, segments, losses, calibration.rows(), examples, beginning, data)
    return f"{summary}\nwrote {out}: open its index.html"


def _append(path: Path, rows: Rows) -> None:
    """Add rows to a CSV file, which has a header; six digits of a number, nothing in place of nan."""
    if rows:
        if not path.exists():
            write_rows(path, list(rows[0]), [])
        append_rows(path, list(rows[0]), [{name: _digits(value) for name, value in row.items()} for row in rows])


def _digits(value: Any) -> Any:
    return value if not isinstance(value, float) else "" if math.isnan(value) else f"{value:.6g}"


def _sums(batch: Batch, scored: Scored) -> Tensor:
    """Predictions whose target is known, their nats, and how many are right, of each kind: (K, 3)."""
    known = batch.targets >= 0
    right = (scored.likeliest == batch.targets) & known
    columns = torch.stack((known.double(), scored.nats.double().where(known, 0), right.double()), 1)
    return (batch.kinds.double().T @ columns).cpu()


def _predictions(data: Texts | Images, batch: Batch, scored: Scored) -> Rows:
    """The rows of predictions.csv of a batch."""
    columns = zip(*(column.tolist() for column in (*scored, batch.targets)), strict=True)
    return [
        known
        | {"nats": nats, "entropy": entropy, "confidence": confidence, "predicted": data.name(best)}
        | {"right": int(best == target) if target >= 0 else ""}
        for known, (nats, entropy, confidence, best, target) in zip(data.described(batch), columns, strict=True)
    ]


def _segments(name: str, layer: Pattention, found: LayerStatistics) -> Iterator[SeenSegment]:
    """What segments.csv and tokens.csv have of a layer, and its angles."""
    mean_weights = (found.weights / found.inputs).cpu()
    all_values = torch.cat([segment.values for segment in segments_of(layer)])
    contributions = mean_weights * all_values.double().norm(dim=1).cpu()
    start = 0
    for segment in segments_of(layer):
        part = slice(start, start + len(segment.keys))
        fires = (found.fires[part] / found.inputs).cpu()
        columns = (fires, mean_weights[part], contributions[part], found.top[part, 0])
        tokens = [
            {"layer": name, "segment": segment.number, "token": n}
            | dict(zip(("fires", "mean_weight", "contribution", "largest_weight"), numbers, strict=True))
            for n, numbers in enumerate(zip(*(column.tolist() for column in columns), strict=True))
        ]
        own = geometry(segment.keys)
        random = random_geometry(int(segment.keys.any(1).sum()), layer.in_features)
        row = {
            "layer": name,
            "segment": segment.number,
            "tokens": len(tokens),
            "tau": segment.tau,
            "fires": float(fires.mean()),
            "dead": int((fires == 0).sum()),
            "universal": int((fires == 1).sum()),
            "contribution": float(contributions[part].sum() / contributions.sum()),
            "score_rms": math.sqrt(float(found.squares[part].mean()) / found.inputs),
            "effective_rank": own.effective_rank,
            "random_effective_rank": random.effective_rank,
            "cos_rms": own.cos_rms,
            "random_cos_rms": random.cos_rms,
            "cos_max": own.cos_max,
            "random_cos_max": random.cos_max,
        }
        yield SeenSegment(row, tokens, found.top[part].cpu(), found.places[part].cpu(), own.angles, random.angles)
        start = part.stop


def _contexts(seen: SeenSegment, n: int, data: Texts | Images) -> Rows:
    """The rows of contexts.csv of a token."""
    named = {name: seen.tokens[n][name] for name in ("layer", "segment", "token")}
    pairs = zip(seen.top[n].tolist(), seen.places[n].tolist(), strict=True)
    return [named | {"weight": weight} | data.context(place) for weight, place in pairs if place >= 0]


def _selective(seen: SeenSegment) -> list[int]:
    """Of a feed-forward's segment the tokens whose largest weight is the most times their mean one."""
    if not seen.row["layer"].endswith("ffn"):
        return []
    peaks = [token["largest_weight"] / token["mean_weight"] if token["mean_weight"] else 0 for token in seen.tokens]
    return nlargest(EXAMPLES, range(len(peaks)), key=peaks.__getitem__)


def _summary(segments: list[SeenSegment], losses: Rows, calibration: Calibration) -> str:
    """The page in three lines."""
    total = {name: sum(seen.row[name] for seen in segments) for name in ("tokens", "dead", "universal")}
    fires = sum(seen.row["fires"] * seen.row["tokens"] for seen in segments) / total["tokens"]
    lines = [
        f"{total['tokens']:,} parameter tokens, {total['dead']:,} of them dead, {total['universal']:,} universal; "
        f"in the mean one fires at {fires:.1%} of the inputs"
    ]
    if losses:
        whole = losses[0]
        lines.append(
            f"{whole['predictions']:,} predictions: loss {whole['loss']:.4g} nats, {whole['accuracy']:.1%} right"
        )
        lines.append(f"expected calibration error {calibration.error():.3f}")
        if 0 < whole["accuracy"] < 1:
            auroc = float(calibration.auroc.compute())
            lines[-1] += f"; entropy tells wrong from right with an AUROC of {auroc:.3f}"
    return "\n".join(lines)


def main(args: list[str]) -> None:
    """The command `tokenformer inspect`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer inspect", description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, metavar="CKPT", help="the folder of an exported model, or a checkpoint")
    read = parser.add_mutually_exclusive_group(required=True)
    read.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text, for a language model")
    read.add_argument("--images", type=Path, metavar="FOLDER", help="images, for an image model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write; must not be there")
    parser.add_argument("--ablate", action="store_true", help="losses with parts of the model silent, too")
    parser.add_argument("--weights", choices=get_args(Weights), default="average", help="which, of a run with EMA")
    parser.add_argument("--tokenizer", help="bytes, a tokenizer.json or hub:NAME (default: the model's)")
    print(inspect(**vars(parser.parse_args(args))))
