"""An experiment from a config: LightningCLI with run folders of their own, resume that is exact, and clear errors."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning
from jsonargparse import set_parsing_settings
from lightning import Callback, LightningDataModule, LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf.errors import OmegaConfBaseException

import datamodules.images
import datamodules.instructions
import datamodules.text  # noqa: F401  (makes their classes known by short names)
from datamodules.loader import StreamDataModule
from datamodules.phases import PhasedDataModule
from lit_modules.callbacks import (
    Checkpoint,
    ContinualMatrix,
    EvaluationRow,
    FreeSpace,
    ImagePredictions,
    Monitors,
    NonFinite,
    Pictures,
    Preemption,
    Progress,
    Summary,
    Throughput,
    TokenPredictions,
    Watchdog,
)
from lit_modules.callbacks.checkpoint import RunCheckpoint
from lit_modules.callbacks.watchdog import end_with
from lit_modules.checkpoints.reading import read_header
from lit_modules.checkpoints.writing import AtomicCheckpointIO, remove_partial_checkpoints
from lit_modules.commands.given import (
    SIZES,
    InstantiateModel,
    SaveConfig,
    as_list,
    check_options,
    size_of_data,
    take_sizes,
)
from lit_modules.commands.parser import ArgumentParser
from lit_modules.commands.plan import num_devices, plan
from lit_modules.commands.run_folder import config_name, replace_links, resolve_run
from lit_modules.modules import language, vision
from lit_modules.modules.base import TokenFormerModule
from lit_modules.modules.language import LanguageModule
from lit_modules.modules.vision import VisionModule
from lit_modules.runs.errors import RunError, explain
from lit_modules.runs.lock import RunLock
from lit_modules.runs.logs import ResumableCSVLogger, ResumableTensorBoardLogger
from lit_modules.runs.quiet import be_quiet
from lit_modules.runs.slurm import check_tasks, environment
from lit_modules.runs.trackers import TrackerIds, in_folder
from lit_modules.strategies import fsdp2

# Class paths in the configs of older runs.
sys.modules |= {f"lit_modules.{module.__name__.rsplit('.')[-1]}": module for module in (language, vision, fsdp2)}

# How the processes that Lightning starts for a run learn what its first process has decided.
RUN_DIR, CKPT_PATH = "TOKENFORMER_RUN_DIR", "TOKENFORMER_CKPT_PATH"
FIRST_PROCESS = "TOKENFORMER_FIRST_PROCESS"  # its pid


class Trainer(lightning.Trainer):
    """Lightning's, with one more command."""

    def prepare(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Tokenize the data and stop."""
        datamodule.prepare_data()

    def plan(
        self,
        model: LanguageModule,
        datamodule: LightningDataModule,
        devices: int | None = None,
        mfu: float = 0.4,
        device: str = "H100",
        network: float | None = None,
        out: str | None = None,
    ) -> None:
        """Print what the run would cost, a row for each size that it grows to; and the last size on 1 to 1,024 devices.

        Args:
            model: the configured one.
            datamodule: the configured one.
            devices: of all machines together. Default: those of the config.
            mfu: share of the device's peak that the training reaches.
            device: whose peak, memory and links: H100, A100, ...
            network: GB/s that a device sends between nodes. Default: what such devices usually come with.
            out: a CSV file for the numbers, in bytes, FLOPs and hours; those of the second table: OUT-devices.csv.
        """
        assert devices is not None  # decided before anything was built
        print(plan(model, datamodule, self, devices=devices, mfu=mfu, device=device, network=network, out=out))


class ExperimentCLI(LightningCLI):
    """LightningCLI for this project's modules."""

    command: ClassVar[str | None] = None  # the one to be run: parsers of the others take a second to build
    held_locks: ClassVar[list[RunLock]] = []  # of the run in this process; it outlives a constructor that raises

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:  # type: ignore[override]
        known = LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in ("prepare", "plan")}
        return {cls.command: known[cls.command]} if cls.command in known else known

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = ArgumentParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a YAML file; of several, the later wins")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, help="of the experiment (default: the first config file's)")
        parser.add_argument("--run_dir", type=str | None, help="the run's folder (default: runs/NAME/DATE-TIME-RANDOM)")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(RunCheckpoint, "best")
        parser.add_lightning_class_args(NonFinite, "nonfinite")
        parser.set_defaults(
            {
                "checkpoint.filename": "step-{step:08d}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.every_n_train_steps": 1000,
                "checkpoint.monitor": "step",
                "checkpoint.mode": "max",
                "checkpoint.save_top_k": 2,
                "checkpoint.enable_version_counter": False,  # a corrupted one is replaced
                "best.filename": "best-step-{step:08d}",
                "best.auto_insert_metric_name": False,
                "best.monitor": "val/loss",
                "best.mode": "min",
                "best.enable_version_counter": False,
            }
        )
        for size in SIZES:
            link = partial(self._link_size, size)
            parser.link_arguments(f"data.{size}", f"model.init_args.config.{size}", link, apply_on="instantiate")

    def _link_size(self, name: str, size: int) -> int:
        args = sys.argv[1:] if self._args is None else self._args
        return size_of_data(name, size, self.config[self.config.subcommand].model, args)

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        own = InstantiateModel(cli=self, key="model")
        self.parser.add_instantiator(own, LightningModule, subclasses=True, prepend=True)
        self.parser.add_instantiator(self._make_logger, Logger, subclasses=True)

    def _make_logger(self, kind: type[Logger], **arguments: Any) -> Logger:
        if self.subcommand in ("prepare", "plan"):  # log nothing, and have no folder
            return DummyLogger()
        kind, arguments = in_folder(kind, arguments, Path(self._run_dir))
        return kind(**arguments)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:  # type: ignore[override]
        self._args = args
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Leave the config as the user gave it; Lightning would let the checkpoint's hyperparameters overrule it."""

    def before_instantiate_classes(self) -> None:
        """Decide on the run's folder and the checkpoint to start from."""
        config, args = self.config[self.config.subcommand], sys.argv[1:] if self._args is None else self._args
        if config.model.get("init_args", {}).get("init_from") and self.config.subcommand != "prepare":
            typed = self.parser.parse_args(args, defaults=False)
            take_sizes(config.model, typed[self.config.subcommand].model)
        config.name = config.name or config_name(args, config.model)
        check_options(self.config.subcommand, config.trainer)
        if self.config.subcommand == "plan" and config.devices is None:
            config.devices = num_devices(config.trainer.devices, config.trainer.num_nodes)
        if self.config.subcommand in ("prepare", "plan"):
            return
        per_node = config.trainer.devices
        check_tasks(None if str(per_node) in ("auto", "-1") else num_devices(per_node, 1), config.trainer.num_nodes)
        self._own_run_dir = config.run_dir is not None
        if RUN_DIR not in os.environ:
            run_dir, checkpoint = resolve_run(self.config.subcommand, config)
            if _get_rank() in (None, 0):  # the others, where a launcher started them, hear of it from Lightning
                try:
                    run_dir.mkdir(parents=True, exist_ok=True)
                    replace_links(run_dir)
                    self.held_locks.append(RunLock(run_dir))
                except OSError as error:
                    raise ValueError(f"run_dir={run_dir}: can't be written to ({error.strerror})") from error
                if (saved := run_dir / "config.yaml").exists() and not saved.is_file():
                    raise ValueError(f"run_dir={run_dir}: its config.yaml is a folder or a device: move it away")
                remove_partial_checkpoints(run_dir / "checkpoints")
            os.environ |= {RUN_DIR: str(run_dir), CKPT_PATH: str(checkpoint or ""), FIRST_PROCESS: str(os.getpid())}
        self._run_dir = os.environ[RUN_DIR]
        config.ckpt_path = os.environ[CKPT_PATH] or None
        data: Any = config.data.get("init_args") or {}  # none of a class of the user's own
        if self.config.subcommand == "predict" and config.ckpt_path and data.get("predict_source"):
            data.class_names = read_header(Path(config.ckpt_path)).get("class_names")  # the source may be elsewhere

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        config = self._get(self.config_init, "trainer")
        stateful = [c.state_key for c in as_list(config.callbacks) if type(c).state_dict is not Callback.state_dict]
        if twice := [key for key in stateful if stateful.count(key) > 1]:
            raise ValueError(
                f"trainer.callbacks has {twice[0]} twice, and a checkpoint holds the state of one: give it once "
                "(GrowParameterTokens with all stages)"
            )
        if self.subcommand == "prepare":
            return Trainer(logger=False, enable_checkpointing=False, barebones=True)
        if self.subcommand == "plan":  # touches no accelerator, whatever the config asks for
            here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
            return super().instantiate_trainer(**here, enable_progress_bar=False, enable_model_summary=False)
        run_dir = self._run_dir
        # The saved config is of use again: it names neither this run's folder nor what it was resumed from.
        saved = self.config[self.config.subcommand]
        saved.run_dir = saved.ckpt_path = None
        kwargs["default_root_dir"] = run_dir
        if config.logger is not False and not config.fast_dev_run:
            default = config.logger in (None, True)
            given = [ResumableTensorBoardLogger(run_dir)] if default else as_list(config.logger)
            # First in the list, so that the config goes into the run's folder; `plot` and LossCurve read it.
            kwargs["logger"] = [ResumableCSVLogger(run_dir), *given]
        kwargs["plugins"] = [
            *as_list(config.plugins),
            AtomicCheckpointIO(self._get(self.config_init, "checkpoint").asynchronous),
            *environment(),
        ]
        always = [FreeSpace(), Watchdog(), TrackerIds(run_dir)]
        if isinstance(self.model, TokenFormerModule):  # one of the user's own says less of itself
            always += [Throughput(), Summary(run_dir)]
        known = isinstance(self.datamodule, StreamDataModule)
        if known and isinstance(self.model, VisionModule):
            folder = Path(run_dir) if self._own_run_dir else Path(run_dir).parent  # which other runs have too
            always += [ImagePredictions(), Pictures(), EvaluationRow(saved.name, folder / "results.csv")]
        elif known and isinstance(self.model, LanguageModule):
            always.append(TokenPredictions())
        if isinstance(self.datamodule, PhasedDataModule) and isinstance(self.model, TokenFormerModule):
            always.append(ContinualMatrix())
        has_bar = any(isinstance(callback, ProgressBar) for callback in as_list(config.callbacks))
        if config.enable_progress_bar is not False and not has_bar:
            always.append(Progress())
        kwargs["enable_model_summary"] = bool(config.enable_model_summary)  # Summary says it in a line
        # Preemption comes first: a run that stops before a step does not grow in it.
        config.callbacks = [Preemption(run_dir, os.environ[CKPT_PATH]), Monitors(), *as_list(config.callbacks), *always]
        for key in ("checkpoint", "best"):
            callback = self._get(self.config_init, key)
            # Absolute: where a checkpoint has another name of this folder, they would forget what they saved there.
            callback.dirpath = callback.dirpath or os.path.join(os.path.realpath(run_dir), "checkpoints")
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> lightning.Trainer:
        if config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)


def run(args: list[str] | None, cli: type[ExperimentCLI] = ExperimentCLI) -> ExperimentCLI:
    """Parse, build and run a command; `args` default to the process's."""
    be_quiet()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${data.init_args.seq_len} works in a config
    first_process = RUN_DIR not in os.environ
    ExperimentCLI.command = (sys.argv[1:] if args is None else args)[0]
    if FIRST_PROCESS in os.environ:
        end_with(int(os.environ[FIRST_PROCESS]))
    try:
        return cli(
            LightningModule,
            LightningDataModule,
            trainer_class=Trainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "allow_abbrev": False},
            args=args,
        )
    except OmegaConfBaseException as error:
        raise ValueError(f"the config holds a ${{...}} that can't be resolved: {error}") from error
    except MisconfigurationException as error:  # Lightning's, for settings
        raise ValueError(str(error)) from error
    except Exception as error:
        if not isinstance(error, RunError) and (known := explain(error)):
            raise RunError(known) from error
        raise
    finally:  # a second run in this process gets a folder of its own
        if first_process:
            for name in (RUN_DIR, CKPT_PATH, FIRST_PROCESS):
                os.environ.pop(name, None)
        while ExperimentCLI.held_locks:
            ExperimentCLI.held_locks.pop().release()
