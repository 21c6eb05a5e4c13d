"""Weights in int8, for inference, through torchao (extra `int8`): a quarter of the memory of float32."""

from importlib.util import find_spec

import torch
from torch import Tensor, nn


def dense(weight: Tensor) -> Tensor:
    """A weight that torchao may have quantised, in the model's dtype."""
    return weight.dequantize() if hasattr(weight, "tensor_data_names") else weight  # which its tensors of weights have


def quantize_blocks(model: nn.Module) -> None:
    """Keep the matrices of all blocks, keys and values or those of a baseline, in int8 with a scale for each row.

    torchao's own `quantize_` does it, symmetric and rounded to nearest. A layer's matrices are in the model's dtype
    while it runs. Embeddings, head, norms, tau and a baseline's low-rank updates stay as they are, and so does the
    dtype that a model says it has. Do it last, with peft's adapters merged: training would leave the blocks as they
    are, and neither `save_pretrained` nor most kinds of growth take such weights.

    Args:
        model: with a `backbone`, on its device and in its dtype; changed in place.

    Raises:
        ValueError: where torchao is not installed, and for a model in float64, which torchao does not take.
    """
    if find_spec("torchao") is None:
        raise ValueError("int8: needs torchao: pip install 'tokenformer[int8]'")
    if any(p.dtype == torch.float64 for p in model.parameters()):
        raise ValueError("int8: from float32, bfloat16 or float16, and the model is in float64: call model.float()")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    int8 = Int8WeightOnlyConfig(set_inductor_config=False)
    names = r"re:.*\.(segments\.\d+\.(keys|values)|(query|key|value|out|up|down)\.weight)"
    quantize_(model.backbone, FqnToConfig({names: int8}), filter_fn=None)
