"""Models in other people's formats."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenformer.config import LMConfig, ViTConfig
from tokenformer.language import TokenFormerLM
from tokenformer.vision import TokenFormerViT

# Width -> heads of the released Pile models (150M, 450M, 900M, 1.5B); a state dict does not tell the number of heads.
RELEASED_HEADS = {768: 12, 1024: 16, 1280: 16, 1536: 16}


def save_model(model: TokenFormerLM | TokenFormerViT, path: str | Path) -> None:
    """Write a model as safetensors: its state dict, and its config as JSON under ``tokenformer`` in the metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"tokenformer": json.dumps(asdict(model.config))})


def load_model(path: str | Path) -> TokenFormerLM | TokenFormerViT:
    """Read what :func:`save_model` wrote; a grown model has the size that it grew to.

    Raises:
        ValueError: when the file has no config.
    """
    with safe_open(path, "pt") as file:
        config = (file.metadata() or {}).get("tokenformer")
    if config is None:
        raise ValueError(f"{path}: no config in its metadata, so not written by save_model")
    tensors = load_file(path)
    fields = json.loads(config)
    model = TokenFormerViT(ViTConfig(**fields)) if "patch_size" in fields else TokenFormerLM(LMConfig(**fields))
    model.to(tensors["backbone.norm.weight"].dtype).load_state_dict(tensors)
    return model


def load_official(source: str | Path | dict[str, Tensor], num_heads: int | None = None) -> TokenFormerLM:
    """Build a TokenFormerLM from weights in the layout of the released checkpoints (sizes come from the shapes).

    Args:
        source: a state dict, or a file of one: ``.safetensors``, or what ``torch.save`` wrote (read without unpickling
            code). Entries that are not the model's (their names don't start with ``sequential.``) are passed over.
        num_heads: attention heads; known for the widths of the released models.

    Returns:
        The model, in the weights' own precision.

    Raises:
        ValueError: when a tensor is missing or left over, when sizes contradict each other, when `num_heads` is needed.
    """
    if not isinstance(source, dict):
        path = Path(source)
        source = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    released = {name: tensor for name, tensor in source.items() if name.startswith("sequential.")}
    embedding = released.get("sequential.0.word_embeddings.weight")
    if embedding is None:
        raise ValueError("no tensor 'sequential.0.word_embeddings.weight': not a released TokenFormer language model")
    vocab_size, dim = embedding.shape
    depth = sum(name.endswith(".mlp.key_param_tokens") for name in released)
    if num_heads is None and dim not in RELEASED_HEADS:
        raise ValueError(
            f"give num_heads: it is known only for the released widths {sorted(RELEASED_HEADS)}, not {dim}"
        )

    names = _official_names(depth)
    if missing := sorted(set(names.values()) - set(released)):
        raise ValueError(f"missing tensors: {', '.join(missing)}")
    if unknown := sorted(set(released) - set(names.values())):
        raise ValueError(f"unknown tensors: {', '.join(unknown)}")
    config = LMConfig(
        vocab_size=vocab_size,
        max_seq_len=2048,
        depth=depth,
        dim=dim,
        num_heads=num_heads or RELEASED_HEADS[dim],
        qkv_tokens=len(released["sequential.2.attention.query.key_param_tokens"]),
        proj_tokens=len(released["sequential.2.attention.proj.key_param_tokens"]),
        ffn_tokens=len(released["sequential.2.mlp.key_param_tokens"]),
    )
    model = TokenFormerLM(config).to(embedding.dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if wrong := [
        f"{theirs} {tuple(released[theirs].shape)}, not {tuple(shapes[ours])}"
        for ours, theirs in names.items()
        if released[theirs].shape != shapes[ours]
    ]:
        raise ValueError(f"shapes that contradict the other layers: {'; '.join(wrong)}")
    model.load_state_dict({ours: released[theirs] for ours, theirs in names.items()}, strict=False)  # tau stays sqrt(N)
    return model


def _official_names(depth: int) -> dict[str, str]:
    """Our parameter names -> the released ones (facts: index 1 and depth + 2 hold no parameters)."""
    names = {"embedding.weight": "sequential.0.word_embeddings.weight"}
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
                names[mine] = f"sequential.{i + 2}.{theirs}.{kind}_param_tokens"
    for kind in ("weight", "bias"):
        names[f"backbone.norm.{kind}"] = f"sequential.{depth + 3}.norm.{kind}"
    return names
