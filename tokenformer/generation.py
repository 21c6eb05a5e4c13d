"""Sampling text from a language model. B prompts, T ids of a prompt, V vocabulary."""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import TypeVar

import torch
from torch import Tensor

from tokenformer.language import TokenFormerLM

Prompts = TypeVar("Prompts", Tensor, list[list[int]])
# What ends a row: sequences of ids that it may end with, or a function of the row's number and its new ids so far.
Stop = Sequence[Sequence[int]] | Callable[[int, list[int]], bool]


def generate(
    model: TokenFormerLM,
    prompts: Prompts,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Stop = (),
    generator: torch.Generator | None = None,
) -> Prompts:
    """Append sampled ids to prompts. A row does not depend on what the other rows are.

    Args:
        model: the language model; its mode and device are kept.
        prompts: ids of each, at least one; a tensor (B, T), or lists of any lengths.
        max_new_tokens: how many ids to add.
        temperature: divides the logits; 0 takes the likeliest id.
        top_k: sample among the k likeliest ids only.
        top_p: sample only among the likeliest ids that together have this probability, as few as do.
        stop: sequences of ids, a row ends with the first that it has written; or a function of a row's number and its
            new ids so far that says whether it ends. For prompts in lists.
        generator: source of randomness; each row's is seeded from it.

    Returns:
        Prompts with the new ids: (B, T + max_new_tokens), or lists.

    Raises:
        ValueError: before any work, for settings and prompts that can't work, and when prompt and new ids are more than
            `max_seq_len`.
    """
    if isinstance(prompts, Tensor) and stop:
        raise ValueError("stop: rows may end at different lengths then; give the prompts as lists of ids")
    rows: list[list[int]] = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    for step in stream(model, rows, max_new_tokens, temperature, top_k, top_p, stop, generator):
        for row, new_id in step.items():
            rows[row].append(new_id)
    return torch.tensor(rows, device=prompts.device) if isinstance(prompts, Tensor) else rows


def stream(
    model: TokenFormerLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Stop = (),
    generator: torch.Generator | None = None,
    crop: bool = False,
) -> Iterator[dict[int, int]]:
    """:func:`generate` a step at a time: yields the new id of each row that has not ended, by the row's number.

    The model must stay as it is meanwhile. Whether a row has ended is asked when the next step is. With `crop` a row
    may be longer than the context: from there on each new id comes from the last `max_seq_len` ids, all read again for
    it, as in nanoGPT.
    """
    _check_prompts(model, prompts, max_new_tokens, crop)
    sampler = Sampler(len(prompts), temperature, top_k, top_p, generator)
    return _steps(model, prompts, max_new_tokens, sampler, stop)


@torch.no_grad()
def _steps(
    model: TokenFormerLM, prompts: list[list[int]], max_new_tokens: int, sampler: "Sampler", stop: Stop
) -> Iterator[dict[int, int]]:
    device, context = model.embedding.weight.device, model.config.max_seq_len
    room = min(context, max(map(len, prompts)) + max_new_tokens)
    texts = [list(prompt) for prompt in prompts]
    new_ids: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # that have not ended
    cache = None
    for _ in range(max_new_tokens):
        if cache is None or max(cache.lengths) == context:  # which comes only where texts are cropped
            seen = [texts[row][-context:] for row in rows]
            cache = model.new_cache(len(rows), room, joins=True)
            longest = max(map(len, seen))
            ids = torch.tensor([text + [0] * (longest - len(text)) for text in seen], device=device)
            last = torch.tensor([len(text) - 1 for text in seen], device=device)
        with torch.compiler.set_stance("force_eager"):  # each step has another length: too many to compile for
            logits = model(ids, cache, only_at=last)  # (B, V)
        # Without the padding of prompts.
        cache.lengths = [min(context, len(texts[row])) for row in rows]
        step = dict(zip(rows, sampler.choose(logits, rows), strict=True))
        for row, new_id in step.items():
            texts[row].append(new_id)
            new_ids[row].append(new_id)
        yield step
        going = [i for i, row in enumerate(rows) if not _ends(stop, row, new_ids[row])]
        if not going:
            return
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[i] for i in going]
        ids = torch.tensor([[step[row]] for row in rows], device=device)  # (B, 1)
        last = torch.zeros(len(rows), dtype=torch.long, device=device)


def _ends(stop: Stop, row: int, ids: list[int]) -> bool:
    if callable(stop):
        return stop(row, ids)
    return any(ids[-len(sequence) :] == list(sequence) for sequence in stop)


class Dialogue:
    """A text that a user and a model write in turns; what has been read stays in the cache and is not read again.

    When it no longer fits into the context, its oldest part is dropped: half of a context stays, or what the user has
    added since, if that is more.

    Args:
        model: the language model, which stays as it is meanwhile.
        ids: how the text begins, at least one.
        sampler: of one row.

    Attributes:
        ids: the text, to be appended to or cut; without what was dropped.
        num_dropped: ids.
    """

    def __init__(self, model: TokenFormerLM, ids: list[int], sampler: "Sampler") -> None:
        self.ids, self.num_dropped = list(ids), 0
        self._model, self._sampler, self._cache = model, sampler, model.new_cache(joins=True)
        self._read: list[int] = []  # what the cache holds

    @torch.no_grad()
    def write(self) -> int:
        """Append the next id."""
        known = self._num_known()
        context = self._model.config.max_seq_len
        if len(self.ids) > context:
            kept = max(context // 2, min(len(self.ids) - known, context))
            self.num_dropped += len(self.ids) - kept
            self.ids = self.ids[-kept:]
            known = self._num_known()
        self._cache.lengths = [known]
        device = self._model.embedding.weight.device
        ids = torch.tensor([self.ids[known:]], device=device)
        with torch.compiler.set_stance("force_eager"):
            logits = self._model(ids, self._cache, only_at=torch.tensor([ids.shape[1] - 1], device=device))
        self._read = list(self.ids)  # only now: whoever interrupts the model leaves a cache that is read again
        (new_id,) = self._sampler.choose(logits, [0])
        self.ids.append(new_id)
        return new_id

    def _num_known(self) -> int:
        """So many ids at the beginning are in the cache; the last one is read for what follows."""
        same = (one == other for one, other in zip(self.ids, self._read, strict=False))
        return min(sum(takewhile(bool, same)), len(self.ids) - 1)


class Sampler:
    """Chooses ids from logits; each row has random numbers of its own. Arguments are those of :func:`generate`."""

    def __init__(
        self,
        num_rows: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not temperature >= 0:  # NaN is refused too
            raise ValueError(f"temperature={temperature}: must be at least 0, which takes the likeliest id")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1; leave it out to sample from all ids")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        device = "cpu" if generator is None else generator.device
        seeds = [int(torch.randint(2**62, (), generator=generator, device=device)) for _ in range(num_rows)]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits: Tensor, rows: list[int]) -> list[int]:
        """The ids of some rows, from their logits (B, V)."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        uniform = torch.stack([torch.rand((), generator=self._generators[row], dtype=torch.float64) for row in rows])
        return draw(self.distribution(logits), uniform).tolist()

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities (B, V) from logits (B, V): first temperature, then top_k, then top_p."""
        logits = logits.float()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # finite at the lowest temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True)
            likelier = ordered.cumsum(-1) - ordered  # what those before have together
            kept = ordered.masked_fill(likelier >= self.top_p, 0)
            probabilities = torch.zeros_like(ordered).scatter(-1, order, kept / kept.sum(-1, keepdim=True))
        return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Ids (B,) for numbers (B,) from [0, 1), by the inverse of the cumulative probabilities (B, V)."""
    wide = torch.float32 if probabilities.device.type == "mps" else torch.float64
    cumulative = probabilities.to(wide).cumsum(-1)
    target = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(probabilities.shape[-1] - 1)


def _check_prompts(model: TokenFormerLM, prompts: list[list[int]], max_new_tokens: int, crop: bool) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if not prompts:
        raise ValueError("prompts: there is none")
    context, vocab_size = model.config.max_seq_len, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: begin it with the id that ends a text")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}, vocab_size={vocab_size}")
        if (length := len(prompt) + max_new_tokens) > context and not crop:
            room = context - len(prompt)
            raise ValueError(
                f"prompt {i} of {len(prompt)} tokens and max_new_tokens={max_new_tokens} make {length}, past the "
                f"model's context, max_seq_len={context}: "
                + (f"ask for at most {room}, or " if room > 0 else "")
                + "give less of a prompt, or crop (--crop)"
            )
