"""Weights in int8, for inference, through torchao (extra `int8`): a quarter of the memory of float32."""

from importlib.util import find_spec

from torch import nn


def quantize_blocks(model: nn.Module) -> None:
    """Keep the matrices of all blocks, keys and values or those of a baseline, in int8 with a scale for each row.

    torchao's own `quantize_` does it, symmetric and rounded to nearest; other configurations of it go the same way. A
    layer's tokens are in the model's dtype while it runs. Embeddings, head, norms and tau stay as they are, and so does
    the dtype that a model says it has. A quantised model is neither trained nor grown nor exported.

    Args:
        model: with a `backbone`, on its device and in its dtype; changed in place.

    Raises:
        ValueError: where torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise ValueError("int8: needs torchao: pip install 'tokenformer[int8]'")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    int8 = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model.backbone, FqnToConfig({r"re:.*\.segments\.\d+\.(keys|values)": int8}), filter_fn=None)
    quantize_(model.backbone, int8)  # every nn.Linear
