"""What a config gives: options that can't work, sizes that the data decides, modules of the user's own."""

import dataclasses
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback, _InstantiatorFn

from lit_modules.commands.plan import num_devices
from lit_modules.runs.options import refuse_callbacks, refuse_settings
from tokenformer import LMConfig, ViTConfig
from tokenformer.interop import FREE, initial_structure

SIZES = {"vocab_size": LMConfig, "num_classes": ViTConfig}  # of the tokenizer, of the images; whose config has them


def check_options(subcommand: str, trainer: Namespace) -> None:
    """Refuse what can't work before data is touched.

    Raises:
        ValueError: for the first option that can't, with what to use instead.
    """
    refuse_settings(trainer, num_devices(trainer.devices, trainer.num_nodes))
    kinds = [locate(callback.class_path) for callback in as_list(trainer.callbacks)]
    refuse_callbacks(kind for kind in kinds if isinstance(kind, type))
    endless = trainer.max_steps == -1 and trainer.max_epochs is None and trainer.max_time is None
    if subcommand == "fit" and endless and not trainer.fast_dev_run:
        raise ValueError("trainer.max_steps=-1: the run would not end; give it, trainer.max_epochs or max_time")


def size_of_data(name: str, size: int, model: Namespace, args: list[str]) -> int:
    """A size of the model that the data decides.

    Args:
        name: of the size, in `model.config`.
        size: the data's.
        model: its part of the config.
        args: the command line.

    Raises:
        ValueError: if another was given.
    """
    given = model.init_args.get("config", {}).get(name, size)
    default = next(field.default for field in dataclasses.fields(SIZES[name]) if field.name == name)
    # The default may come from a config that a run has saved.
    if given != size and (given != default or any(f"config.{name}" in arg for arg in args)):
        raise ValueError(
            f"model.config.{name}={given}, but the data has {size}: leave it out, it is taken from the data"
        )
    return size


def take_sizes(model: Namespace, given: Namespace) -> None:
    """Give `model.config` the sizes of the model that it starts from, `model.init_from`.

    Args:
        model: its part of the config, which is changed.
        given: what of it was typed, in files or on the command line.

    Raises:
        ValueError: when a size that was typed is another, with both.
    """
    start = model.init_args.get("init_from")
    if not start or "config" not in model.init_args or model.init_args.get("timm_model"):
        return
    sizes, config = dataclasses.asdict(initial_structure(start)[0]), model.init_args.config
    if sizes.keys() != vars(config).keys():  # of the other kind, which the module refuses
        return
    typed = vars(given.init_args.get("config", Namespace())) if "init_args" in given else {}
    wrong = {name: size for name, size in typed.items() if name not in FREE and size != sizes[name]}
    if wrong:
        listed = ", ".join(f"model.config.{name}={size} ({sizes[name]} there)" for name, size in wrong.items())
        raise ValueError(f"model.init_from={start} has a model of other sizes than {listed}: leave these out")
    for name in sizes.keys() - typed.keys() - SIZES.keys() - {"drop_path"}:  # which is of this training
        config[name] = sizes[name]


class InstantiateModel(_InstantiatorFn):
    """Makes a model; one of the user's own may know nothing of the sizes that the data decides."""

    def __call__(self, class_type: Any, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        """Of this class; sizes go to its argument `config`."""
        links = applied_instantiation_links if "config" in kwargs else {}
        return super().__call__(class_type, *args, applied_instantiation_links=links, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Saves a config with the sizes too that data of the user's own leaves to it; Lightning leaves them out."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After Lightning's has been written."""
        # Not `trainer.log_dir`: it asks all processes, and only the first one is here.
        path, model = Path(trainer.default_root_dir, self.config_filename), self.config.model
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sizes = {name: model.init_args.get("config", {}).get(name) for name in SIZES if not hasattr(data, name)}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if sizes and path.exists():
            saved = yaml.safe_load(path.read_text())
            saved["model"]["init_args"]["config"] |= sizes
            path.write_text(yaml.safe_dump(saved, sort_keys=False))


def as_list(given: Any) -> list[Any]:
    """What may be given as one thing or several."""
    return given if isinstance(given, list) else [] if given is None else [given]
