"""Adapters: saved from a run, put on their base and taken off it again, by the command line."""

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_modules.cli import main
from lit_modules.modules.loading import load_model
from tests.conftest import ROOT
from tests.integration.growing import checkpoint_of, config_of, fit
from tokenformer import from_pretrained
from tokenformer.adapters import ADAPTERS, KIND, cut_off, fingerprint, write_adapter
from tokenformer.growth import append_tokens, pattention_layers

IDS = torch.arange(24).view(2, 12)
STAGE = [{"at_step": 2, "qkv": 24, "proj": 24, "ffn": 48}]


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """A folder with a run of `train: new`, its base as a folder, and three adapters of that, one of them the run's."""
    folder = tmp_path_factory.mktemp("adapters")
    few = {"max_steps": 4, "limit_val_batches": 0}
    config = config_of(folder, corpus, stages=STAGE, trainer=few, init="segment_norm", train="new")
    main(fit(config, folder / "run", "--best.save_top_k=0"))
    main(["export", str(checkpoint_of(folder / "run", 2)), "--out", str(folder / "base")])
    main(["adapter", "save", str(folder / "run"), "--out", str(folder / "own.safetensors")])
    generator = torch.Generator().manual_seed(0)
    for name, inits in (("anchored", ["anchored"]), ("both", ["anchored", "segment_norm", "anchored"])):
        model = from_pretrained(folder / "base")
        base, layers = fingerprint(model), pattention_layers(model)
        for init in inits:
            for layer in layers.values():
                append_tokens(layer, 4, init, generator)
                torch.nn.init.normal_(layer.segments[-1].values, std=0.1, generator=generator)
        torch.save(model(IDS), folder / f"{name}.pt")
        write_adapter(folder / f"{name}.safetensors", cut_off(model, dict.fromkeys(layers, 1)), base)
    return folder


def files(folder, *names):
    return [str(folder / f"{name}.safetensors") for name in names]


def test_what_was_trained_is_what_is_put_on(made, tmp_path, capsys):
    main(["adapter", "add", str(made / "base"), *files(made, "own"), "--out", str(tmp_path / "with")])
    assert "the base" in capsys.readouterr().out
    trained = load_model(checkpoint_of(made / "run", 4))
    assert not torch.equal(trained(IDS), from_pretrained(made / "base")(IDS))
    assert torch.equal(from_pretrained(tmp_path / "with")(IDS), trained(IDS))
    before = checkpoint_of(made / "run", 2)  # a checkpoint is a base, too
    assert torch.equal(load_model(before, adapters=files(made, "own"))(IDS), trained(IDS))
    main(["export", str(before), "--adapter", *files(made, "own"), "--out", str(tmp_path / "exported")])
    assert torch.equal(from_pretrained(tmp_path / "exported")(IDS), trained(IDS))
    assert "with the adapter `own.safetensors`" in (tmp_path / "exported/README.md").read_text()
    texts = []
    capsys.readouterr()
    both = ["--adapter", *files(made, "both")]
    for given in (
        [tmp_path / "with", *both],
        [made / "base", "--adapter", *files(made, "own"), *both],
        [made / "base"],
    ):
        main(["generate", *map(str, given), "--prompt", "the", "--temperature", "1", "--max_new_tokens", "24"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("names", [["anchored"], ["both", "own", "anchored"]])
def test_taken_off_it_is_the_base_to_the_bit(made, names, tmp_path):
    add = [f"{file}=0.3" if i else file for i, file in enumerate(files(made, *names))]
    main(["adapter", "add", str(made / "base"), *add, "--out", str(tmp_path / "with")])
    assert not torch.equal(from_pretrained(tmp_path / "with")(IDS), from_pretrained(made / "base")(IDS))
    main(["adapter", "remove", str(tmp_path / "with"), "--out", str(tmp_path / "base")])
    beside = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {file.name for file in (tmp_path / "base").iterdir()} == beside | {"README.md"}
    for name in beside:
        assert (tmp_path / "base" / name).read_bytes() == (made / "base" / name).read_bytes(), name
    if len(names) > 1:  # one after the other, they are those that were put on alone
        main(["adapter", "remove", str(tmp_path / "with"), *names[1:], "--out", str(tmp_path / "first")])
        main(["adapter", "add", str(made / "base"), *files(made, names[0]), "--out", str(tmp_path / "alone")])
        for name in ("model.safetensors", ADAPTERS):
            assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_each_adds_what_it_adds_alone(made, tmp_path):
    """In one layer, where the outputs are sums; tokens that are anchored have the norm that they were trained with."""
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def output(*given):
        return load_model(made / "base", adapters=given)._modules["backbone"].blocks[1].ffn(x).double()

    plain, (own, anchored, both) = output(), files(made, "own", "anchored", "both")
    added = {file: output(file) - plain for file in (own, anchored, both)}
    assert all(float(difference.abs().max()) > 1e-3 for difference in (added[anchored], added[both]))
    together = output(own, f"{both}=0.5", f"{anchored}=-2")
    torch.testing.assert_close(together, plain + added[own] + added[both] / 2 - 2 * added[anchored], atol=1e-6, rtol=0)
    for name in ("anchored", "both"):  # as they were trained
        logits = load_model(made / "base", adapters=files(made, name))(IDS)
        torch.testing.assert_close(logits, torch.load(made / f"{name}.pt", weights_only=True), atol=1e-6, rtol=0)
    main(["adapter", "add", str(made / "base"), own, f"{both}=0.5", "--out", str(tmp_path / "two")])
    main(["adapter", "merge", str(tmp_path / "two"), f"{anchored}=-2", "--out", str(tmp_path / "merged")])
    merged = from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged.backbone.blocks[1].ffn(x).detach().double(), together, atol=1e-6, rtol=0)
    assert not (tmp_path / "merged" / ADAPTERS).exists()
    with pytest.raises(ValueError, match="merged: has no adapters on it"):
        main(["adapter", "remove", str(tmp_path / "merged"), "--out", str(tmp_path / "x")])


def test_the_wrong_base_is_refused(made, tmp_path):
    other = from_pretrained(made / "base")
    base = fingerprint(other)
    main(["adapter", "merge", str(made / "base"), *files(made, "own"), "--out", str(tmp_path / "merged")])
    now = fingerprint(from_pretrained(tmp_path / "merged"))
    with pytest.raises(ValueError, match=f"was trained on the model {base[:16]}, this one is {now[:16]}"):
        main(["adapter", "add", str(tmp_path / "merged"), *files(made, "both"), "--out", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="--segments and --adapter: .* give one of the two"):
        main(["generate", str(made / "base"), "--prompt", "a", "--segments", "0", "--adapter", *files(made, "both")])
    with pytest.raises(ValueError, match="this one is"):
        main(["generate", str(tmp_path / "merged"), "--prompt", "a", "--adapter", *files(made, "both")])
    with pytest.raises(ValueError, match="there is an adapter own already"):
        load_model(made / "base", adapters=files(made, "own", "own"))
    with pytest.raises(ValueError, match="the weight 'half' is no number"):
        load_model(made / "base", adapters=[files(made, "own")[0] + "=half"])
    assert not (tmp_path / "x").exists()


def test_the_commands_of_the_page_run(made, tmp_path, monkeypatch):
    places = {"runs/french/20260131-120000-ab12": made / "run", "models/small": made / "base"}
    places |= {"models/whole": made / "base", "code.safetensors": made / "both.safetensors"}
    monkeypatch.chdir(tmp_path)
    for name, place in places.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(place)
    (tmp_path / "letters.txt").write_text("Dear reader, " * 9)
    _, page = (ROOT / "docs/parts.md").read_text().split("## Adapters\n")  # what comes before has a test of its own
    page = page.replace("CKPT", str(checkpoint_of(made / "run", 2)))
    commands = re.findall(r"^tokenformer ((?:adapter|generate|shrink) [^#\n]*)", page, re.M)
    assert len(commands) == 8
    for command in commands:
        main(shlex.split(command))
    made_of_them = {"both", "french", "merged", "half", "pruned"}
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"small", "whole"} | made_of_them
    assert (tmp_path / "pruned.ckpt").is_file()


def rewritten(made, change):
    file, *_ = files(made, "both")
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    change(tensors, about)
    save_file(tensors, made / "hostile.safetensors", metadata=about)
    return made / "hostile.safetensors"


PLACE = "backbone.blocks.0.ffn.segments"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop(f"{PLACE}.0.keys"), "segment 0 of .* does not fit"),
        (lambda t, _: t.update({f"{PLACE}.1.keys": torch.zeros(4, 31)}), "segment 1 of .* does not fit"),
        (lambda t, _: t.update({f"{PLACE}.1.values": torch.zeros(5, 32)}), "segment 1 of .* does not fit"),
        (lambda t, _: t.update({f"{PLACE}.1.tau": torch.ones(2, dtype=torch.float64)}), "does not fit"),
        (lambda t, _: t.update({f"{PLACE}.0.keys": t[f"{PLACE}.0.keys"].half()}), "does not fit"),
        (lambda t, _: t.pop(f"{PLACE}.1.tau"), "or can't be taken away again"),
        (lambda t, _: t.update({f"{PLACE}.0.norm_weight": torch.ones(1)}), "or can't be taken away again"),
        (lambda t, _: t.update({f"{PLACE}.9000.keys": torch.zeros(4, 32)}), "does not fit"),
        (lambda t, _: t.update({"backbone.norm.weight": torch.zeros(32)}), "is no part of a segment"),
        (lambda t, _: t.update({"backbone.blocks.7.ffn.segments.0.keys": torch.zeros(4, 32)}), "is no part of"),
        (lambda _, about: about.update(other=about.pop(KIND)), "no adapter: `tokenformer adapter save` makes one"),
        (lambda _, about: about.update({KIND: "\x1b[2J"}), "no adapter"),
    ],
)
def test_hostile_files_are_refused(made, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(made / "base", adapters=[str(rewritten(made, change))])


def test_what_is_no_adapter_is_refused(made, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"half of it")
    for path in (tmp_path / "broken.safetensors", tmp_path / "none.safetensors", made / "base/model.safetensors"):
        with pytest.raises(ValueError, match="no adapter"):
            load_model(made / "base", adapters=[str(path)])
    main(["adapter", "add", str(made / "base"), *files(made, "both"), "--out", str(tmp_path / "with")])
    record = json.loads((tmp_path / "with" / ADAPTERS).read_text())
    layer = next(iter(record["segments"]))
    for change in (
        {"base": "0" * 64},
        {"segments": record["segments"] | {layer: ["both"] * 4}},
        {"segments": record["segments"] | {layer: ["mine"] * 3}},
        {"segments": {"x": ["both"]}},
        {"weights": {}},
        {"weights": [1]},
    ):
        shutil.copytree(tmp_path / "with", tmp_path / "changed", dirs_exist_ok=True)
        (tmp_path / "changed" / ADAPTERS).write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=r"adapters.json: corrupted, or of another model"):
            main(["adapter", "remove", str(tmp_path / "changed"), "--out", str(tmp_path / "x")])
    with pytest.raises(ValueError, match="has no adapter own: choose of both"):
        main(["adapter", "remove", str(tmp_path / "with"), "own", "--out", str(tmp_path / "x")])


def changed_checkpoint(made, change):
    saved = torch.load(checkpoint_of(made / "run", 4), weights_only=True)
    change(saved)
    torch.save(saved, made / "changed.ckpt")
    return str(made / "changed.ckpt")


def test_what_was_trained_besides_is_refused(made, tmp_path):
    out = ["--out", str(tmp_path / "x.safetensors")]
    base = ["--base", str(made / "base")]

    def save(change, *options):
        main(["adapter", "save", changed_checkpoint(made, change), *out, *options])

    with pytest.raises(ValueError, match=r"outside of its new tokens: backbone\.norm\.weight; freeze"):
        save(lambda saved: saved["state_dict"]["model.backbone.norm.weight"].add_(1), *base)
    (record,) = torch.load(checkpoint_of(made / "run", 4), weights_only=True)["growths"]
    for change, message in (
        ({"train": "all"}, "not one of train: new"),
        ({"scale": "anneal"}, "has moved the tau"),
        ({"new": [*record["new"], "backbone.blocks.0.ffn.tau_gain"]}, "outside of its new tokens: .*tau_gain"),
    ):
        with pytest.raises(ValueError, match=message):
            save(lambda saved, change=change: saved.update(growths=[record | change]))
    averaged = {"model.embedding.weight": torch.zeros(257, 32)}
    with pytest.raises(ValueError, match="average of what was trained before the growth is another"):
        save(lambda saved: saved.update(current_model_state=averaged))

    def averaging(saved):
        saved["current_model_state"] = dict(saved["state_dict"])
        saved["state_dict"] |= averaged

    save(averaging, "--weights", "raw")  # which is what the tokens were trained on
    load_model(made / "base", adapters=[out[1]])
    (tmp_path / "x.safetensors").unlink()

    def shared(saved):
        for name in [name for name in saved["state_dict"] if name.endswith("segments.1.tau")]:
            del saved["state_dict"][name]

    with pytest.raises(ValueError, match=r"segment 1 of .* shares its norm .* make an adapter"):
        save(shared)
    with pytest.raises(ValueError, match="no tokens beyond those of its base"):
        main(["adapter", "save", str(checkpoint_of(made / "run", 2)), *out, *base])
    with pytest.raises(ValueError, match="is not what was trained on"):
        main(
            [
                "adapter",
                "save",
                str(checkpoint_of(made / "run", 2)),
                *out,
                "--base",
                str(made / "run/checkpoints/step-00000004.ckpt"),
            ]
        )
    assert not list(tmp_path.iterdir())
    save(lambda saved: saved.update(growths=[record | {"train": "all"}]), *base)  # compared, it needs no record
    assert (tmp_path / "x.safetensors").read_bytes() == (made / "own.safetensors").read_bytes()
    with pytest.raises(ValueError, match="must be a new file"):
        main(["adapter", "save", str(made / "run"), *out])
