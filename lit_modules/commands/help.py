"""What `tokenformer COMMAND --help` says: what people set first, and where the rest is. Nothing heavy is imported."""

ANYWHERE = (
    ("--config configs/strategy/fsdp2.yaml", "another file after the first: its keys win"),
    ("--trainer.devices 4", "devices of a node; auto for all"),
    ("--trainer.precision bf16-mixed", "or 32-true, bf16-true, 16-mixed"),
    ("--data.source 'texts/*.jsonl'", "files, a folder of images, stdlib, digits, hf:NAME"),
    ("--data.batch_size 16", "sequences or images per device"),
)
FROM = (("--ckpt_path last", "the newest valid checkpoint of the experiment; or a file"),)

# Of each command: what it does, and its options, each with an example.
COMMANDS = {
    "fit": (
        "Train a model, and let it grow on the way.",
        (
            ("--trainer.max_steps 10000", "optimizer steps"),
            ("--model.optim.lr 3e-4", "peak learning rate; model.optim.warmup_steps, schedule, weight_decay"),
            *ANYWHERE,
            ("--trainer.accumulate_grad_batches 4", "micro-batches of an optimizer step"),
            ("--model.compile true", "torch.compile each block: a minute at the start, faster steps"),
            ("--trainer.callbacks+=EMA", "one more callback; GrowParameterTokens makes a model grow: docs/growth.md"),
            ("--ckpt_path last", "resume from the newest valid checkpoint of the experiment"),
            ("--run_dir runs/mine", "the run's folder; by default runs/NAME/DATE-TIME-RANDOM"),
        ),
    ),
    "validate": ("Metrics on the validation data.", (*FROM, *ANYWHERE, ("--trainer.limit_val_batches 100", "a part"))),
    "test": ("Metrics on the test data.", (*FROM, *ANYWHERE, ("--trainer.limit_test_batches 100", "a part of it"))),
    "predict": (
        "The loss of each token of a text file, as CSV; the classes of images, as a parquet file.",
        (
            *FROM,
            ("--data.predict_file README.md", "of a language model: a text file"),
            ("--data.predict_source photos", "of an image model: a folder; in place of --config: MODEL itself"),
            *ANYWHERE,
        ),
    ),
    "prepare": (
        "Download and tokenize the data, and stop.",
        (
            *ANYWHERE[3:4],
            ("--data.tokenizer tokenizer.json", "or bytes, bpe, hub:NAME"),
            ("--data.cache_dir data", "where token files go"),
            ("--data.num_processes 8", "cores that tokenize; by default all"),
        ),
    ),
    "plan": (
        "What the training would cost at each size that it grows to, and on 1 to 1,024 devices.",
        (
            ("--devices 64", "of all machines together; by default the config's"),
            ("--device H200", "whose peak, memory and links"),
            ("--mfu 0.4", "share of the peak that the training reaches"),
            ("--out plan.csv", "the numbers, in bytes, FLOPs and hours"),
            *ANYWHERE,
        ),
    ),
}


def page(command: str) -> str:
    """The help of a command that takes a config."""
    what, options = COMMANDS[command]
    width = max(len(option) for option, _ in options) + 2
    lines = [f"usage: tokenformer {command} --config FILE [--config FILE ...] [--KEY VALUE ...]", "", what]
    lines += ["Any key of a config can be given, and wins over the file. Those that people set first:", ""]
    lines += [f"  {option.ljust(width)}{meaning}" for option, meaning in options]
    lines += [
        "",
        "The rest:",
        f"  tokenformer {command} --config FILE --print_config    all keys, with their values in this config",
        f"  tokenformer {command} --help.all                      all keys, with types and meanings",
        f"  tokenformer {command} --model.help LanguageModule     those of a class; --data.help too",
        "  configs/    experiments to begin with, each key with a comment",
    ]
    return "\n".join(lines) + "\n"
