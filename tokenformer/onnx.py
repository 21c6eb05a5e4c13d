"""A model as one file for onnxruntime and what else reads ONNX (extra `onnx`)."""

from pathlib import Path

import torch
from torch.export import Dim

from tokenformer.language import TokenFormerLM
from tokenformer.vision import TokenFormerViT

LARGEST = 1_900_000_000  # bytes of weights in a file of protobuf, whose limit is 2 GiB


def save_onnx(model: TokenFormerLM | TokenFormerViT, path: Path) -> None:
    """Write `input_ids` (B, T) -> `logits` (B, T, V), or `pixel_values` (B, 3, H, W) -> `logits` (B, C).

    B is any number, T any up to `max_seq_len`, H and W any whole numbers of patches from 2. The operators are
    ONNX's own. Weights of more than 1.9 GB lie beside it, in PATH.data.

    Args:
        model: in eval mode.
        path: of the file, NAME.onnx.

    Raises:
        ValueError: where what writes it is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--format onnx: needs pip install 'tokenformer[onnx]' ({error})") from error
    parameter = next(model.parameters())
    if isinstance(model, TokenFormerLM):
        name, example = "input_ids", torch.zeros(2, min(8, model.config.max_seq_len), dtype=torch.long)
        sizes = {1: Dim("length", max=model.config.max_seq_len)}
    else:
        config, patch = model.config, model.config.patch_size
        name, example = "pixel_values", parameter.new_zeros(2, config.in_channels, 2 * patch, 3 * patch)
        sizes = {2: patch * Dim("rows", min=2), 3: patch * Dim("columns", min=2)}
    program = torch.onnx.export(
        model,
        (example.to(parameter.device),),
        dynamic_shapes=({0: Dim("batch")} | sizes,),
        input_names=[name],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=sum(p.nbytes for p in model.parameters()) > LARGEST)
