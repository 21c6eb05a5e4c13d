"""Sampling text from a language model."""

import torch
from torch import Tensor

from tokenformer.language import TokenFormerLM


@torch.no_grad()
def generate(
    model: TokenFormerLM,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append sampled ids to a prompt. The model sees at most its last `max_seq_len` ids.

    Args:
        model: the language model; its mode and device are kept.
        input_ids: prompts of equal length, (B, T), T at least 1.
        max_new_tokens: how many ids to add.
        temperature: divides the logits; 0 takes the likeliest id.
        top_k: sample among the k likeliest ids only.
        generator: source of randomness, on the model's device.

    Returns:
        (B, T + max_new_tokens).
    """
    for _ in range(max_new_tokens):
        logits = model(input_ids[:, -model.config.max_seq_len :])[:, -1].float()  # (B, V)
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -torch.inf)
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        input_ids = torch.cat((input_ids, chosen), dim=1)
    return input_ids
