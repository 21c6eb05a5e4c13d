"""A model that has grown is trained on other data: from its own sizes, with tokens that are added at the first step."""

import csv

import pytest
import torch
import yaml

from lit_modules.cli import main
from lit_modules.modules.loading import load_model
from tests.conftest import write_corpus
from tests.integration.growing import checkpoint_of, config_of, difference, fit, logged
from tests.integration.tiny import TINY
from tokenformer import LMConfig, TokenFormerLM, from_pretrained, grow, save_pretrained
from tokenformer.growth import pattention_layers

SIZES = TINY["model"]["init_args"]["config"]
GROWTH = {"stages": [{"at_step": 0, "factor": 1.5}], "init": "segment_norm", "train": "new"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a model that has grown by tokens with a norm of their own, and by ordinary ones in the blocks."""
    torch.manual_seed(1)
    model = TokenFormerLM(LMConfig(**SIZES, vocab_size=257, max_seq_len=32))
    grow(model, qkv=24, ffn=48, init="pairs")
    grow(model, ffn=64, init="random", layers="*.blocks.1.*")
    folder = tmp_path_factory.mktemp("start") / "model"
    save_pretrained(model, folder)
    return folder


def config_from(folder, corpus, source, **growth):
    """Like `config_of`, but with no sizes at all, and a model to start from."""
    path = config_of(folder, corpus, **GROWTH | growth, trainer={"max_steps": 4})
    config = yaml.safe_load(path.read_text())
    model = config["model"]["init_args"]
    model["config"], model["init_from"] = {}, str(source)
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_grown_model_grows_at_step_0_on_other_data_and_leaves_what_it_was(start, tmp_path):
    corpus = tmp_path / "other.jsonl"
    write_corpus(corpus, seed=1)
    config = config_from(tmp_path, [corpus], start)
    main(fit(config, tmp_path / "run"))
    (growth,) = csv.DictReader((tmp_path / "run/growth.csv").open())
    assert growth["step"] == "0"
    assert float(growth["loss_after"]) == pytest.approx(float(growth["loss_before"]), abs=1e-6)
    sizes = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["init_args"]["config"]
    assert (sizes["depth"], sizes["dim"], sizes["qkv_tokens"], sizes["max_seq_len"]) == (2, 32, 24, 32)
    before, after = from_pretrained(start), load_model(checkpoint_of(tmp_path / "run", 4))
    assert [len(layer.segments) for layer in pattention_layers(after).values()] == [3, 3, 3, 2, 3] * 2
    new = after.state_dict()
    assert all(torch.equal(new[name], tensor) for name, tensor in before.state_dict().items())
    assert new["backbone.blocks.1.ffn.segments.2.values"].any()
    main(fit(config, tmp_path / "resumed", resume=checkpoint_of(tmp_path / "run", 1)))
    assert difference(tmp_path / "run", tmp_path / "resumed", 4) == 0
    assert logged(tmp_path / "resumed") == logged(tmp_path / "run", 1)
    # The checkpoint of this run is as good a start: all that it has learned, and room for more.
    again = config_from(tmp_path, [corpus], checkpoint_of(tmp_path / "run", 4))
    main(fit(again, tmp_path / "again", "--trainer.max_steps=2"))
    third = load_model(checkpoint_of(tmp_path / "again", 2))
    assert all(torch.equal(third.state_dict()[name], tensor) for name, tensor in new.items())
    assert len(third.backbone.blocks[0].ffn.segments) == 4


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.config.depth=12", r"other sizes than model\.config\.depth=12 \(2 there\): leave these out"),
        ("--model.init_from=null", r"stage 1 .at_step: 0, factor: 1.5.: grows a model that has learned nothing yet"),
    ],
)
def test_what_can_not_be_is_refused(corpus, start, tmp_path, option, message):
    """A typed size, the default or not, and a growth of a fresh model."""
    with pytest.raises(ValueError, match=message):
        main(fit(config_from(tmp_path, corpus, start), tmp_path / "run", option))
