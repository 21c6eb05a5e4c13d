"""Fine-tuning on answers through the command line: the loss, growth on the way, resume in the middle of an epoch."""

import csv
import json

import pytest
import torch
import yaml

from datamodules.instructions import InstructionDataModule
from datamodules.tokenizer import ByteTokenizer
from lit_modules.cli import main
from lit_modules.commands.tokenizers import save_tokenizer, tokenizer_of
from lit_modules.modules.loading import load_model
from tests.integration.growing import checkpoint_of
from tests.integration.tiny import TINY, rows, write_config
from tokenformer import LMConfig, TokenFormerLM, from_pretrained, save_pretrained


@pytest.fixture(scope="module")
def tuned(corpus, tmp_path_factory):
    """(config, model it starts from, whole run, run resumed in the middle of the second epoch).

    20 examples to train on, in steps of 2 x 2: 5 steps an epoch. The prompts are longer than what growth looks at.
    """
    folder = tmp_path_factory.mktemp("tuned")
    texts = [{"instruction": f"{'Count. ' * 40}{i}", "output": "x" * (1 + 13 * (i % 3))} for i in range(25)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    torch.manual_seed(1)
    sizes = TINY["model"]["init_args"]["config"]
    save_pretrained(TokenFormerLM(LMConfig(**sizes, vocab_size=257, max_seq_len=512)), folder / "start")
    save_tokenizer(ByteTokenizer(), folder / "start", 512)
    grows = {"class_path": "GrowParameterTokens", "init_args": {"stages": [{"at_step": 6, "factor": 2.0}]}}
    prompt = "### Instruction:\nA?\n\n### Response:\n"
    samples = {"class_path": "SampleText", "init_args": {"prompt": prompt, "max_new_tokens": 4}}
    given = yaml.safe_load(
        write_config(
            folder,
            corpus,
            trainer={"callbacks": [grows, samples], "accumulate_grad_batches": 2, "log_every_n_steps": 1},
        ).read_text()
    )
    given["model"]["init_args"]["init_from"] = str(folder / "start")
    given["data"] = {
        "class_path": "InstructionDataModule",
        "init_args": {
            "source": str(folder / "t.jsonl"),
            "tokenizer": "${model.init_args.init_from}/tokenizer.json",
            "val_fraction": 0.2,
            "seq_len": 512,
            "batch_size": 2,
        },
    }
    given["trainer"] |= {"max_steps": -1, "max_epochs": 2, "val_check_interval": 10}
    config = folder / "tune.yaml"
    config.write_text(yaml.safe_dump(given))
    fit = ["fit", "--config", str(config)]
    main([*fit, "--run_dir", str(folder / "whole")])
    main([*fit, "--run_dir", str(folder / "resumed"), f"--ckpt_path={checkpoint_of(folder / 'whole', 8)}"])
    return config, folder / "start", folder / "whole", folder / "resumed"


def data_of(config):
    given = yaml.safe_load(config.read_text())
    tokenizer = str(config.parent / "start/tokenizer.json")
    data = InstructionDataModule(**given["data"]["init_args"] | {"tokenizer": tokenizer})
    data.setup("fit")
    return data


def nats(model, ids, targets):
    """Of the targets that count, from the logits."""
    with torch.no_grad():
        log_probs = model(ids).double().log_softmax(-1)
    counts = targets != -100
    return -log_probs[counts].gather(1, targets[counts][:, None]).squeeze(1)


def test_the_loss_is_the_mean_over_the_answers_of_a_step(tuned):
    config, start, whole, _ = tuned
    data, model = data_of(config), from_pretrained(start)
    assert len(data.train) == 20
    batches = [batch for _, batch in zip(range(2), data.train_dataloader(), strict=False)]
    assert len({int((batch.targets != -100).sum()) for batch in batches}) == 2  # means of means would be others
    first = torch.cat([nats(model, batch.input_ids, batch.targets) for batch in batches])
    assert rows(whole, "train/loss")[0][1] == pytest.approx(first.mean().item(), rel=1e-5)
    trained = load_model(checkpoint_of(whole, 10))
    held_out = torch.cat([nats(trained, *batch) for batch in data.val_dataloader()])
    assert rows(whole, "val/loss")[-1][1] == pytest.approx(held_out.mean().item(), rel=1e-5)
    assert not rows(whole, "val/bits_per_byte")


def test_what_has_been_seen_is_counted_without_padding(tuned):
    config, _, whole, _ = tuned
    ids = data_of(config).train.ids
    assert rows(whole, "train/tokens")[-1][1] == 2 * (len(ids) - 20)  # two epochs; the last id of each is no input
    assert rows(whole, "train/sequences")[-1][1] == 40


def test_it_is_resumed_in_the_middle_of_an_epoch_to_the_bit(tuned):
    _, _, whole, resumed = tuned
    for column in ("train/loss", "train/grad_norm", "train/tokens", "train/flops", "val/loss"):
        assert rows(resumed, column)
        assert rows(resumed, column) == rows(whole, column)[-len(rows(resumed, column)) :], column
    ends = [torch.load(checkpoint_of(run, 10), weights_only=True)["state_dict"] for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_it_grows_and_writes_where_prompts_have_no_targets(tuned):
    _, _, whole, _ = tuned
    (record,) = torch.load(checkpoint_of(whole, 10), weights_only=True)["growths"]
    assert record["step"] == 6
    assert record["loss_after"] == pytest.approx(record["loss_before"], rel=1e-5)
    assert (whole / "sample.txt").read_text().startswith("### Instruction:\nA?\n\n### Response:\n")
    assert tokenizer_of(checkpoint_of(whole, 10)).vocab_size == 257


def test_predict_says_what_each_token_of_the_answers_costs(tuned, tmp_path):
    config, _, whole, _ = tuned
    from_here = ["--config", str(config), f"--ckpt_path={checkpoint_of(whole, 10)}"]
    main(["predict", *from_here, "--run_dir", str(tmp_path / "run")])
    with (tmp_path / "run/predictions.csv").open() as file:
        found = list(csv.DictReader(file))
    assert {row["token"] for row in found} == {"x", ""}
    assert len(found) == data_of(config).val.num_answers.sum()
    mean = sum(float(row["nats"]) for row in found) / len(found)
    assert rows(whole, "val/loss")[-1][1] == pytest.approx(mean, abs=1e-5)


def test_an_epoch_that_ends_in_the_middle_of_a_step_is_refused(tuned, tmp_path):
    command = ["fit", "--config", str(tuned[0]), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"limit_train_batches=3 .* in the middle of a step: give a multiple"):
        main([*command, "--trainer.limit_train_batches=3", "--trainer.val_check_interval=null"])
