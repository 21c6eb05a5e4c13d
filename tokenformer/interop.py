"""Models in folders: `model.safetensors` and `config.json`, what is published and what others read."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenformer.baseline import Linear
from tokenformer.config import LMConfig, ViTConfig
from tokenformer.files import CONFIG, INDEX, PROCESSOR, WEIGHTS, check_size, is_exported, shards, wrong_kind
from tokenformer.growth import COUNT_OF, pattention_layers
from tokenformer.language import TokenFormerLM
from tokenformer.parts import match_shapes
from tokenformer.pattention import Pattention
from tokenformer.segment import TokenSegment
from tokenformer.timm_models import folder_config, transformers_config
from tokenformer.trained import read_trained
from tokenformer.vision import TokenFormerViT

# What `model_type` in a config.json stands for: config, model, and the name of the model in transformers.
KINDS: dict[str, tuple[Any, Any, str]] = {
    "tokenformer": (LMConfig, TokenFormerLM, "TokenFormerForCausalLM"),
    "tokenformer_vit": (ViTConfig, TokenFormerViT, "TokenFormerForImageClassification"),
}


def save_pretrained(model: TokenFormerLM | TokenFormerViT, folder: str | Path, join: bool = True) -> None:
    """Write a model as a folder: its consolidated state dict in `model.safetensors`, its sizes in `config.json`.

    Of an image model also what images it takes and what its classes are called, as far as `pretrained_cfg` says, and
    the former once more in `preprocessor_config.json`, for transformers.

    Args:
        model: in its own precision; it is left as it is.
        folder: made if it is not there.
        join: segments that share a norm; else they stay apart.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = consolidated_state(model) if join else model.state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = config_dict(model)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if isinstance(model, TokenFormerViT):
        _, processor = transformers_config(config["pretrained_cfg"])
        if processor is not None:
            (folder / PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n")
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets nobody else read it


def from_pretrained(folder: str | Path) -> TokenFormerLM | TokenFormerViT:
    """Read a folder that :func:`save_pretrained` or `tokenformer export` wrote.

    Returns:
        The model in eval mode, in the precision of the file; an image model has its `pretrained_cfg`.

    Raises:
        ValueError: for what is no such folder; for tensors that are missing, left over or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _read_weights(folder)
    check_size(config, tensors, folder)
    (model_class,) = (made for made_from, made, _ in KINDS.values() if made_from is type(config))
    model = model_class(config).to(precision(tensors))
    load_checked(model, tensors, folder)
    if isinstance(model, TokenFormerViT):
        model.pretrained_cfg = read_json(folder).get("pretrained_cfg", {})
    return model.eval()


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / WEIGHTS, folder / INDEX
    return [whole] if whole.is_file() or not index.is_file() else shards(index)


def _read_weights(folder: str | Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(Path(folder)):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not there, or corrupted: {error}") from error
    return tensors


def read_config(folder: str | Path) -> LMConfig | ViTConfig:
    """The config in a folder; keys that are not its fields, such as those of transformers, are passed over.

    Raises:
        ValueError: for what is no such folder.
    """
    folder = Path(folder)
    given = read_json(folder)
    if given.get("model_type") not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(
            f"{folder / CONFIG}: model_type={given.get('model_type')!r} is none of {known}; of a released checkpoint "
            f"`tokenformer import {folder} --out DIR` makes such a folder"
        )
    config_class = KINDS[given["model_type"]][0]
    try:
        return config_class(**{f.name: given[f.name] for f in fields(config_class) if f.name in given})
    except TypeError as error:  # of a value of another type
        raise ValueError(f"{folder / CONFIG}: corrupted: {error}") from error


def read_json(folder: Path) -> dict[str, Any]:
    """The config.json of an exported model.

    Raises:
        ValueError: for what is no such folder.
    """
    if not is_exported(folder):
        raise wrong_kind(folder, f"wanted is a folder with {CONFIG} and {WEIGHTS}")
    try:
        given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG}: corrupted: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{folder / CONFIG}: corrupted: it is no dictionary")
    return given


def config_dict(model: TokenFormerLM | TokenFormerViT) -> dict[str, Any]:
    """What `config.json` says of a model: its kind, its precision, the fields of its config at its present size.

    Of an image model also what timm and transformers want to know.
    """
    (kind, name) = next((kind, name) for kind, (_, made, name) in KINDS.items() if isinstance(model, made))
    dtype = str(precision(dict(model.named_parameters()))).removeprefix("torch.")
    config: Any = present_config(model)
    described: dict[str, Any] = {}
    if isinstance(model, TokenFormerViT):
        described = folder_config(config, model.pretrained_cfg)
        described |= transformers_config(described["pretrained_cfg"])[0]
    return {"model_type": kind, "architectures": [name], "dtype": dtype} | asdict(config) | described


def present_config(model: TokenFormerLM | TokenFormerViT) -> LMConfig | ViTConfig:
    """The model's config, with the counts of parameter tokens that it has grown to.

    Where the layers of a kind differ, the count stays that of the start; the weights' shapes tell each one's.
    """
    counts: dict[str, set[int]] = {}
    for name, layer in pattention_layers(model).items():
        counts.setdefault(COUNT_OF[name.rsplit(".", 1)[-1]], set()).add(layer.num_tokens)
    sizes: dict[str, Any] = {
        f"{kind}_tokens": count for kind, found in counts.items() if len(found) == 1 for count in found
    }
    return replace(model.config, **sizes)


def precision(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """What a model's weights are in; buffers, such as tau, which is always float64, do not count."""
    buffers = (".tau", ".norm_weight")
    return next(t.dtype for name, t in tensors.items() if t.is_floating_point() and not name.endswith(buffers))


def consolidated_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with parameter tokens that share a norm joined, (N, D) and (M, D) to (N + M, D), bits unchanged.

    Segments with a norm of their own, or without a part in one, stay apart: joined, they would be another function. Of
    a baseline updates of low rank are added to their weights.
    """
    state = dict(model.state_dict())
    for name, linear in ((name, module) for name, module in model.named_modules() if isinstance(module, Linear)):
        if linear.lora:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.lora.")}
            state[f"{name}.weight"] = linear.merged()
    for name, layer in pattention_layers(model).items():
        start = f"{name}.segments."
        state = {key: tensor for key, tensor in state.items() if not key.startswith(start)}
        state |= {f"{start}{key}": tensor for key, tensor in _joined_segments(layer).items()}
    return state


def _joined_segments(layer: Pattention) -> dict[str, Tensor]:
    alike: list[list[TokenSegment]] = []
    for group in layer.norm_groups():
        anchored = [[segment] for segment in group if segment.is_anchored]  # each can be left out, or taken away
        alike += [[segment for segment in group if not segment.is_anchored], *anchored]
    joined: dict[str, Tensor] = {}
    for i, group in enumerate(alike):
        first = group[0].state_dict()  # tau and its gain too, of a norm of its own
        tokens = {kind: torch.cat([getattr(s, kind).detach() for s in group]) for kind in ("keys", "values")}
        joined |= {f"{i}.{key}": tensor for key, tensor in (first | tokens).items()}
    return joined


# What a model that is trained further may have otherwise than the folder that it starts from.
FREE = {"init", "scale", "vocab_size", "vocab_multiple", "max_seq_len", "image_size", "num_classes", "drop_path"}


def load_trained(path: str | Path) -> TokenFormerLM | TokenFormerViT:
    """The model in the checkpoint of a training, ours or timm's, with its parameter tokens joined; in eval mode.

    Raises:
        ValueError: for what is no such checkpoint.
    """
    model, tensors = read_trained(Path(path))
    load_checked(model.to(precision(tensors)), tensors, path)
    config: Any = present_config(model)
    joined: TokenFormerLM | TokenFormerViT = type(model)(config).to(precision(tensors))
    load_checked(joined, consolidated_state(model), path)
    if isinstance(joined, TokenFormerViT) and isinstance(model, TokenFormerViT):
        joined.pretrained_cfg = model.pretrained_cfg
    return joined.eval()


def initial_structure(path: str | Path) -> tuple[LMConfig | ViTConfig, dict[str, torch.Size]]:
    """What a model has that starts from this folder or checkpoint: its config, and the shapes of its tensors by name.

    Raises:
        ValueError: for what :func:`load_initial_weights` does not read.
    """
    path = Path(path)
    if not path.is_dir():
        with torch.device("meta"):
            model, tensors = read_trained(path)
        match_shapes(model, {key: tensor.shape for key, tensor in tensors.items()})
        return present_config(model), {name: tensor.shape for name, tensor in consolidated_state(model).items()}
    shapes: dict[str, torch.Size] = {}
    config = read_config(path)
    for file in _weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                shapes |= {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: not there, or corrupted: {error}") from error
    return config, shapes


def load_initial_weights(model: Any, folder: str | Path, same_classes: bool = True) -> bool:
    """Give a model the weights in a folder, to train it further. A classifier for other classes stays new.

    Args:
        model: a TokenFormerLM or TokenFormerViT of the sizes in the folder's config; see `FREE` for what may differ.
        folder: what :func:`from_pretrained` reads, or :func:`load_trained`.
        same_classes: whether equally many classes are the same ones.

    Returns:
        Whether the model has a classifier that stays new.

    Raises:
        ValueError: that lists the sizes that differ.
    """
    trained = None if Path(folder).is_dir() else load_trained(folder)
    source, own = (asdict(c) for c in (trained.config if trained else read_config(folder), model.config))
    if source.keys() != own.keys():
        raise ValueError(f"{folder}: is a {'vision' if 'patch_size' in source else 'language'} model, this is not")
    differing = [name for name in own if name not in FREE and own[name] != source[name]]
    if differing:
        listed = ", ".join(f"{name}={source[name]} (not {own[name]})" for name in differing)
        raise ValueError(f"{folder} has a model of other sizes: set model.config to {listed}")
    tensors = dict(trained.state_dict()) if trained else _read_weights(folder)
    new: tuple[str, ...] = (".tau_gain",)  # 0, of a tau that is trained from now on
    new_head = not same_classes or own.get("num_classes") != source.get("num_classes")
    if new_head:
        new += ("head.weight", "head.bias")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(new[1:])}
    load_checked(model, tensors, folder, may_miss=new)
    return new_head and bool(own["num_classes"])


def load_checked(
    model: nn.Module, tensors: Mapping[str, Tensor], source: object, may_miss: tuple[str, ...] = ()
) -> None:
    """Load a state dict into a model, which takes its numbers of parameter tokens from it.

    Args:
        model: the model.
        tensors: the state dict.
        source: where it comes from, for the errors.
        may_miss: ends of names that need not be in it; what they name stays as it is.

    Raises:
        ValueError: that lists what is missing, unknown or of another shape.
    """
    try:
        missing, unknown = model.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:  # what torch says of shapes
        raise ValueError(f"{source}: the weights do not fit the config: {error}") from error
    missing = [name for name in missing if not name.endswith(may_miss)]
    if missing or unknown:
        wrong = {"missing": missing, "unknown": unknown}
        listed = "; ".join(f"{what} tensors: {', '.join(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{source}: the weights do not fit the config: {listed}")
