"""The model card: what a reader of a published model wants to know, from what the run has recorded."""

from pathlib import Path
from typing import Any

from lit_modules.growth.history import count_by_kind
from lit_modules.runs.tables import read_rows
from tokenformer import TokenFormerLM, TokenFormerViT
from tokenformer.growth import pattention_layers
from tokenformer.interop import present_config

CITATION = "[TokenFormer](https://arxiv.org/abs/2410.23168)"


def model_card(
    model: TokenFormerLM | TokenFormerViT,
    name: str,
    origin: str,
    *,
    checkpoint: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    metrics: Path | None = None,
    raw: bool = False,
    has_tokenizer: bool = False,
) -> str:
    """The text of a README.md.

    Args:
        model: the exported one.
        name: of its folder.
        origin: a sentence on where the weights come from.
        checkpoint: of the training, without which cost, growth and results are not known.
        config: of the run.
        metrics: the run's `metrics.csv`.
        raw: the weights are those in training and not their average, whose metrics have names of their own.
        has_tokenizer: whether there is one in the folder.
    """
    language = isinstance(model, TokenFormerLM)
    task = "language model" if language else "image classifier"
    what = f"A {CITATION} {task}: every linear projection is attention to learnable parameter tokens."
    if model.config.baseline is not None:
        what = f"A Transformer, the baseline that {CITATION} models are compared with: {task}."
    pipeline = "text-generation" if language else "image-classification"
    parts = [
        f"---\nlibrary_name: tokenformer\npipeline_tag: {pipeline}\n---",
        f"# {name}",
        what,
        _table(("size", ""), _sizes(model)),
        "## Training\n\n" + "\n".join(f"- {line}" for line in [origin, *_training(checkpoint, config or {})]),
    ]
    if checkpoint is not None:
        parts.append("## Growth\n\n" + _growth(checkpoint.get("growths", [])))
        parts.append("## Results\n\n" + _results(checkpoint, metrics, raw))
    parts.append("## Use\n\n" + _use(model, name, has_tokenizer))
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _sizes(model: TokenFormerLM | TokenFormerViT) -> list[tuple[str, str]]:
    config: Any = present_config(model)
    rows = [
        ("parameters", f"{model.num_params():,}"),
        ("blocks, channels, heads", f"{config.depth}, {config.dim}, {config.num_heads}"),
    ]
    if config.baseline is None:
        counts = count_by_kind({name: layer.num_tokens for name, layer in pattention_layers(model).items()})
        rows.append(("parameter tokens: query, key and value each; output; feed-forward", ", ".join(counts.values())))
    else:
        rows.append(("hidden units of the feed-forward layer", f"{config.mlp_hidden}"))
    if isinstance(model, TokenFormerLM):
        rows.append(("vocabulary", f"{config.vocab_size:,}"))
        rows.append(("longest sequence", f"{config.max_seq_len:,} tokens"))
        flops = model.flops_per_token(config.max_seq_len)
        rows.append(("FLOPs of a forward pass", f"{flops:.3g} a token, at that length"))
    else:
        rows.append(("image, patch", f"{config.image_size} x {config.image_size}, {config.patch_size} pixels"))
        rows.append(("classes", f"{config.num_classes:,}"))
        rows.append(("FLOPs of a forward pass", f"{model.flops_per_image():.3g} an image"))
    rows.append(("precision of the weights", str(next(model.parameters()).dtype).removeprefix("torch.")))
    return rows


def _training(checkpoint: dict[str, Any] | None, config: dict[str, Any]) -> list[str]:
    lines = []
    data = config.get("data", {}).get("init_args", {})
    if "source" in data:
        sources = data["source"] if isinstance(data["source"], list) else [data["source"]]
        read = f", tokenizer `{data['tokenizer']}`, sequences of {data['seq_len']}" if "tokenizer" in data else ""
        lines.append(f"Data: {', '.join(f'`{source}`' for source in sources)}{read}.")
    else:
        lines.append("Data: not on record.")
    costs = (checkpoint or {}).get("callbacks", {}).get("Throughput")
    if checkpoint is None or costs is None:
        lines.append("Cost: not on record.")
    else:
        lines.append(
            f"Cost: {checkpoint['global_step']:,} optimizer steps, {costs['tokens']:,} tokens, {costs['flops']:.3g} "
            f"FLOPs of matrix products (forward and backward, at the size of each step), "
            f"{_duration(costs['seconds'])}."
        )
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.0f} s"


def _growth(growths: list[dict[str, Any]]) -> str:
    if not growths:
        return "None: trained at this size from the start."
    rows = []
    for record in growths:
        counts = (f"{record[f'{kind}_before']} -> {record[f'{kind}_after']}" for kind in ("qkv", "proj", "ffn"))
        losses = [record[f"loss_{when}"] for when in ("before", "after")]
        loss = "not measured" if "" in losses else " -> ".join(f"{loss:.6f}" for loss in losses)
        params = f"{record['params_before']:,} -> {record['params_after']:,}"
        how = f"{record['init']}, tau {record['scale']}" if record["width"] == 1 else f"width x {record['width']}"
        how = f"LoRA of rank {record['lora']}, merged" if record.get("lora") else how
        rows.append((f"{record['step']:,}", f"{record['tokens']:,}", params, *counts, how, loss))
    head = ("step", "tokens seen", "parameters", "qkv tokens", "proj tokens", "ffn tokens", "how", "loss of a batch")
    return _table(head, rows)


def _results(checkpoint: dict[str, Any], metrics: Path | None, raw: bool) -> str:
    step = checkpoint["global_step"]
    validated, values = _last_validation(metrics, step, raw and "current_model_state" in checkpoint)
    if values:
        said = f"The run's last validation before it was saved, after step {validated:,} of {step:,}:"
        return f"{said}\n\n" + _table(("metric", "value"), [(f"`{n}`", f"{v:.5g}") for n, v in values.items()])
    best = {
        state["monitor"]: float(state["best_model_score"])
        for state in checkpoint.get("callbacks", {}).values()
        if str(state.get("monitor", "")).startswith("val/") and state.get("best_model_score") is not None
    }
    if best:
        return f"The run's best so far: {', '.join(f'`{name}` {value:.5g}' for name, value in best.items())}."
    return "No validation is on record."


def _last_validation(metrics: Path | None, step: int, raw: bool) -> tuple[int, dict[str, float]]:
    """The step after which the last validation up to `step` was made, and its metrics."""
    if metrics is None or not metrics.is_file():
        return 0, {}
    found: tuple[int, dict[str, float]] = 0, {}
    for row in read_rows(metrics)[1]:
        values = {n: float(v) for n, v in row.items() if n.startswith("val/") and v}
        values = {n: v for n, v in values.items() if n.startswith("val/raw_") == raw}
        if values and int(row["step"]) < step:  # the log counts steps from 0
            found = int(row["step"]) + 1, values
    return found


def _use(model: TokenFormerLM | TokenFormerViT, name: str, has_tokenizer: bool) -> str:
    python = f'import tokenformer\n\nmodel = tokenformer.from_pretrained("{name}")  # a torch.nn.Module, in eval mode'
    auto = "ImageClassification" if isinstance(model, TokenFormerViT) else "CausalLM"
    transformers = f'\n\nAfter `import tokenformer.hf`: `transformers.AutoModelFor{auto}.from_pretrained("{name}")`.'
    if isinstance(model, TokenFormerViT):
        side = model.config.image_size
        images = f"(B, {model.config.in_channels}, {side}, {side})"
        timm = f'timm.create_model("local-dir:{name}", pretrained=True)'
        in_timm = f"After `import tokenformer`, in timm:\n\n```python\nimport timm\n\nmodel = {timm}.eval()\n```"
        return f"```python\n{python}\nlogits = model(images)  # {images}\n```{transformers}\n\n{in_timm}"
    command = f'\n\n```\ntokenformer generate {name} --prompt "Once upon a time"\n```' if has_tokenizer else ""
    return f"```python\n{python}\nlogits = model(token_ids)  # (B, T)\n```{command}{transformers}"
