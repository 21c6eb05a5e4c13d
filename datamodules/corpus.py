"""A corpus: documents of one or more splits, and the folder that has them as tokens."""

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from datamodules.sources import HuggingFace, Source, TextFormat, open_source
from datamodules.tokens import TokenFile, prepare

VAL_SPLITS = ("validation", "val", "valid", "dev")

Spec = str | list[str]  # a source, or several


def own_splits(source: Source) -> dict[str, str]:
    """The sources of `val` and `test` that a Hugging Face dataset has for itself."""
    own = source.splits() if isinstance(source, HuggingFace) else []
    names = {"val": next((name for name in VAL_SPLITS if name in own), None), "test": "test" if "test" in own else None}
    return {split: f"{source.name.partition('@')[0]}@{name}" for split, name in names.items() if name}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Where documents come from and where their tokens are; nothing is read before it is asked for.

    Attributes:
        specs: the sources of train, val and test; None where there is none of its own.
        tokenizer: its name, see :func:`load_tokenizer`, or `bpe`.
        form: how to find documents in the sources.
        val_fraction: share of the training documents to hold out where there is no source for val; 0 for none, then
            the only splits are those of `specs`.
        bpe_vocab_size: size of the vocabulary that `bpe` trains.
        cache_dir: the folder is in here.
    """

    specs: tuple[Spec | None, ...]
    tokenizer: str
    form: TextFormat
    val_fraction: float
    bpe_vocab_size: int
    cache_dir: Path

    @property
    def name(self) -> str:
        """What a user calls it."""
        spec = next(spec for spec in self.specs if spec)
        return spec if isinstance(spec, str) else ", ".join(spec)

    @property
    def folder(self) -> Path:
        """Where the tokens are: a name to recognise, and a hash of all settings that they depend on."""
        settings = [*self.specs, self.tokenizer, self.val_fraction, self.form.text_field, self.form.document_separator]
        settings += [self.form.encoding] if self.form.encoding != "utf-8" else []
        settings += [self.bpe_vocab_size] if self.tokenizer == "bpe" else []
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        first = next(spec if isinstance(spec, str) else spec[0] for spec in self.specs if spec)
        words = (Path(first).stem, Path(self.tokenizer).parent.name or self.tokenizer)
        return self.cache_dir / re.sub(r"[^\w.-]+", "-", "-".join((*words, digest)))

    def sources(self) -> dict[str, Source]:
        """The source of each split that has one of its own."""
        given = {split: spec for split, spec in zip(("train", "val", "test"), self.specs, strict=True) if spec}
        sources = {split: open_source(spec, self.form) for split, spec in given.items()}
        own = own_splits(sources["train"]) if "train" in sources and self.val_fraction else {}
        return sources | {split: open_source(spec, self.form) for split, spec in own.items() if split not in given}

    def prepare(self, num_threads: int) -> None:
        """Tokenize, unless it is done already. Tokens whose source is gone are used as they are, with a warning.

        Args:
            num_threads: threads that encode.

        Raises:
            ValueError: see :func:`datamodules.tokens.prepare`.
        """
        try:
            sources = self.sources()
        except ValueError as error:
            if not self.folder.exists():
                raise
            warnings.warn(f"{error}; the tokens in {self.folder} are used as they are", stacklevel=2)
            return
        prepare(
            self.folder,
            sources,
            self.tokenizer,
            bpe_vocab_size=self.bpe_vocab_size,
            val_fraction=self.val_fraction,
            num_threads=num_threads,
        )

    def tokens(self, split: str) -> TokenFile:
        """The token file of a split; see :class:`TokenFile`."""
        return TokenFile(self.folder, split)
