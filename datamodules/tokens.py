"""Token files: written once, memory-mapped ever after.

A folder holds those of `train.bin`, `val.bin` and `test.bin` that are asked for: the ids of all documents, each
followed by the end-of-text id, as little-endian uint16 or uint32; `tokenizer.json` unless the tokens are bytes; and
`metadata.json`. The folder is written under another name and renamed when whole.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.encoding import encode_all, pieces
from datamodules.sources import Source
from datamodules.splits import documents_of, too_few
from datamodules.tokenizer import JSONTokenizer, Tokenizer, load_tokenizer, train_bpe

FORMAT = 1
SAMPLED_BLOCKS, SAMPLED_BLOCK = 64, 2**12  # of a fingerprint; tokens


@dataclass
class Split:
    """One token file: what it holds.

    Attributes:
        tokens: ids, the end-of-text ones too.
        documents: documents.
        bytes: UTF-8 bytes of their text; bits per byte are counted on these.
    """

    tokens: int = 0
    documents: int = 0
    bytes: int = 0


class TokenFile:
    """One split of a token folder, memory-mapped.

    Attributes:
        ids: all token ids, (tokens,), uint16 or uint32, not yet read from disk.
        split: counts.

    Raises:
        ValueError: when the folder is missing, half-written or corrupted.
    """

    def __init__(self, folder: Path, split: str) -> None:
        metadata = read_metadata(folder)
        path = folder / f"{split}.bin"
        if split not in metadata["splits"]:
            raise ValueError(f"token folder {folder} has no split {split!r}, but {', '.join(metadata['splits'])}")
        self.split = Split(**metadata["splits"][split])
        dtype = np.dtype(metadata["dtype"]).newbyteorder("<")
        expected = self.split.tokens * dtype.itemsize
        actual = path.stat().st_size if path.exists() else 0
        if actual != expected or not expected:
            raise ValueError(
                f"token file {path} has {actual} bytes instead of {expected}: half-written or corrupted; "
                f"delete {folder} and run `tokenformer prepare` again"
            )
        self.ids: NDArray[Any] = np.memmap(path, dtype=dtype, mode="r")

    def fingerprint(self) -> str:
        """A hash of the length and of blocks from all over the file, in time that does not depend on its size."""
        digest = hashlib.blake2b(str(len(self.ids)).encode(), digest_size=8)
        for start in np.linspace(0, max(0, len(self.ids) - SAMPLED_BLOCK), SAMPLED_BLOCKS, dtype=np.int64):
            digest.update(self.ids[start : start + SAMPLED_BLOCK].tobytes())
        return digest.hexdigest()


def read_metadata(folder: Path) -> dict[str, Any]:
    """`metadata.json` of a token folder.

    Raises:
        ValueError: when it is missing (the folder is half-written) or of another format.
    """
    path = folder / "metadata.json"
    if not path.is_file():
        raise ValueError(
            f"token folder {folder} has no metadata.json: it is half-written or not a token folder; "
            "delete it and run `tokenformer prepare` again"
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if (found := metadata["format"]) == FORMAT:
            metadata.setdefault("recipe", {}).keys()
            counts = [count for split in metadata["splits"].values() for count in asdict(Split(**split)).values()]
            if metadata["dtype"] not in ("uint16", "uint32") or not all(type(count) is int for count in counts):
                raise ValueError("other numbers than token files have")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is corrupted: delete {folder} and run `tokenformer prepare` again") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, not {FORMAT}: delete {folder} and prepare again")
    return dict(metadata)


def prepare(
    folder: Path,
    sources: dict[str, Source],
    tokenizer_name: str,
    *,
    bpe_vocab_size: int,
    val_fraction: float,
    num_threads: int,
) -> None:
    """Tokenize sources into a token folder, or check that the folder there was made from them.

    Without a `val` source, documents are held out by the hash of their text: the same text is never on both sides.
    Where they are too few for that (one file, as most begin), the end of each one's text is.

    Args:
        folder: where the tokens go.
        sources: of `train`, `val` and `test`, those that there are.
        tokenizer_name: see :func:`load_tokenizer`; `bpe` trains one on the training documents.
        bpe_vocab_size: its size.
        val_fraction: share of the documents, or of their text, to hold out when there is no `val` source.
        num_threads: threads that encode.

    Raises:
        ValueError: when the folder is half-written or was made from something else, or a split would be empty.
    """
    held_out = 0.0 if "val" in sources else val_fraction
    recipe = {
        "sources": {split: source.fingerprint() for split, source in sources.items()},
        "tokenizer": tokenizer_name if tokenizer_name == "bpe" else load_tokenizer(tokenizer_name).fingerprint,
        "bpe_vocab_size": bpe_vocab_size if tokenizer_name == "bpe" else None,
        "val_fraction": held_out,
    }
    if folder.exists():
        made_from = read_metadata(folder)["recipe"]
        if differences := [key for key in recipe if recipe[key] != made_from.get(key)]:
            shown = "; ".join(f"{key}: {made_from.get(key)} then, {recipe[key]} now" for key in differences)
            raise ValueError(f"token folder {folder} was made from other data ({shown}); delete it to tokenize again")
        return

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"data.cache_dir={str(folder.parent)!r}: no folder can be made there: {error}") from error
    if leftovers := [path for path in folder.parent.glob(f"{folder.name}.partial-*") if path != partial]:
        warnings.warn(f"unless another process is writing them, delete what it left: {leftovers}", stacklevel=2)
    tokens = partial / "tokens"  # whoever may read a new folder may read this one; `partial` is for its owner alone
    try:
        tokens.mkdir()
        _write(tokens, sources, tokenizer_name, bpe_vocab_size, held_out, num_threads, recipe)
        try:
            tokens.rename(folder)
        except OSError as error:  # another run was faster; its folder was made from the same recipe or is refused
            if not folder.exists():
                raise ValueError(f"token folder {folder} can't be made ({error}): remove what is there") from error
            prepare(
                folder,
                sources,
                tokenizer_name,
                bpe_vocab_size=bpe_vocab_size,
                val_fraction=val_fraction,
                num_threads=num_threads,
            )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    folder: Path,
    sources: dict[str, Source],
    tokenizer_name: str,
    bpe_vocab_size: int,
    held_out: float,
    num_threads: int,
    recipe: dict[str, Any],
) -> None:
    ends = bool(held_out) and too_few(sources, held_out)
    if ends:
        rank_zero_info(
            f"too few documents to hold any out: the last {held_out:.3g} of each one's text is validation data"
        )
    if tokenizer_name == "bpe":
        training = (text for split, text, _ in pieces(documents_of(sources, held_out, ends)) if split == "train")
        tokenizer: Tokenizer = train_bpe(training, bpe_vocab_size)
    else:
        tokenizer = load_tokenizer(tokenizer_name)
    if isinstance(tokenizer, JSONTokenizer):
        tokenizer.save(folder / "tokenizer.json")

    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    names = [*dict.fromkeys([*sources, *(["val"] if held_out else [])])]
    splits = {name: Split() for name in names}
    files: dict[str, BinaryIO] = {name: (folder / f"{name}.bin").open("wb") for name in names}
    texts = pieces(documents_of(sources, held_out, ends))
    with tqdm(desc="tokenizing", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for name, num_documents, num_bytes, ids in encode_all(texts, tokenizer, dtype, num_threads):
            files[name].write(ids)
            counts = splits[name]
            counts.tokens += len(ids) // dtype.itemsize
            counts.documents += num_documents
            counts.bytes += num_bytes
            bar.update(num_bytes)
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
        file.close()

    total = sum(counts.documents for counts in splits.values())
    for name, counts in splits.items():
        if counts.documents == 0:
            raise ValueError(
                f"the {name} split is empty"
                + (f": its source has no document with text ({total} in the other splits)" if total else "")
            )
    metadata = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "whole_vocab": True,  # of older folders the model has data.bpe_vocab_size, though the tokenizer has fewer
        "end_of_text": tokenizer.end_of_text,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": {name: asdict(counts) for name, counts in splits.items()},
        "sources": {name: source.name for name, source in sources.items()},
        "recipe": recipe,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
