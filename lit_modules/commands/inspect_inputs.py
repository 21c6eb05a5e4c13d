"""What `inspect` and `shrink` show a model: the tokens of a text file, or the patches of a folder of images.

B batch, T inputs of a layer for each of its rows, K kinds. A place is a number that an input has in all of the text, or
in all of the images.
"""

import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from datamodules.image_batches import UNREADABLE
from datamodules.images import ImageDataModule
from datamodules.loader import IGNORE
from datamodules.reading import opened
from datamodules.text_batches import OrderedBatches
from datamodules.tokenizer import Tokenizer
from lit_modules.checkpoints.reading import config_of, read_header
from lit_modules.commands.predict import OF_DATA, described
from lit_modules.commands.streaming import NO_CHARACTER
from lit_modules.commands.tokenizers import check_tokenizer, tokenizer_of
from tokenformer import TokenFormerLM, TokenFormerViT
from tokenformer.files import is_exported
from tokenformer.inspection import Scored, scored
from tokenformer.loss import linear_cross_entropy

BATCH_INPUTS = 4096  # about so many inputs of a layer at a time
READ_CHARACTERS = 2**20  # of a text, at a time
SHOWN_PIXELS = 96  # side of a small image on the page
BEFORE, AFTER = 40, 10  # tokens shown around one that fires a token
PRIVATE = 0xF0000  # the first of 0x1FFFE characters that no text has
WORD = re.compile(rf"[\w{chr(PRIVATE)}-{chr(0x10FFFF)}]+")


class Batch(NamedTuple):
    """What a model is shown at a time.

    Attributes:
        inputs: ids (B, T) or images (B, C, H, W).
        places: of the inputs of a layer, (B * T); -1 for those that only fill up.
        rows: which outputs are counted.
        targets: theirs; IGNORE where unknown.
        kinds: which of them are of each kind, (outputs, K).
    """

    inputs: Tensor
    places: Tensor
    rows: Tensor
    targets: Tensor
    kinds: Tensor


class Texts:
    """A text file, whose ids lie on the disk: it may be larger than the memory.

    Kinds of tokens, which overlap: `frequent` ids are the most frequent ones of the text that make up half of it at
    most, `rare` ids the rarest that make up a tenth at most; `digits` are tokens with a digit; `names` lie in
    capitalised words, `copied` ones in words that stood before in what the model sees, `new` ones in all others.

    Raises:
        ValueError: for a file that is missing, empty or no text, and for the tokenizer of another model.
    """

    kinds = ("all", "frequent", "rare", "digits", "names", "copied", "new")

    def __init__(self, model: TokenFormerLM, source: Path, path: Path, tokenizer: str | None) -> None:
        if not path.is_file():
            raise ValueError(f"--text {path}: no such file")
        self.tokenizer = tokenizer_of(source, tokenizer)
        check_tokenizer(self.tokenizer, model)
        self.ids = _ids_on_disk(path, self.tokenizer)
        if len(self.ids) < 2:
            raise ValueError(f"--text {path}: is empty")
        self.model, self.choices = model, model.config.vocab_size
        self._pieces: dict[int, str] = {}
        self._letter = self.tokenizer.encode_batch(["a"])[0]
        counts = np.zeros(self.choices, dtype=np.int64)
        for start in range(0, len(self.ids), READ_CHARACTERS):
            counts += np.bincount(self.ids[start : start + READ_CHARACTERS], minlength=self.choices)
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        self.frequent, self.rare = (
            set(ids[counts[ids].cumsum() <= share * len(self.ids)].tolist())
            for ids, share in ((order, 0.5), (order[::-1], 0.1))
        )

        self.seq_len = min(model.config.max_seq_len, len(self.ids) - 1)

    def batches(self) -> Iterator[Batch]:
        """All of the text in order, each token a target once; it begins after the end of another text."""
        T = self.seq_len
        for i, (inputs, targets) in enumerate(OrderedBatches([self.ids], T, max(1, BATCH_INPUTS // T), 0, 1)):
            places = torch.arange(inputs.numel()) + i * inputs.numel()
            rows = targets.flatten() != IGNORE
            pairs = zip(inputs[:, 0].tolist(), targets.tolist(), strict=True)
            windows = [[first, *(i for i in ids if i != IGNORE)] for first, ids in pairs]
            kinds = torch.tensor([kinds for window in windows for kinds in self._kinds(window)])
            yield Batch(inputs, places.where(rows, -1), rows, targets.flatten()[rows], kinds)

    def score(self, batch: Batch) -> Scored:
        """What the model predicts for the outputs that count."""
        hidden = self.model.hidden(batch.inputs).flatten(0, 1)[batch.rows]
        return scored(hidden, lambda x: F.linear(x, self.model.output_weight), batch.targets)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of these, in nats, with a gradient."""
        hidden = self.model.hidden(batch.inputs).flatten(0, 1)[batch.rows]
        return linear_cross_entropy(hidden, self.model.output_weight, batch.targets)

    def described(self, batch: Batch) -> list[dict[str, Any]]:
        """What these outputs are of, for their rows in predictions.csv: the place that predicts, and the token."""
        places, ids = batch.places[batch.rows].tolist(), batch.targets.tolist()
        return [{"position": p, "id": i, "token": self._piece(i)} for p, i in zip(places, ids, strict=True)]

    def name(self, choice: int) -> str:
        """A prediction as a text."""
        return self._piece(choice)

    def context(self, place: int) -> dict[str, Any]:
        """The token at a place, between what stands before and behind it."""
        before = self.tokenizer.decode(self.ids[max(0, place - BEFORE) : place].tolist())
        after = self.tokenizer.decode(self.ids[place + 1 : place + 1 + AFTER].tolist())
        return {"position": place, "before": before, "at": self._piece(int(self.ids[place])), "after": after}

    def _piece(self, i: int) -> str:
        """What an id adds to a text."""
        if i not in self._pieces:  # behind a letter, since some tokenizers put a space between two tokens
            start = self.tokenizer.decode(self._letter)
            self._pieces[i] = self.tokenizer.decode([*self._letter, i]).removeprefix(start)
        return self._pieces[i]

    def _kinds(self, ids: list[int]) -> Iterator[list[bool]]:
        """Of each id of a window but the first, whether it is of each kind."""
        pieces = [self._piece(i) for i in ids]
        # Bytes of a character are no text: private characters stand for them, so that equal words look equal.
        text = [chr(PRIVATE + i % 0x1FFFE) if NO_CHARACTER in p else p for i, p in zip(ids, pieces, strict=True)]
        words = list(WORD.finditer("".join(text)))
        begins = [word.start() for word in words]
        seen: set[str] = set()
        is_new = []
        for word in words:
            is_new.append(word[0] not in seen)
            seen.add(word[0])
        end = len(text[0])
        for i, piece in zip(ids[1:], text[1:], strict=True):
            end += len(piece)
            at = end - len(piece.lstrip())
            n = bisect_right(begins, at) - 1
            inside = at < end and n >= 0 and at < words[n].end()
            yield [
                True,
                i in self.frequent,
                i in self.rare,
                any(map(str.isdigit, piece)),
                inside and words[n][0][0].isupper(),
                inside and not is_new[n],
                inside and is_new[n],
            ]


def _ids_on_disk(path: Path, tokenizer: Tokenizer) -> NDArray[np.uint32]:
    """The ids of a text behind the end of another one, mapped from a file that is gone when they are."""
    with TemporaryFile() as file, opened(path, remedy="save it as UTF-8") as text:
        array("I", [tokenizer.end_of_text]).tofile(file)
        while piece := text.read(READ_CHARACTERS):
            piece += text.readline(READ_CHARACTERS)  # to the end of its line, lest a word be cut
            array("I", tokenizer.encode_batch([piece])[0]).tofile(file)
        file.flush()
        return np.memmap(file, dtype=np.uint32, mode="r")


class Images:
    """A folder of images, with all that is below it; the class of one is that of its folder's name, if there is one.

    Raises:
        ValueError: for a folder that is missing or has no images, a model without classes.
    """

    kinds = ("all",)

    def __init__(self, model: TokenFormerViT, source: Path, path: Path) -> None:
        if not path.is_dir():
            raise ValueError(f"--images {path}: no such folder")
        if not model.num_classes:
            raise ValueError(f"{source}: has no classifier, so there is nothing that it predicts of images")
        cfg = model.pretrained_cfg if is_exported(source) else described(read_header(source), config_of(source))
        self.names = list(cfg.get("label_names") or map(str, range(model.num_classes)))
        settings: dict[str, Any] = {name: cfg[name] for name in OF_DATA if name in cfg}
        settings["in_channels"] = model.config.in_channels
        self.size = cfg.get("input_size", [model.config.image_size])[-1]
        self.model, self.choices, self.patch = model, model.num_classes, model.config.patch_size
        self.num_tokens = model.config.num_tokens(self.size)
        self.data = ImageDataModule(
            predict_source=str(path),
            class_names=self.names,
            image_size=self.size,
            batch_size=max(1, BATCH_INPUTS // self.num_tokens),
            num_workers=0,
            **settings,
        )
        images = self.data.images("predict")
        number = {name: i for i, name in enumerate(self.names)}
        folders = (Path(images.name(i)).parent.name for i in range(len(images)))
        images.labels = np.array([number.get(folder, IGNORE) for folder in folders])

    def batches(self) -> Iterator[Batch]:
        """All images in order, but those that can't be read, which are warned of."""
        for images, labels, indices in self.data.predict_dataloader():
            rows = (indices >= 0) & (labels != UNREADABLE)
            places = indices.unsqueeze(1) * self.num_tokens + torch.arange(self.num_tokens)  # (B, T)
            kinds = torch.ones(int(rows.sum()), 1, dtype=torch.bool)
            yield Batch(images, places.where(rows.unsqueeze(1), -1).flatten(), rows, labels[rows], kinds)

    def score(self, batch: Batch) -> Scored:
        """What the model predicts for the images that count."""
        return scored(self._pooled(batch), self.model.head, batch.targets)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of those whose class is known, in nats, with a gradient; nan of none."""
        return F.cross_entropy(self.model.head(self._pooled(batch)), batch.targets, ignore_index=IGNORE)

    def _pooled(self, batch: Batch) -> Tensor:
        images = batch.inputs.to(self.model.patch_embed.proj.weight)
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)[batch.rows]

    def described(self, batch: Batch) -> list[dict[str, Any]]:
        """The files and their classes, for their rows in predictions.csv."""
        places = batch.places.view(len(batch.rows), -1)[batch.rows, 0].tolist()
        files = [self.data.file_of("predict", place // self.num_tokens) for place in places]
        targets = [self.names[i] if i >= 0 else "" for i in batch.targets.tolist()]
        return [{"file": printable(f), "target": t} for f, t in zip(files, targets, strict=True)]

    def name(self, choice: int) -> str:
        """A class."""
        return self.names[choice]

    def context(self, place: int) -> dict[str, Any]:
        """The image at a place, and row and column of the patch in it; none of the class token."""
        image, row, column = self._patch(place)
        return {"file": printable(self.data.file_of("predict", image)), "row": row, "column": column}

    def picture(self, place: int) -> Image.Image:
        """The image at a place, with a frame around the patch; around all of it for the class token."""
        image, row, column = self._patch(place)
        pixels = self.data.image_of("predict", image).permute(1, 2, 0).squeeze(-1).numpy()  # (S, S) or (S, S, 3)
        times = max(1, SHOWN_PIXELS // self.size)
        shown = Image.fromarray(pixels).convert("RGB").resize((times * self.size,) * 2, Image.Resampling.NEAREST)
        x, y, side = (0, 0, self.size) if row is None else (column * self.patch, row * self.patch, self.patch)
        corners = (times * x, times * y, times * (x + side) - 1, times * (y + side) - 1)
        ImageDraw.Draw(shown).rectangle(corners, outline="#e07b00", width=2)
        return shown

    def _patch(self, place: int) -> tuple[int, Any, Any]:
        image, token = divmod(place, self.num_tokens)
        patch = token - self.model.num_prefix_tokens
        return (image, *divmod(patch, self.size // self.patch)) if patch >= 0 else (image, None, None)


def shown(
    model: TokenFormerLM | TokenFormerViT, source: Path, text: Path | None, images: Path | None, tokenizer: str | None
) -> Texts | Images:
    """What --text or --images names, for the model from `source`.

    Raises:
        ValueError: for the other of the two; see :class:`Texts` and :class:`Images`.
    """
    if isinstance(model, TokenFormerLM):
        if text is None:
            raise ValueError(f"--images {images}: {source} is a language model: give --text FILE")
        return Texts(model, source, text, tokenizer)
    if images is None or tokenizer is not None:
        raise ValueError(f"--text, --tokenizer: {source} is an image model: give --images FOLDER alone")
    return Images(model, source, images)


def printable(file: str) -> str:
    """A file's name, with bytes that are not UTF-8 replaced."""
    return os.fsencode(file).decode(errors="replace")
