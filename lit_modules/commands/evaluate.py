"""Zero-shot scores of a language model, by the lm-evaluation-harness: its prompts, its metrics.

CKPT is an exported folder, or a checkpoint of a run. The table has the paper's scores beside ours; compare only what
was measured on the whole tasks.

  tokenformer evaluate models/150m --tasks lambada_openai,hellaswag,piqa --out scores.json
  tokenformer evaluate runs/small/20260131-120000-ab12/checkpoints/step-00002000.ckpt --local data/eval --limit 100
  tokenformer evaluate models/grown --tasks piqa --segments 0 2

Tasks come from the Hugging Face hub. With --local they come from the files TASK*.jsonl in a folder, in the formats of
the data sets, and nothing is downloaded.
"""

import argparse
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from lit_modules.commands.segments import add_segments, keep_asked
from lit_modules.modules.loading import ADAPTER_OPTION, INT8_OPTION, Weights

# Column, task and metric of the paper's table: length-normalised accuracy where the choices differ in length the most.
COLUMNS = {
    "LMB ppl": ("lambada_openai", "perplexity"),
    "LMB": ("lambada_openai", "acc"),
    "HellaS": ("hellaswag", "acc_norm"),
    "PIQA": ("piqa", "acc"),
    "ArcE": ("arc_easy", "acc"),
    "ArcC": ("arc_challenge", "acc_norm"),
    "WinoG": ("winogrande", "acc"),
}
TASKS = list(dict.fromkeys(task for task, _ in COLUMNS.values()))

# TokenFormer (arXiv 2410.23168), table 1, and the mean of its six accuracies.
PUBLISHED = {
    "TokenFormer-150M": (16.38, 45.0, 35.5, 64.9, 47.3, 24.9, 50.4, 44.7),
    "TokenFormer-450M": (7.69, 57.3, 47.5, 69.5, 56.2, 26.7, 54.6, 52.0),
    "TokenFormer-900M": (5.46, 64.0, 55.3, 72.4, 59.9, 30.6, 56.4, 56.4),
    "TokenFormer-1.5B": (5.24, 64.7, 60.0, 74.8, 64.8, 32.0, 59.7, 59.3),
}


def evaluate(model: Any, tasks: list[str], local: Path | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Run tasks on a model.

    Args:
        model: one of the harness's, such as LMEvalModel.
        tasks: names.
        local: folder with their rows; None for the Hugging Face hub.
        limit: rows of each task; None for all.

    Returns:
        Rows of task, metric, value, stderr and number of rows. Accuracies lie between 0 and 1.

    Raises:
        ValueError: for unknown tasks, missing files, and a hub that is not reached.
    """
    import lm_eval

    from lit_modules.commands.lm_eval_model import local_tasks

    manager = lm_eval.tasks.TaskManager(include_defaults=local is None)  # reading all definitions takes seconds
    if local is None and (unknown := [name for name in tasks if name not in manager.all_tasks]):
        raise ValueError(f"--tasks {','.join(unknown)}: the harness knows no such task; `lm_eval ls tasks` lists them")
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=local_tasks(tasks, local) if local else tasks,
            task_manager=manager,
            limit=limit,
            log_samples=False,
        )
    except ConnectionError as error:
        raise ValueError(f"{error}: without a network give --local DIR, a folder with files TASK*.jsonl") from error
    assert found is not None
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, name = key.partition(",")  # "acc,none": the metric, and the filter of the answers
            if name != "none" or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,none")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "rows": found["n-samples"][task]["effective"],
                }
            )
    return rows


def table(name: str, rows: list[dict[str, Any]], whole: bool) -> str:
    """Ours above the published, as Markdown.

    Args:
        name: of our model.
        rows: of :func:`evaluate`.
        whole: whether they were measured on the whole tasks, as the published ones.
    """
    scores = {(row["task"], row["metric"]): row["value"] for row in rows}
    ours = [scores.get(column) for column in COLUMNS.values()]
    accuracies = [score for score in ours[1:] if score is not None]
    mean = 100 * sum(accuracies) / len(accuracies) if len(accuracies) == len(ours) - 1 else None
    scores_in_percent = [None if score is None else 100 * score for score in ours[1:]]
    lines = [["model", *COLUMNS, "Avg"], _line(name if whole else f"{name} *", ours[0], *scores_in_percent, mean)]
    lines += [_line(model, *published) for model, published in PUBLISHED.items()]
    lines.insert(1, ["---"] * len(lines[0]))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines)
    if not whole:
        text += f"\n\n* on {_span(rows)} rows of each task, not comparable with the published scores, which are on all"
    return text


def _line(name: str, perplexity: float | None, *percents: float | None) -> list[str]:
    cells = [None if perplexity is None else f"{perplexity:.{2 if perplexity < 1000 else 0}f}"]
    cells += [None if percent is None else f"{percent:.1f}" for percent in percents]
    return [name, *(cell or "-" for cell in cells)]


def _span(rows: list[dict[str, Any]]) -> str:
    counts = sorted({row["rows"] for row in rows})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def main(args: list[str]) -> None:
    """The command `tokenformer evaluate`; its `--help` is this file's docstring."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tokenformer evaluate", description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, metavar="CKPT", help="an exported folder, or a checkpoint of a run")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, with commas; default: those of the paper")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N rows of each task only")
    parser.add_argument("--batch_size", type=int, default=8, metavar="B", help="sequences of a batch (default: 8)")
    parser.add_argument("--local", type=Path, metavar="DIR", help="folder with files TASK*.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the scores as JSON; replaces FILE")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: a GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the model's own")
    parser.add_argument("--weights", choices=get_args(Weights), default="average", help="of a checkpoint with EMA")
    parser.add_argument("--tokenizer", help="bytes, a tokenizer.json or hub:NAME (default: the model's)")
    add_segments(parser)
    parser.add_argument("--adapter", **ADAPTER_OPTION)
    parser.add_argument("--int8", **INT8_OPTION)
    given = parser.parse_args(args)
    if given.limit is not None and given.limit < 1:
        raise ValueError(f"--limit {given.limit}: must be at least 1")
    if given.local is not None and not given.local.is_dir():
        raise ValueError(f"--local {given.local}: no such folder")
    if find_spec("lm_eval") is None:
        raise ValueError("evaluate needs the lm-evaluation-harness: pip install 'tokenformer[eval]'")

    from lit_modules.commands.lm_eval_model import LMEvalModel

    settings = (given.batch_size, given.device, given.dtype, given.weights, given.tokenizer, given.adapter, given.int8)
    model = LMEvalModel(given.source, *settings)
    keep_asked(model.model, given.source, given.segments, given.adapter)
    rows = evaluate(model, given.tasks.split(","), given.local, given.limit)
    whole = given.local is None and given.limit is None
    print(table(given.source.stem, rows, whole))
    if given.out is not None:
        report = {
            "model": str(given.source),
            "adapters": given.adapter,
            "parameters": model.model.num_params(),
            "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
            "int8": given.int8,
            "rows_from": "hub" if given.local is None else str(given.local),
            "limit": given.limit,
            "segments": " ".join(given.segments),
            "lm_eval": version("lm_eval"),
            "scores": rows,
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2) + "\n")
