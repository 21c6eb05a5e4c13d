"""A tiny language model of bytes in a folder, as `tokenformer export` writes it."""

import torch

from datamodules.tokenizer import ByteTokenizer
from lit_modules.commands.tokenizers import write_tokenizer_files
from tokenformer import LMConfig, TokenFormerLM, save_pretrained

SIZES = {"depth": 2, "dim": 32, "num_heads": 4, "qkv_tokens": 17, "proj_tokens": 19, "ffn_tokens": 50}
LM = LMConfig(vocab_size=257, vocab_multiple=8, max_seq_len=64, init="scaled", **SIZES)
IDS = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))


def write_tiny_lm(folder):
    torch.manual_seed(0)
    save_pretrained(TokenFormerLM(LM), folder)
    ByteTokenizer().save(folder / "tokenizer.json")
    write_tokenizer_files(folder, ByteTokenizer.end_of_text, LM.max_seq_len)
    return folder


def padded(rows, side, fill):
    """Ids and mask of rows of different lengths, (B, 12)."""
    ids, mask = torch.full((len(rows), 12), fill), torch.zeros(len(rows), 12, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(12 - len(row), 12)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask
