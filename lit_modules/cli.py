"""The command line: `tokenformer COMMAND --config FILE [--KEY VALUE ...]`, on LightningCLI.

Nothing heavy is imported at the top, so that `tokenformer --help` answers at once.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module

from lit_modules.commands import help

# Modules in lit_modules/commands of the commands that take no config of an experiment.
NAMES = ("adapter", "evaluate", "export", "generate", "grow", "inspect", "plot", "shrink", "submit", "sweep")
COMMANDS = {name: name for name in NAMES}
COMMANDS["import"] = "import_released"

HELP = """usage: tokenformer COMMAND --config FILE [--KEY VALUE ...]

Train TokenFormers, in which every linear projection is attention to learnable parameter tokens.

commands:
  fit        train                    tokenformer fit --config configs/language/quickstart.yaml
  validate   on validation data       tokenformer validate --config FILE --ckpt_path last
  test       on test data             tokenformer test --config FILE --ckpt_path last
  predict    loss of each token of a text file, into a CSV; classes of images, into a parquet file
                                      tokenformer predict --config FILE --ckpt_path last --data.predict_file TEXT
                                      tokenformer predict MODEL --data.predict_source FOLDER
  prepare    download and tokenize the data and stop
                                      tokenformer prepare --config FILE
  plan       what training a language model would cost at each size it grows to, and on 1 to 1,024 devices
                                      tokenformer plan --config FILE
  grow       append parameter tokens to a checkpoint or an exported model
                                      tokenformer grow CKPT --factor 2 --out FILE
  shrink     keep some of the tokens of every layer: the first ones, or those that are used most
                                      tokenformer shrink CKPT --keep 0.5 --out DIR
  export     make a folder of the model in a checkpoint: safetensors, config, tokenizer, model card
                                      tokenformer export CKPT --out DIR
  import     make such a folder of a released TokenFormer checkpoint
                                      tokenformer import PATH --out DIR
  adapter    what was trained on a frozen model as a small file: save it, put it on, take it off, make it part
                                      tokenformer adapter save RUN --out FILE
  evaluate   zero-shot scores of a language model, by the lm-evaluation-harness
                                      tokenformer evaluate CKPT --tasks hellaswag,piqa
  generate   continue a text with a language model
                                      tokenformer generate CKPT --prompt TEXT
  inspect    which parameter tokens fire, on what, and whether the model knows that it guesses
                                      tokenformer inspect CKPT --text FILE --out DIR
  submit     train as a Slurm job that requeues itself and resumes when it is preempted or out of time
                                      tokenformer submit --config FILE --nodes 2 --gpus-per-node 8 --time 24:00:00
  sweep      train with each of several values of any key, and compare
                                      tokenformer sweep --config FILE --model.optim.lr 1e-3 2e-3 4e-3
  plot       loss over steps, tokens, FLOPs and time, of one or several runs
                                      tokenformer plot RUN...

Any key of a config can be given on the command line and wins over the file:
  tokenformer fit --config FILE --trainer.max_steps 1000 --model.optim.lr 3e-4 --data.batch_size 4
Resume from the newest valid checkpoint of an experiment:
  tokenformer fit --config FILE --ckpt_path last

  tokenformer COMMAND --help           the keys that people set first, and where the rest is
  tokenformer COMMAND --config FILE --print_config
                                      the config with everything that was left to its default
"""


def console() -> None:
    """The console script: `main`, with a user's mistake as one line instead of a traceback."""
    from lit_modules.runs.errors import RunError

    try:
        main()
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, RunError, OSError) as error:
        if os.environ.get("TOKENFORMER_DEBUG"):
            raise
        while isinstance(error.__cause__, ValueError) and _is_of_the_parser(error):
            error = error.__cause__
        sys.exit(f"error: {error}\n(TOKENFORMER_DEBUG=1 shows where)")
    except KeyboardInterrupt:
        sys.exit(130)


def _is_of_the_parser(error: BaseException) -> bool:
    """Whether the config's parser raised it, around what a class says of its arguments in fewer words."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    return where is not None and str(where.tb_frame.f_globals.get("__name__")).startswith("jsonargparse.")


def main(args: list[str] | None = None) -> None:
    """Run a command; `args` default to the process's.

    Raises:
        SystemExit: for unknown commands and keys.
        ValueError: for settings that can't work.
    """
    given = sys.argv[1:] if args is None else args
    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if given[0] in help.COMMANDS and {"-h", "--help"} & set(given[1:]):
        print(help.page(given[0]), end="")
        return
    if given[0] in COMMANDS:
        with _without_collections():
            command = import_module(f"lit_modules.commands.{COMMANDS[given[0]]}")
        command.main(given[1:])
        return
    from lit_modules.runs.signals import listening

    with listening() if given[0] == "fit" else nullcontext():
        with _without_collections():
            from lit_modules.commands.experiment import run

        if given[0] == "predict":
            from lit_modules.commands.predict import with_model

            given = ["predict", *with_model(given[1:])]
        run(["--help" if arg == "--help.all" else arg for arg in given])


@contextmanager
def _without_collections() -> Iterator[None]:
    """Importing makes a million objects, none of them garbage: looking for it takes a second of each start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


if __name__ == "__main__":
    console()
