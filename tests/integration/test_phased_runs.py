"""Runs in phases: each has its data, steps and growth; what is known of each phase after each is a matrix."""

import csv
import json

import pytest
import torch
import yaml

from lit_modules.cli import main
from lit_modules.commands.segments import keep_asked
from lit_modules.commands.tokenizers import tokenizer_of
from lit_modules.modules.loading import load_model
from tests.integration.growing import checkpoint_of, config_of, difference, fit, logged
from tests.integration.tiny import rows, write_vision
from tokenformer.parts import using_segments

GROWTH = {
    "stages": [{"at_phase": "digits", "factor": 2.0}],
    "init": "segment_norm",
    "train": "new",
    "schedule": "continue",
}


def write_texts(folder):
    """A text of words and one of numbers."""
    for name, words in (("words", "the token reads and writes rows"), ("digits", "31 415 92 653 58 97")):
        texts = [f"{i} {words} " * 4 for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def phased(path, phases, max_steps):
    """Give a config these phases, of (name, steps, changes of its data)."""
    config = yaml.safe_load(path.read_text())
    data = config["data"]
    config["data"] = {
        "class_path": "PhasedDataModule",
        "init_args": {
            "phases": [
                {"name": name, "steps": steps, "data": data | {"init_args": data["init_args"] | changes}}
                for name, steps, changes in phases
            ]
        },
    }
    config["trainer"]["max_steps"] = max_steps
    path.write_text(yaml.safe_dump(config))
    return path


def config_in(folder, steps=(4, 5, 0)):
    sources = [{"source": str(folder / f"{name}.jsonl")} for name in ("words", "digits", "words")]
    path = config_of(folder, [folder / "words.jsonl"], **GROWTH)
    return phased(path, list(zip(("words", "digits", "again"), steps, sources, strict=True)), sum(steps))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """(folder with texts, config, run)."""
    folder = tmp_path_factory.mktemp("phases") / "texts"
    folder.mkdir()
    write_texts(folder)
    config = config_in(folder)
    main(fit(config, folder / "run"))
    return folder, config, folder / "run"


def matrix(run):
    return list(csv.DictReader((run / "continual.csv").open()))


def test_the_matrix_is_what_validations_find_and_phases_have_their_schedule(texts):
    _, _, run = texts
    start, words, digits = matrix(run)
    assert [(row["phase"], row["step"]) for row in (start, words, digits)] == [
        ("start", "0"),
        ("words", "4"),
        ("digits", "9"),
    ]
    for name in ("words", "digits", "again"):  # validated at steps 4 and 8
        assert dict(rows(run, f"val/{name}/loss"))[3] == float(words[f"{name}/loss"])
        assert dict(rows(run, f"continual/{name}/loss"))[8] == float(digits[f"{name}/loss"])
    assert words["words/loss"] == words["again/loss"] < start["words/loss"]
    losses = {row["phase"]: {name: float(row[f"{name}/loss"]) for name in ("words", "digits")} for row in matrix(run)}
    forgotten = losses["digits"]["words"] - losses["words"]["words"]
    assert float(digits["loss/forgetting"]) == pytest.approx(forgotten)
    assert float(digits["loss/backward_transfer"]) == pytest.approx(-forgotten)
    forward = losses["start"]["digits"] - losses["words"]["digits"]
    assert float(digits["loss/forward_transfer"]) == pytest.approx(forward)
    assert float(digits["loss/average"]) == pytest.approx((losses["digits"]["words"] + losses["digits"]["digits"]) / 2)
    assert (run / "continual.png").stat().st_size > 5000
    rates = [rate for _, rate in rows(run, "train/lr")]
    assert rates[0] == rates[4] == pytest.approx(rates[1] / 2)  # a warm-up step, the peak, a decay, in each phase
    assert rates[3] < rates[2] < rates[1] == rates[5] > rates[6] > rates[7]


def test_without_its_phases_tokens_it_is_the_model_from_before_to_the_bit(texts):
    _, _, run = texts
    before, after = (load_model(checkpoint_of(run, step)) for step in (4, 9))
    ids = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(after(ids), before(ids))
    with using_segments(after, [0]):
        assert torch.equal(after(ids), before(ids))
    assert tokenizer_of(checkpoint_of(run, 9)).vocab_size == 257


def test_resumed_equals_uninterrupted(texts, tmp_path):
    """From the last step of a phase, in whose evaluation it may have been killed, and from within the next."""
    _, config, whole = texts
    killed = torch.load(checkpoint_of(whole, 4), weights_only=True)
    assert [row["phase"] for row in killed["callbacks"]["ContinualMatrix"]["rows"]] == ["start", "words"]
    killed["callbacks"]["ContinualMatrix"]["rows"].pop()
    torch.save(killed, tmp_path / "step-00000004.ckpt")
    for step, resume in ((4, tmp_path / "step-00000004.ckpt"), (6, checkpoint_of(whole, 6))):
        run = tmp_path / f"from-{step}"
        main(fit(config, run, resume=resume))
        assert difference(whole, run, 9) == 0
        assert logged(run) == logged(whole, step)
        assert matrix(run) == matrix(whole)


def test_a_resumed_run_may_have_other_phases_ahead(texts, tmp_path):
    """The last phase goes on for a step, and one more comes, with a growth, of which nothing was known at the start."""
    config = yaml.safe_load(texts[1].read_text())
    _, digits, more = config["data"]["init_args"]["phases"]
    digits["steps"] = 6
    more |= {"name": "more", "steps": 2}
    config["trainer"]["callbacks"][0]["init_args"]["stages"].append({"at_phase": "more", "factor": 1.5})
    config["trainer"]["max_steps"] = 12
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(config))
    main(fit(tmp_path / "more.yaml", tmp_path / "run", resume=checkpoint_of(texts[2], 9)))
    found = matrix(tmp_path / "run")
    assert [(row["phase"], row["step"]) for row in found] == [
        ("start", "0"),
        ("words", "4"),
        ("digits", "10"),
        ("more", "12"),
    ]
    assert [row["more/loss"] != "" for row in found] == [False, False, True, True]
    last, names = {name: float(found[3][f"{name}/loss"]) for name in ("words", "digits", "more")}, ("words", "digits")
    assert float(found[3]["loss/average"]) == pytest.approx(sum(last.values()) / 3)
    best = {name: min(float(row[f"{name}/loss"]) for row in found[1:3]) for name in names}
    assert float(found[3]["loss/forgetting"]) == pytest.approx(sum(last[name] - best[name] for name in names) / 2)
    assert found[2]["loss/forward_transfer"] != "" == found[3]["loss/forward_transfer"]
    # Two growths, each the part of a phase.
    last = checkpoint_of(tmp_path / "run", 12)
    for phases, left in ((["more"], [32, 32]), (["digits"], [32, 32]), (["digits", "more"], [32, 32, 32])):
        model = load_model(last)
        whole = model.backbone.blocks[0].ffn.segments
        kept = {("more",): [whole[0], whole[2]], ("digits",): [*whole[:2]]}.get(tuple(phases), [*whole])
        keep_asked(model, last, ["of", *phases])
        assert [*model.backbone.blocks[0].ffn.segments] == kept
        assert [segment.num_tokens for segment in kept] == left
    shrunk = torch.load(last, weights_only=True)
    shrunk["growths"].append(shrunk["growths"][-1] | {"init": "use", "phase": None})  # the record of `shrink`
    torch.save(shrunk, tmp_path / "shrunk.ckpt")
    model = load_model(tmp_path / "shrunk.ckpt")
    whole = [*model.backbone.blocks[0].ffn.segments]
    keep_asked(model, tmp_path / "shrunk.ckpt", ["of", "more"])
    assert [*model.backbone.blocks[0].ffn.segments] == [whole[0], whole[2]]
    for phases in (["words"], [], ["digits", "again"]):
        with pytest.raises(ValueError, match="give phases in which the checkpoint's run has grown: digits, more"):
            keep_asked(load_model(last), last, ["of", *phases])


WRONG = {
    "the same batches": (["--trainer.overfit_batches=2"], {}, "overfit_batches: the first batches are of one phase"),
    "another length": (["--trainer.max_steps=8"], {}, r"max_steps=8, but the steps of data\.phases are 9 together"),
    "no such phase": ([], {"at_phase": "numbers"}, "at_phase: numbers.*choose one of words, digits"),
    "the first, of a fresh model": ([], {"at_phase": "words"}, "at_step: 0.*has learned nothing yet"),
    "too long a warm-up": (
        ["--model.optim.warmup_steps=4"],
        {},
        "warmup_steps=4 don't fit into the 4 steps of phase w",
    ),
}


@pytest.mark.parametrize(("options", "stage", "message"), WRONG.values(), ids=WRONG)
def test_what_can_not_be_is_refused(texts, tmp_path, options, stage, message):
    config = yaml.safe_load(texts[1].read_text())
    (growth,) = config["trainer"]["callbacks"]
    growth["init_args"]["stages"] = [{"at_phase": "digits", "factor": 2.0} | stage]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=message):
        main(fit(tmp_path / "wrong.yaml", tmp_path / "run", *options))


def test_classes_come_in_phases(images, tmp_path):
    """One head over three classes, trained on beside the new tokens; with an average, which is what is evaluated."""
    ema = {"class_path": "EMA", "init_args": {"decay": 0.5}}
    stages = [{"at_phase": "one", "factor": 2.0}]
    growth = {"stages": stages, "init": "segment_norm", "train": ["new", "head"]}
    phases = [("two", 2, {"classes": ["dark", "bright"]}), ("one", 2, {"classes": ["grey"]})]
    config = phased(
        write_vision(tmp_path, images, [ema, {"class_path": "GrowParameterTokens", "init_args": growth}]), phases, 4
    )
    main(fit(config, tmp_path / "run"))
    _, two, one = matrix(tmp_path / "run")
    assert {"two/loss", "two/top1", "one/loss", "one/top1", "top1/forgetting", "loss/forgetting"} <= one.keys()
    found = {
        name: dict(rows(tmp_path / "run", f"val/{name}"))[3] for name in ("two/top1", "one/top1", "top1", "one/loss")
    }
    assert found["one/top1"] == float(one["one/top1"])
    assert found["one/loss"] == float(one["one/loss"])
    assert found["top1"] == pytest.approx((16 * found["two/top1"] + 7 * found["one/top1"]) / 23)  # of 23 images
    assert float(one["top1/forgetting"]) == pytest.approx(float(two["two/top1"]) - float(one["two/top1"]))
    assert (tmp_path / "run/mistakes.png").exists()
    saved = (torch.load(checkpoint_of(tmp_path / "run", step), weights_only=True) for step in (2, 4))
    before, after = (checkpoint["current_model_state"] for checkpoint in saved)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {"model.head.weight", "model.head.bias"}
    assert after["model.backbone.blocks.0.ffn.segments.1.values"].any()
