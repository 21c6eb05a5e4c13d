"""A text that the model writes at the end of training."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_modules.runs.logs import write_if_possible
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

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """All processes write the text, since with FSDP2 each has a part of the weights; the first keeps it."""
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        (ids,) = tokenizer.encode_batch([self.prompt])
        ids = [tokenizer.end_of_text, *ids]  # a new document begins
        wanted = len(ids) + self.max_new_tokens
        context = pl_module.model.config.max_seq_len
        generator = torch.Generator().manual_seed(self.seed)
        pl_module.eval()
        while (missing := wanted - len(ids)) > 0:  # when the context is full, its second half is the next prompt
            seen = ids if len(ids) < context else ids[-(context // 2) :]
            more = max(1, min(missing, context - len(seen)))
            (written,) = generate(pl_module.model, [seen], more, temperature=self.temperature, generator=generator)
            ids = ids + written[len(seen) :]
        if not trainer.is_global_zero:
            return
        text = tokenizer.decode(ids)
        path = Path(trainer.default_root_dir) / "sample.txt"
        write_if_possible(path, lambda: path.write_text(text, encoding="utf-8"))
        shown = "\n".join(f"  | {line}" for line in text.splitlines()[:12])
        rank_zero_info(f"\na sample (whole in {path.name}):\n{shown}")
