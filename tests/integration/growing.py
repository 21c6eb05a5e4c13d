"""Runs that grow, for tests: their config, their command line, what they leave behind."""

import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.integration.tiny import rows, write_config

MUON = ["--model.optim.name=muon", "--model.optim.lr_adamw=2e-3"]
STAGES = [{"at_step": 6, "qkv": 32, "proj": 32, "ffn": 64}, {"at_step": 10, "factor": 2.0}]
FEW = {"log_every_n_steps": 1, "limit_val_batches": 2}
COLUMNS = ("train/loss", "train/lr", "train/grad_norm", "train/tokens", "train/flops", "train/stage_flops", "val/loss")


def config_of(folder, corpus, stages=STAGES, trainer=None, **growth):
    """A tiny config that grows at steps 6 and 10 of 14, and saves after every step."""
    path = write_config(folder, corpus, trainer=FEW | {"max_steps": 14} | (trainer or {}))
    config = yaml.safe_load(path.read_text())
    callback = {"class_path": "GrowParameterTokens", "init_args": {"stages": stages} | growth}
    config["trainer"]["callbacks"] = [callback]
    config["checkpoint"] = {"every_n_train_steps": 1, "save_top_k": -1}
    config["model"]["init_args"]["optim"]["warmup_steps"] = 1
    path.write_text(yaml.safe_dump(config))
    return path


def checkpoint_of(run, step):
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def saving(every):
    """Options that save after every so many steps and no best: saves take long, those of several processes longest."""
    return [f"--checkpoint.every_n_train_steps={every}", "--best.save_top_k=0"]


def contents(run, step=14):
    """All tensors of a checkpoint by name: weights, average, optimizer; whatever strategy wrote it."""
    path = checkpoint_of(run, step)
    if path.is_dir():
        whole = run / "whole.pt"
        dcp_to_torch_save(path, whole)
        saved = torch.load(whole, weights_only=True)
        states = saved["optimizer_0"]["state"]
    else:
        saved = torch.load(path, weights_only=True)
        (optimizer,) = saved["optimizer_states"]
        states = {
            name: optimizer["state"].get(number, {})
            for group in optimizer["param_groups"]
            for name, number in zip(group["param_names"], group["params"], strict=True)
        }
    tensors = dict(saved["state_dict"])
    tensors |= {f"current.{name}": tensor for name, tensor in saved.get("current_model_state", {}).items()}
    return tensors | {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def difference(one, other, step=14):
    """The largest between two runs' contents, infinite where their names differ."""
    a, b = contents(one, step), contents(other, step)
    if a.keys() != b.keys():
        return float("inf")
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def logged(run, first=0):
    return {column: [pair for pair in rows(run, column) if pair[0] >= first] for column in COLUMNS}


def fit(config, run, *options, resume=None):
    """The command line of a run; `resume` is a checkpoint."""
    command = ["fit", "--config", str(config), "--run_dir", str(run), *options]
    return [*command, *(["--ckpt_path", str(resume)] if resume else [])]
