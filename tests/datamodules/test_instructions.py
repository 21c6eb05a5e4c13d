"""Instruction data: rows to examples, what of them is learned, batches and their weights."""

import gzip
import json

import datasets
import pytest
import torch

from datamodules.examples import Examples, hold_out, parts_of
from datamodules.instructions import AnswerStream, InstructionDataModule, OrderedAnswers
from datamodules.loader import StreamLoader
from datamodules.tokenizer import ByteTokenizer

END = 256  # of a text, among bytes


def question(text):
    return f"### Instruction:\n{text}\n\n### Response:\n"


ROWS = {
    "alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3"}, question("Add.\n\n### Input:\n1, 2"), "3"),
    "litgpt without input": ({"instruction": "Hi {}", "input": "", "output": "Oh"}, question("Hi {}"), "Oh"),
    "dolly": ({"instruction": "A?", "context": None, "response": "B"}, question("A?"), "B"),
    "prompt and response": ({"prompt": "A?", "response": " B\n"}, question("A?"), " B\n"),
    "prompt and completion": ({"prompt": "Q: A?\nA:", "completion": " é", "context": "C"}, "Q: A?\nA:", " é"),
    "messages": (
        {"messages": [{"role": role, "content": text} for role, text in (("user", "A?"), ("assistant", "B"))]},
        question("A?"),
        "B",
    ),
}


def examples_of(*rows, seq_len=1000):
    return Examples([parts_of(row, "here") for row in rows], ByteTokenizer(), seq_len, "these")


@pytest.mark.parametrize(("row", "asked", "answer"), ROWS.values(), ids=ROWS)
def test_the_answer_and_its_end_are_targets(row, asked, answer):
    ids, is_answer = examples_of(row).example(0)
    assert ids.tolist() == [END, *asked.encode(), *answer.encode(), END]
    assert is_answer.tolist() == [False] * (1 + len(asked)) + [True] * (len(answer.encode()) + 1)


TURNS = (("system", "Be short."), ("user", "A?"), ("assistant", "B"), ("user", "C?"), ("assistant", "D"), ("user", "E"))
TALK = {"messages": [{"role": role, "content": content} for role, content in TURNS]}


def test_all_turns_of_the_assistant_are_targets():
    ids, is_answer = examples_of(TALK).example(0)
    assert bytes(ids[(ids != END)].tolist()).decode() == f"Be short.\n\n{question('A?')}B{question('C?')}D"
    assert ids[is_answer].tolist() == [ord("B"), END, ord("D"), END]  # what comes after the last answer is gone


def test_what_is_cut_and_left_out_is_counted(caplog):
    caplog.set_level("INFO")
    rows = [{"prompt": "a" * length, "completion": answer} for length, answer in ((4, "bc"), (4, "bcd"), (9, "b"))]
    found = examples_of(
        *rows, {"prompt": "a", "completion": " \n"}, TALK, {"messages": TALK["messages"][:2]}, seq_len=7
    )
    assert found.num_answers.tolist() == [3, 3]
    assert found.example(1)[0].tolist() == [END, *b"aaaabcd"]  # its end was cut off
    assert "these: of 6 examples 4 have no answer, or none within data.seq_len=7, and are left out; 1 are cut" in (
        caplog.text
    )
    with pytest.raises(ValueError, match=r"these: has no example with an answer within data\.seq_len=3"):
        examples_of(*rows, seq_len=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", r"t.jsonl:2: holds \[1\], not an object with the fields instruction"),
        ('{"text": "a"}', r"t.jsonl:2: has the fields \['text'\]; understood are instruction \(input or context\) and"),
        ('{"instruction": "a", "output": null}', r"t.jsonl:2: 'output' holds null, not text"),
        ('{"instruction": "a", "input": 3, "output": "a"}', r"t.jsonl:2: 'input' holds 3, not text"),
        ('{"messages": "a"}', r"t.jsonl:2: 'messages' holds 'a', not a list of objects with role and content"),
        ('{"messages": [{"role": "user"}]}', r"t.jsonl:2: 'content of message 1' holds null"),
        ('{"messages": [{"role": "tool", "content": ""}]}', r"t.jsonl:2: message 1 has the role 'tool', not system"),
        ("{", r"t.jsonl:2: not JSON"),
    ],
)
def test_a_row_that_is_none_is_named(row, message, tmp_path):
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(ROWS['alpaca'][0])}\n{row}\n")
    with pytest.raises(ValueError, match=message):
        InstructionDataModule(str(tmp_path / "t.jsonl"), "bytes").prepare_data()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": "bpe"}, "data.tokenizer=bpe: a trained model has a tokenizer"),
        ({"batch_size": 0}, "data.batch_size=0"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InstructionDataModule(**{"source": "a.jsonl", "tokenizer": "bytes"} | settings)


MANY = [{"prompt": "a" * (i % 7), "completion": "b" * (1 + i % 5) + str(i)} for i in range(24)]


def test_questions_of_equal_words_are_on_one_side():
    train, val = hold_out([parts_of(row, "here") for row in MANY], 0.25)
    asked = [{parts[0] for parts in side} for side in (train, val)]
    assert len(asked[1]) >= 1
    assert not asked[0] & asked[1]
    assert len(train) + len(val) == 24


def test_files_of_all_kinds_hold_the_same_examples(tmp_path):
    rows = [ROWS["alpaca"][0] | {"output": str(i)} for i in range(3)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "t.parquet")
    datasets.DatasetDict({"train": table, "validation": table.select([1])}).save_to_disk(tmp_path / "saved")
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    val = str(tmp_path / "t.parquet")
    for source in (val, str(tmp_path / "t.jsonl.gz"), f"hf:{tmp_path / 'saved'}"):
        data = InstructionDataModule(source, "bytes", val_source=None if source.startswith("hf:") else val)
        data.setup("fit")
        assert data.train.fingerprint() == examples_of(*rows).fingerprint()
        assert len(data.val) == (1 if source.startswith("hf:") else 3)
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(ValueError, match=r"t\.txt: is text, and rows with named fields are needed"):
        InstructionDataModule(str(tmp_path / "t.txt"), "bytes").prepare_data()


def loader(batch_size, accumulate=1, rank=0, world_size=1, position=0, num_workers=0):
    stream = AnswerStream(examples_of(*MANY), END, batch_size, rank, world_size, accumulate, seed=0)
    stream.position = position
    return StreamLoader(stream, accumulate, num_workers)


def answers(batch):
    return batch.targets[batch.targets != -100]


def test_the_weights_of_a_step_make_it_a_mean_over_its_answers():
    """However it is divided into batches and processes; an epoch has every example once."""
    whole = list(loader(batch_size=8))
    assert [batch.weight for batch in whole] == [1.0] * 3
    assert sorted(torch.cat([answers(batch) for batch in whole]).tolist()) == sorted(
        i for row in MANY for i in (*row["completion"].encode(), END)
    )
    parts = [loader(batch_size=2, accumulate=2, rank=rank, world_size=2, num_workers=rank) for rank in (0, 1)]
    halves = list(zip(*parts, strict=True))
    for step, batch in enumerate(whole):
        mine = [part for pair in halves[2 * step : 2 * step + 2] for part in pair]
        assert torch.equal(torch.cat([answers(part) for part in mine]), answers(batch))
        means = [part.weight * answers(part).double().mean() for part in mine]
        assert torch.stack(means).mean() == pytest.approx(answers(batch).double().mean().item())
        assert sum(part.num_tokens for part in mine) == batch.num_tokens
    assert sum(batch.num_tokens for batch in whole) == len(examples_of(*MANY).ids) - len(MANY)  # the last is no input


def test_the_stream_goes_on_where_it_was():
    whole, rest = list(loader(batch_size=3, accumulate=2)), list(loader(batch_size=3, accumulate=2, position=12))
    assert len(whole) == 8
    for before, after in zip(whole[4:], rest, strict=False):
        assert torch.equal(before.input_ids, after.input_ids)
        assert torch.equal(before.targets, after.targets)
        assert before[2:] == after[2:]


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_answer_once(world_size):
    examples = examples_of(*MANY[:10])
    batches = [list(OrderedAnswers(examples, END, 4, rank, world_size)) for rank in range(world_size)]
    assert len({len(own) for own in batches}) == 1
    found = torch.cat([targets[targets != -100] for own in zip(*batches, strict=True) for _, targets in own])
    assert found.tolist() == examples.ids[examples.is_answer].tolist()


def test_a_resume_with_other_batches_begins_a_step_of_its_own():
    weights = [batch.weight for batch in loader(batch_size=2, accumulate=2, position=9)]
    assert len({*weights}) > 2
    assert [sum(pair) for pair in zip(weights[::2], weights[1::2], strict=True)] == pytest.approx([2.0] * 6)
