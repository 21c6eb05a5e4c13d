"""TokenFormerLM in the lm-evaluation-harness (extra `eval`), and the harness's tasks on local files.

B batch, T sequence, D channels, S scored tokens, V vocabulary.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval.tasks
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lit_modules.commands.tokenizers import tokenizer_of
from lit_modules.modules.loading import Weights, load_model
from tokenformer import TokenFormerLM, generate
from tokenformer.int8 import quantize_blocks

# Scored tokens whose logits, S x V, are held at a time.
LOGIT_ROWS = 1024

Scored = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, ids of the context, ids of the continuation


@register_model("tokenformer")
class LMEvalModel(TemplateLM):
    """What the harness asks of a model: likelihoods of continuations and of texts, and text that goes on.

    Args:
        pretrained: an exported folder, or a checkpoint of a run.
        batch_size: sequences of a batch.
        device: default: a GPU, where there is one.
        dtype: float32, float16 or bfloat16. Default: the model's own. Scores are summed in float32 in any case.
        weights: of a checkpoint that has both: average (EMA) or raw.
        tokenizer: bytes, the path of a tokenizer.json or hub:NAME. Default: the model's.
        adapters: files of adapters to put on it.
        int8: keep the weights of its blocks in int8.

    Raises:
        ValueError: for what is no language model, a batch size below 1 and a device that is not there.
    """

    def __init__(
        self,
        pretrained: str | Path,
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str | None = None,
        weights: Weights = "average",
        tokenizer: str | None = None,
        adapters: Sequence[str] = (),
        int8: bool = False,
    ) -> None:
        super().__init__()
        if int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        model = load_model(Path(pretrained), weights, adapters)
        if not isinstance(model, TokenFormerLM):
            raise ValueError(
                f"{pretrained} is an image model, the tasks are of language: `tokenformer validate` gives its accuracy"
            )
        try:
            self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model = model.to(self._device, dtype=None if dtype is None else getattr(torch, dtype))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device}: {error}") from error
        if int8:
            quantize_blocks(model)
        self.tokenizer = tokenizer_of(Path(pretrained), tokenizer)
        self.batch_size = int(batch_size)
        self.max_length = model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The end of a text, after which the next one begins: the context of what has none."""
        return self.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; there are no special tokens to add."""
        return self.tokenizer.encode_batch([string])[0]

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens is the likeliest one.

        Raises:
            ValueError: for a continuation that is longer than the context, and for one without a token of its own. That
                would score as certain; the harness's own models refuse it, too.
        """
        if empty := [texts for texts, _, continuation in requests if not continuation]:
            context, continuation = empty[0] or ("", "")
            raise ValueError(
                f"{len(empty)} of {len(requests)} continuations have no token to score, such as {continuation!r} after "
                f"{context[-40:]!r}: the tokenizer puts its characters into the last token of the context. Let it "
                "begin with a space (a task's target_delimiter), or leave out the task (--tasks)"
            )
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(
                f"a continuation has {longest} tokens, more than max_seq_len={self.max_length}: leave out the task "
                "(--tasks), or train on longer sequences"
            )
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            warnings.warn(
                f"{cut} of {len(requests)} texts lose their beginning: max_seq_len={self.max_length}", stacklevel=2
            )
        scores: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihoods", disable=disable_tqdm) as progress:
            for batch in self._batches([len(context) + len(continuation) for _, context, continuation in requests]):
                scores |= zip(batch, self._score([requests[i][1:] for i in batch]), strict=True)
                progress.update(len(batch))
        for i, request in enumerate(requests):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], scores[i])
        return [scores[i] for i in range(len(requests))]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Places of sequences of similar length, the longest first: what does not fit into memory fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    @torch.no_grad()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One batch of pairs of context and continuation."""
        inputs = [
            torch.tensor((context + continuation)[-(self.max_length + 1) : -1]) for context, continuation in pairs
        ]
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # (B, T), on the right: never seen
        counts = [len(continuation) for _, continuation in pairs]
        rows = torch.arange(len(pairs)).repeat_interleave(torch.tensor(counts))  # (S)
        places = torch.cat([torch.arange(len(x) - n, len(x)) for x, n in zip(inputs, counts, strict=True)])  # (S)
        targets = torch.tensor([i for _, continuation in pairs for i in continuation]).to(self._device)  # (S)
        hidden = self.model.hidden(ids.to(self._device))  # (B, T, D)
        hidden = hidden[rows.to(self._device), places.to(self._device)]  # (S, D)
        parts = [self._nats(h, t) for h, t in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)]
        nats, greedy = (torch.cat(part).cpu().split(counts) for part in zip(*parts, strict=True))
        return [(-float(n.sum()), bool(g.all())) for n, g in zip(nats, greedy, strict=True)]

    def _nats(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of targets (S) given hidden states (S, D), and whether they are the likeliest, both (S)."""
        logits = F.linear(hidden, self.model.output_weight).float()  # (S, V)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows as long as the model's sequences."""
        owners: list[int] = []
        windows: list[Scored] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                owners.append(i)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for i, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text that goes on after each context until one of its stop sequences, which is left out."""
        texts: dict[int, str] = {}
        kinds = {json.dumps(request.args[1], sort_keys=True): request.args[1] for request in requests}
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm) as progress:
            for kind, settings in kinds.items():
                places = [i for i, r in enumerate(requests) if json.dumps(r.args[1], sort_keys=True) == kind]
                prompts = [self.tok_encode(requests[i].args[0]) or [self.eot_token_id] for i in places]
                for batch in self._batches([len(prompt) for prompt in prompts]):
                    going_on = self._generate([prompts[i] for i in batch], settings)
                    texts |= zip([places[i] for i in batch], going_on, strict=True)
                    progress.update(len(batch))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _generate(self, prompts: list[list[int]], given: dict[str, Any]) -> list[str]:
        """One batch of :meth:`generate_until`, of the same settings."""
        settings: Any = normalize_gen_kwargs(given)
        most = settings["max_gen_toks"]
        if most >= self.max_length:
            raise ValueError(f"max_gen_toks={most}: leaves no room for a prompt, max_seq_len={self.max_length}")
        prompts = [prompt[most - self.max_length :] for prompt in prompts]

        def ended(_: int, ids: list[int]) -> bool:
            return ids[-1] == self.eot_token_id or any(s in self.tokenizer.decode(ids) for s in settings["until"] if s)

        rows = generate(
            self.model,
            prompts,
            most,
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_k=settings.get("top_k"),
            top_p=settings.get("top_p"),
            stop=ended,
        )
        new = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
        new = [ids[: ids.index(self.eot_token_id)] if self.eot_token_id in ids else ids for ids in new]
        return [postprocess_generated_text(self.tokenizer.decode(ids), settings["until"], None) for ids in new]


# The harness's own definitions of the tasks that can run on local files, in its folder of tasks.
LOCAL_TASKS = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "winogrande": "winogrande/default.yaml",
}


def local_tasks(names: list[str], folder: Path) -> list[Any]:
    """The harness's tasks, prompts and metrics its own, with rows from `folder`/NAME*.jsonl.

    Args:
        names: some of LOCAL_TASKS.
        folder: files in the formats of the data sets.

    Raises:
        ValueError: for other tasks, and files that are missing or ambiguous.
    """
    if unknown := [name for name in names if name not in LOCAL_TASKS]:
        raise ValueError(f"--local has no format for {', '.join(unknown)}; it knows {', '.join(LOCAL_TASKS)}")
    definitions = Path(lm_eval.tasks.__file__).parent
    with TemporaryDirectory() as made:
        for name in names:
            found = sorted(folder.glob(f"{name}*.jsonl"))
            if len(found) != 1:
                what = "none" if not found else ", ".join(path.name for path in found)
                raise ValueError(f"--local {folder}: needs one file {name}*.jsonl, has {what}")
            config = {
                "include": str(definitions / LOCAL_TASKS[name]),
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"local": str(found[0].resolve())}},
                "training_split": None,
                "validation_split": None,
                "test_split": "local",
            }
            (Path(made) / f"{name}.yaml").write_text(yaml.safe_dump(config))
        manager = lm_eval.tasks.TaskManager(include_path=made, include_defaults=False)
        tasks: dict[str, Any] = manager.load(names)["tasks"]
    return [tasks[name] for name in names]
