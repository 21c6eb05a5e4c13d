"""The tokenizer of a model: found beside it or in its run, and written into an exported folder.

There transformers wants some files beside `tokenizer.json`; they are written without transformers.
"""

import json
from pathlib import Path
from typing import Any

from datamodules.instructions import InstructionDataModule
from datamodules.text import TextDataModule
from datamodules.tokenizer import Tokenizer, load_tokenizer
from lit_modules.checkpoints.reading import config_of
from tokenformer import TokenFormerLM

READ_TEXT = {kind.__name__: kind for kind in (TextDataModule, InstructionDataModule)}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
PADDING_NAMES = ("<|padding|>", "<|pad|>", "<|PAD_TOKEN|>", "[PAD]", "<pad>")


def tokenizer_of(path: Path, given: str | None = None) -> Tokenizer:
    """The tokenizer of an exported language model, or of the run that wrote a checkpoint.

    Args:
        path: the folder or the checkpoint.
        given: in place of that: bytes, the path of a tokenizer.json or hub:NAME.

    Raises:
        ValueError: when it is not to be had.
    """
    if given is not None:
        return load_tokenizer(given)
    if (path / "tokenizer.json").is_file():
        return load_tokenizer(str(path / "tokenizer.json"))
    data = config_of(path).get("data", {})
    if phases := data.get("init_args", {}).get("phases"):  # which have one tokenizer
        data = phases[0]["data"]
    kind: Any = READ_TEXT.get(data.get("class_path", "").rsplit(".", 1)[-1])
    if kind is None:
        raise ValueError(
            f"{path}: has no tokenizer.json, nor is it in a run whose config.yaml names one: give one by --tokenizer"
        )
    return kind(**data["init_args"]).tokenizer


def check_tokenizer(tokenizer: Tokenizer, model: TokenFormerLM) -> None:
    """Refuse a tokenizer that makes ids which the model does not know.

    Raises:
        ValueError: for such a one.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer makes ids up to {tokenizer.vocab_size - 1}, the model has vocab_size="
            f"{model.config.vocab_size}: it is another model's; give --tokenizer"
        )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Write a tokenizer as `tokenizer.json`, and beside it what transformers wants to know of it."""
    tokenizer.save(folder / "tokenizer.json")
    write_tokenizer_files(folder, tokenizer.end_of_text, max_seq_len)


def write_tokenizer_files(folder: Path, end_of_text: int, max_seq_len: int) -> None:
    """Write `tokenizer_config.json` and `generation_config.json`, so that AutoTokenizer reads and `generate` stops.

    Batches are padded with a token of its own where the vocabulary has one, else with the end of a text; then
    collators that ignore padding in the loss ignore the end of a text too.

    Args:
        folder: has a `tokenizer.json`.
        end_of_text: the id that ends a text; texts begin after it.
        max_seq_len: of the model.

    Raises:
        ValueError: for an id that `tokenizer.json` does not have.
    """
    given = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab: dict[str, int] = dict(given["model"]["vocab"]) if isinstance(given["model"].get("vocab"), dict) else {}
    vocab |= {token["content"]: token["id"] for token in given.get("added_tokens", [])}
    names = [name for name, i in vocab.items() if i == end_of_text]
    if not names:
        raise ValueError(f"{folder / 'tokenizer.json'}: has no token of id {end_of_text}, the end of a text")
    padding = next((name for name in PADDING_NAMES if name in vocab), names[0])
    tokens = {"bos": names[0], "eos": names[0], "pad": padding}
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_seq_len,
            "clean_up_tokenization_spaces": False,  # decode(encode(text)) is the text
            "padding_side": "left",  # for generate, which goes on at the right
        }
        | {f"{role}_token": name for role, name in tokens.items()},
    )
    _write(folder / "generation_config.json", {f"{role}_token_id": vocab[name] for role, name in tokens.items()})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
