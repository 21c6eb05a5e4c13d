"""The command line: `tokenformer COMMAND --config FILE [--KEY VALUE ...]`, on LightningCLI.

Nothing heavy is imported at the top, so that `tokenformer --help` answers at once.
"""

import os
import sys

HELP = """usage: tokenformer COMMAND --config FILE [--KEY VALUE ...]

Train TokenFormers, in which every linear projection is attention to learnable parameter tokens.

commands:
  fit        train                    tokenformer fit --config configs/language/quickstart.yaml
  validate   on validation data       tokenformer validate --config FILE --ckpt_path last
  test       on test data             tokenformer test --config FILE --ckpt_path last
  predict    loss of each token of a text file, into a CSV; classes of images, into a parquet file
                                      tokenformer predict --config FILE --ckpt_path last --data.predict_file TEXT
                                      tokenformer predict --config FILE --ckpt_path last --data.predict_source FOLDER
  prepare    download and tokenize the data and stop
                                      tokenformer prepare --config FILE
  plan       what training a language model would cost at each size it grows to: FLOPs, memory, hours
                                      tokenformer plan --config FILE
  grow       append parameter tokens to a checkpoint or an exported model
                                      tokenformer grow CKPT --factor 2 --out FILE
  export     make a folder of the model in a checkpoint: safetensors, config, tokenizer, model card
                                      tokenformer export CKPT --out DIR
  import     make such a folder of a released TokenFormer checkpoint
                                      tokenformer import PATH --out DIR
  evaluate   zero-shot scores of a language model, by the lm-evaluation-harness
                                      tokenformer evaluate CKPT --tasks hellaswag,piqa
  generate   let a language model go on with a text
                                      tokenformer generate CKPT --prompt TEXT
  plot       loss over steps, tokens, FLOPs and time, of one or several runs
                                      tokenformer plot RUN...

Any key of a config can be given on the command line and wins over the file:
  tokenformer fit --config FILE --trainer.max_steps 1000 --model.optim.lr 3e-4 --data.batch_size 4
Go on with the newest whole checkpoint of an experiment:
  tokenformer fit --config FILE --ckpt_path last

  tokenformer COMMAND --help           all keys
  tokenformer COMMAND --config FILE --print_config
                                      the config with everything that was left to its default
"""


def console() -> None:
    """The console script: `main`, with a user's mistake as one line instead of a traceback."""
    from lit_modules.errors import RunError

    try:
        main()
    except (ValueError, RunError) as error:
        if os.environ.get("TOKENFORMER_DEBUG"):
            raise
        while isinstance(error.__cause__, ValueError):  # the config parser wraps what a class says of its arguments
            error = error.__cause__
        sys.exit(f"error: {error}\n(TOKENFORMER_DEBUG=1 shows where)")


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
    if given[0] == "plot":
        from lit_modules.plot import main as plot

        return plot(given[1:])
    if given[0] == "evaluate":
        from lit_modules.evaluate import main as evaluate

        return evaluate(given[1:])
    if given[0] == "generate":
        from lit_modules.generate import main as generate

        return generate(given[1:])
    if given[0] == "grow":
        from lit_modules.grow import main as grow

        return grow(given[1:])
    if given[0] == "export":
        from lit_modules.export import main as export

        return export(given[1:])
    if given[0] == "import":
        from lit_modules.import_released import main as import_released

        return import_released(given[1:])
    from lit_modules.experiment import run

    run(args)


if __name__ == "__main__":
    console()
