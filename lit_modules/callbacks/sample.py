"""A text that the model writes at the end of training."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from tokenformer import generate


class SampleText(Callback):
    """Writes `sample.txt` into the run's folder.

    Args:
        prompt: what the text begins with.
        max_new_tokens: tokens to add.
        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        seed: of the sampling.
    """

    def __init__(
        self, prompt: str = "def ", max_new_tokens: int = 400, temperature: float = 0.7, seed: int = 0
    ) -> None:
        self.prompt, self.max_new_tokens = prompt, max_new_tokens
        self.temperature, self.seed = temperature, seed

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        (ids,) = tokenizer.encode_batch([self.prompt])
        prompt = torch.tensor([[tokenizer.end_of_text, *ids]], device=pl_module.device)  # a new document begins
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        pl_module.eval()
        written = generate(pl_module.model, prompt, self.max_new_tokens, self.temperature, generator=generator)
        text = tokenizer.decode(written[0].tolist())
        path = Path(trainer.default_root_dir) / "sample.txt"
        path.write_text(text, encoding="utf-8")
        shown = "\n".join(f"  | {line}" for line in text.splitlines()[:12])
        rank_zero_info(f"\na sample (whole in {path.name}):\n{shown}")
