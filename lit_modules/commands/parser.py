"""The parser of configs and command lines: what is given wins as a whole, and what is wrong is said in a line."""

import os
import pydoc
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn, get_origin

import yaml
from jsonargparse import _typehints
from jsonargparse._util import NestedArg
from lightning.pytorch.cli import LightningArgumentParser

# What nanoGPT, litgpt, transformers and timm call our keys; nothing where there is no such thing here.
FOREIGN = {
    "model.config.depth": "n_layer n_layers num_layers num_hidden_layers layers num_blocks",
    "model.config.num_heads": "n_head n_heads heads num_attention_heads",
    "model.config.dim": "n_embd n_embed hidden_size d_model embed_dim width",
    "model.config.max_seq_len": "block_size context_length max_position_embeddings n_positions",
    "model.config.vocab_multiple": "padding_multiple pad_vocab_size_multiple",
    "model.config.tie_embeddings": "tie_word_embeddings",
    "model.config.rotary_fraction": "rotary_percentage rotary_pct partial_rotary_factor",
    "model.config.image_size": "img_size input_size",
    "model.config.in_channels": "in_chans num_channels",
    "model.config.drop_path": "drop_path_rate",
    "model.optim.lr": "learning_rate max_lr",
    "model.optim.betas": "beta1 beta2 adam_beta1 adam_beta2 opt_betas",
    "model.optim.eps": "adam_epsilon opt_eps",
    "model.optim.schedule": "lr_scheduler_type lr_scheduler sched decay_lr",
    "model.optim.warmup_steps": "warmup_iters lr_warmup_steps warmup warmup_ratio warmup_epochs",
    "model.optim.min_lr_ratio": "min_lr",
    "model.checkpoint_activations": "gradient_checkpointing grad_checkpointing",
    "data.batch_size": "micro_batch_size per_device_train_batch_size",
    "data.seq_len": "max_seq_length sequence_length",
    "data.source": "dataset dataset_name data_dir train_data_dir",
    "trainer.max_steps": "max_iters train_iters num_steps",
    "trainer.max_epochs": "epochs num_train_epochs num_epochs",
    "trainer.accumulate_grad_batches": "gradient_accumulation_steps gradient_accumulation_iters grad_accum_steps",
    "trainer.gradient_clip_val": "grad_clip max_grad_norm max_norm clip_grad",
    "trainer.precision": "dtype fp16 bf16 amp",
    "trainer.val_check_interval": "eval_interval eval_steps eval_iters",
    "trainer.log_every_n_steps": "log_interval logging_steps",
    "checkpoint.every_n_train_steps": "save_interval save_steps",
    "checkpoint.save_top_k": "save_total_limit",
    "seed_everything": "random_seed",
    "run_dir": "out_dir output_dir output",
    "ckpt_path": "resume resume_from_checkpoint ckpt",
    "": "dropout attn_dropout resid_pdrop attn_pdrop embd_pdrop hidden_dropout_prob bias intermediate_size mlp_ratio",
}
OURS = {name: key for key, names in FOREIGN.items() for name in names.split()}
UNKNOWN = re.compile(
    r"Group '([\w.]+)' does not accept option '([\w.]+)'|Option '([\w.]+)' is not accepted"
    r"|[Kk]ey '([\w.]+)' is not expected|unrecognized arguments: -*([\w.]+)"
)
LARGEST_CONFIG = 100_000  # values; a few lines of aliases of aliases may stand for more than a machine holds
ALL_KEYS = "(`tokenformer COMMAND --help.all` lists all keys)"


def _expanded_size(path: Any) -> int:
    """Values in a YAML file with its aliases written out; 0 of what is none, which the parser says better."""
    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return 0
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # of one that holds itself
            parts = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else ()
            sizes[id(node)] += sum(sum(map(size, part)) if isinstance(part, tuple) else size(part) for part in parts)
        return sizes[id(node)]

    return size(root) if root is not None else 0


_adapt = _typehints.adapt_typehints


def _as_given(val: Any, typehint: Any, *args: Any, **settings: Any) -> Any:
    """Lists win as a whole, and so do dicts: their items are not mixed with those that were at their places before.

    jsonargparse does that: `qkv` of a file's first stage went into the first stage of the command line, which said
    nothing of qkv. What is appended, or is one key of an item, still goes with what is there.
    """
    origin = get_origin(typehint)
    container = isinstance(origin, type) and issubclass(origin, Iterable)
    if container and not settings.get("append") and not isinstance(val, NestedArg):
        settings["prev_val"] = None
    return _adapt(val, typehint, *args, **settings)


_typehints.adapt_typehints = _as_given


class ArgumentParser(LightningArgumentParser):
    """Says what is wrong in a line, with the nearest key of the class at hand for an unknown one; no page of usage.

    The parsers of classes (of `model`, a callback, ...) are of this kind, too; what they say goes into what the whole
    one says.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"allow_abbrev": False})

    _file: Any = None  # the config that is read

    def parse_path(self, cfg_path: Any, *args: Any, **settings: Any) -> Any:
        """As jsonargparse's."""
        self._file = cfg_path
        if (size := _expanded_size(cfg_path)) > LARGEST_CONFIG:
            self.error(f"{cfg_path}: stands for {size:,} values by aliases (*NAME): write out what is needed")
        parsed = super().parse_path(cfg_path, *args, **settings)
        self._file = None
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: D102 - as argparse's
        if "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        if self._file is not None and message.startswith("Problems parsing config: "):
            problem = re.sub(r'in "<unicode string>", |\s+', lambda found: "in " if "<" in found[0] else " ", message)
            message = f"{self._file}: no YAML: {problem.removeprefix('Problems parsing config: ')}"
        elif self._file is not None and message.startswith("Unexpected config: "):
            message = f"{self._file}: holds no keys and values"
        if unknown := UNKNOWN.match(message):
            message = self._unknown(".".join(filter(None, unknown.groups())), message)
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"error: {in_a_line(message)}\n{ALL_KEYS}\n")
        self.exit(2)

    def _unknown(self, key: str, message: str) -> str:
        if stray := re.match(r"unrecognized arguments: ([^-]\S*)", message):
            return f"unknown argument {stray[1]!r}: give --KEY VALUE"
        names = [action.dest for action in self._actions]
        near = nearest(key, [*names, *FOREIGN] if self.exit_on_error else names)
        return f"unknown key '{key}'" + (f": did you mean '{near}'?" if near else "")


def nearest(key: str, names: list[str]) -> str | None:
    """The name that was meant by an unknown one, if one of `names` is like it or is what it is called elsewhere."""
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    last_part = key.rpartition(".")[2]
    if last_part in last:
        return last[last_part]
    if last_part in OURS:
        return last.get(OURS[last_part].rpartition(".")[2]) or None
    if whole := get_close_matches(key, names, n=1, cutoff=0.9):
        return whole[0]
    return next((last[name] for name in get_close_matches(last_part, last, n=1, cutoff=0.65)), None)


# What jsonargparse writes around the complaints, and complaints about readings that were not meant.
AROUND = re.compile(
    "Does not validate|Subtypes:|Errors:|Given value|Expected a path but|Not a valid subclass|Subclass types expect"
    "|a class path|a dict with"
)


def in_a_line(message: str) -> str:
    """The innermost complaint of jsonargparse's tree of them, with the whole key and the value."""
    lines = message.splitlines()
    around: list[tuple[int, str, str]] = []  # what a line is in: indentation, key, class
    found: list[tuple[list[tuple[int, str, str]], int, str]] = []  # that, the number of the line, the complaint
    for number, line in enumerate(lines):
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        opening = re.match(r"Parser key \"(.+?)\"|Problem with given class_path '(.+?)'", text)
        around = [outer for outer in around if outer[0] < indent + (not opening)]
        if opening:
            around.append((indent, opening[1] or "", opening[2] or ""))
            text = text[opening.end() :].lstrip(": ")
        if text and not AROUND.match(text):
            found.append((around, number, text))
    around, number, complaint = max(found, key=lambda leaf: len(leaf[0]), default=([], 0, message))
    if not around or "while parsing" in complaint:
        return message
    key = ".".join(dict.fromkeys(name for _, name, _ in around if name))
    of = next((path for *_, path in reversed(around) if path), "")
    if complaint.startswith("unknown key"):
        complaint = re.sub(r"'([\w.]+)'", rf"'{key}.\1'", complaint)
        return re.sub(r"^(unknown key '.*?')", rf"\1 of {of.rpartition('.')[2]}", complaint) if of else complaint
    if not complaint.startswith("Expected"):
        return ": ".join(filter(None, (key, of, complaint)))
    value = re.search(r"(?:Got|Given) value: (.*)", "\n".join(lines[number:]))
    if value and (nested := re.match(r"NestedArg\(key='(.+?)'", value[1])):  # of what is a name, such as ddp
        return f"unknown key '{key}.{nested[1]}'"
    if path := re.match("Expected a dot import path string: (.*)", complaint):
        return f"{key}={path[1]!r}: no such class{_meant(path[1], _class_names(message))}"
    wanted = [text.partition(". Got value")[0] for where, _, text in found if where == around]
    choices = list(dict.fromkeys(choice for text in wanted for choice in _choices(text)))
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
    given = value[1] if value else ""
    return f"{key}={given!r}: must be {listed}{_meant(given, choices)}"


def _choices(text: str) -> list[str]:
    """What "Expected a <class 'int'>" or "Expected a typing.Literal['a', 'b']" accepts."""
    text = re.sub(r"^Expected (?:an? )?", "", text)
    if literal := re.match(r"typing\.Literal\[(.*)\]", text):
        return [choice.strip("' ") for choice in literal[1].split(",")]
    named = re.match(r"<class '(?:\w+\.)*(\w+)'>", text)
    return [text if not named else "null" if named[1] == "NoneType" else named[1]]


def _class_names(message: str) -> list[str]:
    """Names of the classes that can be given where the message says that one of Lightning's base classes is wanted."""
    wanted = re.search("Subtypes: (.*)", message)
    known: list[Any] = [pydoc.locate(path) for path in re.findall(r"lightning(?:\.\w+)+", wanted[1] if wanted else "")]
    for cls in known:
        known += [sub for sub in cls.__subclasses__() if sub not in known]
    return [cls.__name__ for cls in known]


def _meant(given: str, names: list[str]) -> str:
    near = get_close_matches(given, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
