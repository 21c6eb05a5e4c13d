"""The released TokenFormer checkpoints: where their tensors lie, what they are called, which sizes they tell."""

import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenformer.config import LMConfig
from tokenformer.files import RELEASED_WEIGHTS, shards, unpacks_to_more, wrong_kind
from tokenformer.language import TokenFormerLM

# Width -> heads of the released Pile models (150M, 450M, 900M, 1.5B); a state dict does not tell the number of heads.
RELEASED_HEADS = {768: 12, 1024: 16, 1280: 16, 1536: 16}

RELEASED = "sequential."  # begins the names of their tensors
_TOKENS = {
    "qkv_tokens": r"attention\.(query|key|value)\.",
    "proj_tokens": r"attention\.proj\.",
    "ffn_tokens": r"\.mlp\.",
}


def read_released(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a released checkpoint, read without running code.

    Args:
        source: the file, `.safetensors` or what ``torch.save`` wrote, or the folder with it or with its shards.

    Raises:
        ValueError: for what is corrupted, or of another kind; says which command reads it.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(Path(source)):
        tensors |= _read(file)
    if not any(name.startswith(RELEASED) for name in tensors):
        raise wrong_kind(source, f"it has no tensors {RELEASED}*, as a released checkpoint has")
    return tensors


def weight_files(source: Path) -> list[Path]:
    """The files with the weights: the one given, or those in a folder.

    Raises:
        ValueError: when there are none; says which command reads what is there.
    """
    if source.is_file() and source.suffix != ".ckpt":
        return [source]
    for name in RELEASED_WEIGHTS:
        if (source / name).is_file():
            return [source / name]
        if (index := source / f"{name}.index.json").is_file():
            return shards(index)
    raise wrong_kind(
        source, f"wanted is a released checkpoint: a file of weights, or {' or '.join(RELEASED_WEIGHTS)} in a folder"
    )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if zipfile.is_zipfile(file) and (problem := unpacks_to_more(file)):
            raise ValueError(problem)
        tensors = torch.load(file, "cpu", weights_only=True)
    except UnpicklingError as error:
        if zipfile.is_zipfile(file):
            raise ValueError(f"{file}: is no file of tensors alone, reading it might run code: {error}") from error
        raise wrong_kind(file, "wanted is a file of tensors") from error
    except Exception as error:  # of corrupted files torch.load raises whatever it stumbles over
        raise wrong_kind(file, f"corrupted, or no file of tensors ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{file}: holds no dictionary of tensors")
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def load_official(source: str | Path | Mapping[str, Tensor], num_heads: int | None = None) -> TokenFormerLM:
    """Build a TokenFormerLM from weights in the layout of the released checkpoints (sizes come from the shapes).

    Args:
        source: a state dict, or what :func:`read_released` reads. Entries that are not the model's (their names don't
            start with ``sequential.``) are passed over.
        num_heads: attention heads; known for the widths of the released models.

    Returns:
        The model, in the weights' own precision.

    Raises:
        ValueError: that lists the tensors that are missing, unknown or of a wrong shape; when `num_heads` is needed.
    """
    tensors = source if isinstance(source, Mapping) else read_released(source)
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(RELEASED)}
    embedding = f"{RELEASED}0.word_embeddings.weight"
    if len(shapes.get(embedding, ())) != 2:
        raise ValueError(f"no matrix {embedding!r}: not a released TokenFormer language model")
    vocab_size, dim = shapes[embedding]
    if num_heads is None and dim not in RELEASED_HEADS:
        raise ValueError(
            f"give num_heads: it is known only for the released widths {sorted(RELEASED_HEADS)}, not {dim}"
        )

    blocks = (re.match(r"sequential\.(\d+)\.(attention|mlp)\.", name) for name in shapes)
    depth = max((int(found[1]) - 1 for found in blocks if found), default=0)  # the first block is number 2
    names = _official_names(depth)
    wrong = {
        "missing tensors": sorted(set(names.values()) - shapes.keys()),
        "unknown tensors": sorted(shapes.keys() - set(names.values())),
    }
    counts: dict[str, Any] = {kind: _usual_rows(shapes, pattern) for kind, pattern in _TOKENS.items()}
    if None not in counts.values():
        config = LMConfig(
            vocab_size=vocab_size,
            max_seq_len=2048,
            depth=depth,
            dim=dim,
            num_heads=num_heads or RELEASED_HEADS[dim],
            **counts,
        )
        with torch.device("meta"):
            expected = {name: parameter.shape for name, parameter in TokenFormerLM(config).named_parameters()}
        wrong["shapes that contradict the other layers"] = [
            f"{theirs} {tuple(shapes[theirs])}, not {tuple(expected[ours])}"
            for ours, theirs in names.items()
            if theirs in shapes and shapes[theirs] != expected[ours]
        ]
    if any(wrong.values()):
        raise ValueError("; ".join(f"{what}: {', '.join(listed)}" for what, listed in wrong.items() if listed))
    state = {ours: tensors[theirs] for ours, theirs in names.items()}
    model = TokenFormerLM(config).to(reduce(torch.promote_types, {tensor.dtype for tensor in state.values()}))
    model.load_state_dict(state, strict=False)  # tau stays sqrt(N)
    return model


def _usual_rows(shapes: Mapping[str, torch.Size], pattern: str) -> int | None:
    """N of most of the matrices of parameter tokens whose names match; None where there are none."""
    rows = [shape[0] for name, shape in shapes.items() if re.search(pattern, name) and len(shape) == 2]
    return Counter(rows).most_common(1)[0][0] if rows else None


def _official_names(depth: int) -> dict[str, str]:
    """Our parameter names -> the released ones (facts: index 1 and depth + 2 hold no parameters)."""
    names = {"embedding.weight": f"{RELEASED}0.word_embeddings.weight"}
    layers = {
        "attention.query": "attention.query",
        "attention.key": "attention.key",
        "attention.value": "attention.value",
        "attention.out": "attention.proj",
        "ffn": "mlp",
    }
    for i in range(depth):
        for ours, theirs in layers.items():
            for kind in ("key", "value"):
                mine = f"backbone.blocks.{i}.{ours}.segments.0.{kind}s"
                names[mine] = f"{RELEASED}{i + 2}.{theirs}.{kind}_param_tokens"
    for kind in ("weight", "bias"):
        names[f"backbone.norm.{kind}"] = f"{RELEASED}{depth + 3}.norm.{kind}"
    return names
