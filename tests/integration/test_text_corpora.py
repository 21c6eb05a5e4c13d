"""Text through the command line: what the data module makes of a file, and the model of it."""

import json

import pytest

from lit_modules.checkpoints.reading import read_checkpoint
from lit_modules.cli import main
from tests.integration.growing import checkpoint_of
from tests.integration.tiny import write_config


@pytest.mark.parametrize("prepared_by", ["this version", "an older one"])
def test_the_vocabulary_of_a_small_text_is_taken_as_it_is(corpus, tmp_path, prepared_by, caplog):
    """Rows of the embedding without a token would take part in the softmax. Runs that have them go on with them."""
    config = write_config(tmp_path, corpus, trainer={"limit_val_batches": 0})
    options = ["--config", str(config), f"--data.cache_dir={tmp_path / 'cache'}", "--data.tokenizer=bpe"]
    options += ["--data.bpe_vocab_size=5000"]
    caplog.set_level("INFO")
    main(["prepare", *options])
    (metadata,) = tmp_path.rglob("metadata.json")
    made = json.loads(metadata.read_text())
    expected = made["vocab_size"]
    assert 257 < expected < 1000
    if prepared_by == "an older one":
        del made["whole_vocab"]
        metadata.write_text(json.dumps(made))
        expected = 5000
    run = ["fit", *options, "--run_dir", str(tmp_path / "run"), "--model.optim.schedule=constant"]
    run += ["--model.optim.warmup_steps=0"]
    main([*run, "--trainer.max_steps=2"])
    main([*run, "--trainer.max_steps=3", "--ckpt_path", "last"])
    said = f"gives a vocabulary of {expected}, not data.bpe_vocab_size=5000: the model has as many"
    assert (said in caplog.text) == (prepared_by == "this version")
    checkpoint = read_checkpoint(checkpoint_of(tmp_path / "run", 3))
    assert checkpoint["hyper_parameters"]["config"]["vocab_size"] == expected
    assert checkpoint["state_dict"]["model.embedding.weight"].shape[0] == expected
    main(["export", str(checkpoint_of(tmp_path / "run", 3)), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == expected


def test_a_file_of_another_encoding_and_a_separator_from_the_command_line(tmp_path, corpus):
    texts = [f"Café n° {i}\nau lait" for i in range(100)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts), encoding="cp1252")
    config = write_config(tmp_path, corpus)
    data = [f"--data.cache_dir={tmp_path}/cache", f"--data.source={tmp_path}/text.txt", "--data.encoding=cp1252"]
    main(["prepare", "--config", str(config), *data, r"--data.document_separator=\n\n"])
    (metadata,) = tmp_path.rglob("metadata.json")
    splits = json.loads(metadata.read_text())["splits"]
    assert sum(split["documents"] for split in splits.values()) == 100
    assert sum(split["bytes"] for split in splits.values()) == sum(len(text.encode()) for text in texts)
