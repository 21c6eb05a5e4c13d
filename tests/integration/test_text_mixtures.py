"""A mixture of sources and named validation sets through the command line: shares, metrics, resume."""

import math

import pytest
import torch
import yaml

from datamodules.text import TextDataModule
from lit_modules.cli import main
from lit_modules.modules.loading import load_model
from tests.conftest import write_corpus
from tests.integration.growing import checkpoint_of
from tests.integration.tiny import rows, write_config


@pytest.fixture(scope="module")
def mixed(corpus, tmp_path_factory):
    """(config, whole run, resumed run)."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed, name in enumerate(("web", "code", "wiki"), 1):
        write_corpus(folder / f"{name}.jsonl", num_documents=40, seed=seed)
    config = write_config(folder, corpus, trainer={"callbacks": [{"class_path": "EMA"}]})
    given = yaml.safe_load(config.read_text())
    given["data"]["init_args"] |= {
        "source": {str(folder / "web.jsonl"): 0.75, str(folder / "code.jsonl"): 0.25},
        "val_sources": {"wiki": str(folder / "wiki.jsonl")},
    }
    given["best"] = {"monitor": "val/wiki/loss"}
    config.write_text(yaml.safe_dump(given))
    fit = ["fit", "--config", str(config)]
    main([*fit, "--run_dir", str(folder / "whole")])
    main([*fit, "--run_dir", str(folder / "resumed"), f"--ckpt_path={checkpoint_of(folder / 'whole', 4)}"])
    return config, folder / "whole", folder / "resumed"


COLUMNS = ("val/loss", "val/wiki/loss", "val/raw_loss", "val/raw_wiki/loss", "val/wiki/bits_per_byte")


def test_a_mixture_is_resumed_to_the_bit(mixed):
    _, whole, resumed = mixed
    for column in ("train/loss", *COLUMNS):
        assert rows(resumed, column)
        assert rows(resumed, column) == rows(whole, column)[-len(rows(resumed, column)) :], column
    assert list((whole / "checkpoints").glob("best-*"))  # by a named set


def test_a_named_set_has_the_metrics_of_its_text(mixed):
    config, whole, _ = mixed
    data = TextDataModule(**yaml.safe_load(config.read_text())["data"]["init_args"])
    data.setup("validate")
    model = load_model(checkpoint_of(whole, 8))
    for column, loader in zip(("val/loss", "val/wiki/loss"), data.val_dataloader(), strict=True):
        with torch.no_grad():
            nats = torch.cat([model.nats_and_entropy(*batch)[0][batch[1] != -100] for batch in loader])
        assert rows(whole, column)[-1][1] == pytest.approx(nats.mean().item(), rel=1e-5)
    tokens = data.named["wiki"].split
    bits = rows(whole, "val/wiki/loss")[-1][1] / math.log(2) * tokens.tokens / tokens.bytes
    assert rows(whole, "val/wiki/bits_per_byte")[-1][1] == pytest.approx(bits, rel=1e-5)


def test_a_test_reads_the_named_sets_too(mixed, tmp_path):
    config, whole, _ = mixed
    main(["test", "--config", str(config), f"--ckpt_path={checkpoint_of(whole, 8)}", "--run_dir", str(tmp_path / "t")])
    for column in ("loss", "wiki/loss"):  # there is no text for tests alone
        expected = pytest.approx(rows(whole, f"val/{column}")[-1][1], rel=1e-5)
        assert rows(tmp_path / "t", f"test/{column}")[-1][1] == expected


def test_other_weights_are_no_resume(mixed):
    config, whole, _ = mixed
    source = yaml.safe_load(config.read_text())["data"]["init_args"]["source"]
    given = yaml.safe_dump(source, default_flow_style=True, width=1000).replace("0.75", "0.5").strip()
    with pytest.raises(ValueError, match=r"weights in data\.source: 0\.25, 0\.75 then, 0\.3333, 0\.6667 now"):
        main(["fit", "--config", str(config), "--run_dir", str(whole), "--ckpt_path=last", f"--data.source={given}"])
