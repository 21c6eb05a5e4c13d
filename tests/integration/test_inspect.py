"""`tokenformer inspect` on a text of a stranger and on images: its tables, its page, its page in a browser.

One file: the tests share two models, and what the command has written about one.
"""

import csv
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import BinaryCalibrationError

from datamodules.tokenizer import ByteTokenizer, train_bpe
from lit_modules.cli import main
from lit_modules.commands import inspect_inputs
from lit_modules.commands.calibration import Calibration
from lit_modules.commands.inspect_inputs import Texts
from lit_modules.commands.tokenizers import save_tokenizer
from tests.tokenformer.tiny_lm import LM, SIZES
from tests.tokenformer.tiny_vit import TINY
from tokenformer import LMConfig, TokenFormerLM, TokenFormerViT, ViTConfig, grow, save_pretrained
from tokenformer.inspection import Scored, scores_and_weights

HOSTILE = "<script>document.title='run'</script>\n<img src=x onerror=alert(1)> \" ' & </pre></html> {0} \x00\u202e é\n"
TEXT = HOSTILE + "The model reads tokens, the Model of 1999 reads 20 tokens; 東京, 東京.\n" * 3
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def images_of(page, count):
    found = re.findall(r"<img[^>]*>", page)
    assert len(found) == count
    return found


def rows(folder, table):
    with (folder / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """(folder, model): grown once, with tokens that have learned something."""
    folder = tmp_path_factory.mktemp("models") / "<b>lm"
    torch.manual_seed(0)
    model = TokenFormerLM(LM)
    grow(model, qkv=20, ffn=60, init="segment_norm")
    with torch.no_grad():
        model.embedding.weight.mul_(20)
        model.backbone.blocks[0].ffn.segments[0].keys[3] = 0  # never fires
        model.backbone.blocks[0].ffn.segments[1].values.normal_()
    save_pretrained(model, folder)
    save_tokenizer(ByteTokenizer(), folder, LM.max_seq_len)
    return folder, model.eval()


@pytest.fixture(scope="module")
def inspected(text_model, tmp_path_factory):
    """The folder that the command has written about a text."""
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8", newline="")
    arguments = ["--text", str(folder / "text.txt"), "--out", str(folder / "out"), "--ablate"]
    main(["inspect", str(text_model[0]), *arguments])
    return folder / "out"


def test_predictions_and_losses_of_a_text(text_model, inspected):
    model, ids = text_model[1], torch.tensor([256, *TEXT.encode()])
    expected = []
    for start in range(0, len(ids) - 1, 64):
        window = ids[None, start : start + 65]
        nats, entropy = model.nats_and_entropy(window[:, :-1], window[:, 1:])
        best = model(window[:, :-1]).softmax(-1).max(-1)
        expected += zip(
            *(t[0].tolist() for t in (window[:, 1:], nats, entropy, best.values)),
            (best.indices == window[:, 1:])[0].int().tolist(),
            strict=True,
        )
    found = rows(inspected, "predictions")
    assert [int(row["position"]) for row in found] == list(range(len(ids) - 1))
    columns = ("id", "nats", "entropy", "confidence", "right")
    numbers = np.array([[float(row[column]) for column in columns] for row in found])
    np.testing.assert_allclose(numbers, expected, rtol=1e-4, atol=1e-6)
    assert found[0]["token"] == "<"
    losses = {(row["silent"], row["kind"]): row for row in rows(inspected, "losses")}
    assert float(losses["nothing", "all"]["loss"]) == pytest.approx(numbers[:, 1].mean(), rel=1e-4)
    assert float(losses["nothing", "all"]["accuracy"]) == pytest.approx(numbers[:, 4].mean(), rel=1e-4)
    digits = np.array([row["token"].isdigit() for row in found])
    assert int(losses["block 1", "digits"]["predictions"]) == digits.sum() == 20
    assert float(losses["nothing", "digits"]["loss"]) == pytest.approx(numbers[digits, 1].mean(), rel=1e-4)
    silent = {part for part, _ in losses}
    assert silent == {"nothing", "feed-forward", "projections", "block 0", "block 1"}
    assert len({losses[part, "all"]["loss"] for part in silent}) == 5


def test_tokens_and_what_fires_them(text_model, inspected):
    model, ids = text_model[1], torch.tensor([256, *TEXT.encode()])
    name, layer = "backbone.blocks.0.ffn", model.backbone.blocks[0].ffn
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for start in range(0, len(ids) - 1, 64):
        model(ids[None, start : start + 65][:, :-1])
    hook.remove()
    scores, weights = scores_and_weights(layer, torch.cat(inputs))
    found = [row for row in rows(inspected, "tokens") if row["layer"] == name]
    assert [(row["segment"], row["token"]) for row in found[49:52]] == [("0", "49"), ("1", "0"), ("1", "1")]
    np.testing.assert_allclose([float(row["fires"]) for row in found], (scores > 0).float().mean(0), atol=1e-6)
    lengths = torch.cat([segment.values.norm(dim=1) for segment in layer.segments])
    expected = (weights.abs().mean(0) * lengths).tolist()
    np.testing.assert_allclose([float(row["contribution"]) for row in found], expected, rtol=1e-4)
    old, new = (row for row in rows(inspected, "segments") if row["layer"] == name)
    assert (old["dead"], old["tokens"], new["tokens"]) == ("1", "50", "10")
    assert float(old["contribution"]) == pytest.approx(sum(expected[:50]) / sum(expected), rel=1e-4)
    assert float(new["score_rms"]) == pytest.approx(float(scores[:, 50:].square().mean().sqrt()), rel=1e-4)
    assert float(new["tau"]) == pytest.approx(10**0.5, rel=1e-4)
    contexts = [row for row in rows(inspected, "contexts") if row["layer"] == name]
    assert len(contexts) == 60 * 5
    for n in (0, 3, 55):
        for row, weight in zip(contexts[5 * n : 5 * n + 5], weights[:, n].sort(descending=True).values, strict=False):
            place = int(row["position"])
            assert float(row["weight"]) == pytest.approx(float(weight), abs=1e-5)
            assert float(weights[place, n]) == pytest.approx(float(weight), abs=1e-5)
            before = bytes(ids[max(1, place - 40) : place].tolist()).decode(errors="replace")
            assert (row["segment"], row["token"], row["before"]) == (str(int(n >= 50)), str(n % 50), before)


def test_the_page_shows_a_hostile_text_and_runs_none_of_it(inspected):
    page = (inspected / "index.html").read_text(encoding="utf-8")
    tags = set(re.findall(r"</?([!\w]*)", page.lower()))
    known = {"!doctype", "html", "head", "meta", "title", "style", "body", "h1", "h2", "h4", "p", "pre", "div", "b"}
    known |= {"table", "tr", "th", "td", "img", "span", "details", "summary"}
    assert tags == known
    assert page.count("<html") == page.count("</html>") == 1
    assert all(re.search(' src="data:image/png;base64,[^"]+">$', image) for image in images_of(page, 3))
    assert "://" not in page
    assert "default-src 'none'" in page
    assert "&lt;b&gt;lm on " in page
    for picture in ("firing.png", "angles.png", "calibration.png"):
        assert len(Image.open(inspected / picture).convert("RGB").getcolors(2**24)) > 50


def test_the_page_in_a_browser(inspected, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}: apt-get install chromium-headless-shell")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000"]
    options += [f"--screenshot={tmp_path / 'page.png'}", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [browser, *options, (inspected / "index.html").as_uri()], check=True, capture_output=True, timeout=120
    )
    page = Image.open(tmp_path / "page.png").convert("RGB")
    assert page.size == (1200, 2000)
    colors = page.getcolors(2**24)
    assert len(colors) > 200
    pictured = Image.open(inspected / "firing.png").convert("RGB").getcolors(2**24)
    of_curves = {color for count, color in pictured if max(color) - min(color) > 60 and count > 100}
    assert sum(count for count, color in colors if color in of_curves) > 50  # the page shows the picture
    dark = sum(count for count, color in colors if sum(color) < 600)
    assert 0.02 < dark / (1200 * 2000) < 0.6


@pytest.fixture
def texts(text_model, tmp_path):
    """The input that a text makes."""

    def read(text):
        (tmp_path / "text").write_text(text, encoding="utf-8")
        return Texts(text_model[1], text_model[0], tmp_path / "text", None)

    return read


def test_kinds_of_tokens(texts):
    shown = texts("Ann saw 12 cats. Ann saw é és é")
    (batch,) = shown.batches()
    letters = [chr(i) for i in batch.targets.tolist()]  # a letter a byte
    found = {
        kind: "".join(letter if k else "_" for letter, k in zip(letters, of_kind.tolist(), strict=True))
        for kind, of_kind in zip(shown.kinds, batch.kinds.T, strict=True)
    }
    assert found["all"] == "Ann saw 12 cats. Ann saw Ã© Ã©s Ã©"
    assert found["digits"] == "________12________________________"
    assert found["names"] == "Ann______________Ann______________"
    assert found["copied"] == "_________________Ann_saw________Ã©"
    assert found["new"] == "Ann_saw_12_cats__________Ã©_Ã©s___"


def test_frequent_and_rare_tokens(texts):
    shown = texts("e" * 10 + "t" * 6 + "z" * 3 + "q")  # and the end of another text: 21 tokens
    assert (shown.frequent, shown.rare) == ({ord("e")}, {ord("q"), 256})


def test_a_text_is_read_in_pieces(text_model, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_inputs, "READ_CHARACTERS", 16)
    monkeypatch.setattr(inspect_inputs, "BATCH_INPUTS", 100)
    words = "".join(f"the token {i}\n" for i in range(80))
    (tmp_path / "text").write_text(words)
    tokenizer = train_bpe([words], 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    model = TokenFormerLM(LMConfig(vocab_size=tokenizer.vocab_size, max_seq_len=32, **SIZES))
    texts = Texts(model, tmp_path, tmp_path / "text", None)
    assert texts.ids.tolist() == [tokenizer.end_of_text, *tokenizer.encode_batch([words])[0]]
    batches = list(texts.batches())
    assert torch.equal(
        torch.cat([batch.targets for batch in batches]), torch.from_numpy(texts.ids[1:].astype(np.int64))
    )
    places = torch.cat([batch.places for batch in batches])
    assert places[places >= 0].tolist() == list(range(len(texts.ids) - 1))
    assert len(batches) == 4


def test_whether_a_model_knows_that_it_guesses():
    torch.manual_seed(0)
    calibration, entropy = Calibration(10), torch.rand(2000) * 2.3
    confidence, wrong = torch.rand(2000), torch.rand(2000) < entropy / 2.3
    likeliest = torch.zeros(2000, dtype=torch.long)
    for part in (slice(1200), slice(1200, None)):
        calibration.add(wrong[part].long(), Scored(entropy[part], entropy[part], confidence[part], likeliest[part]))
    calibration.add(torch.tensor([-100]), Scored(*torch.ones(3, 1), torch.tensor([0])))  # unknown
    expected = BinaryCalibrationError(n_bins=15)(confidence, (~wrong).long())
    assert calibration.error() == pytest.approx(float(expected), abs=1e-5)
    assert float(calibration.auroc.compute()) == pytest.approx(roc_auc_score(wrong, entropy), abs=1e-3)
    assert sum(row["predictions"] for row in calibration.rows() if row["by"] == "entropy") == 2000


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "vit"
    torch.manual_seed(0)
    model = TokenFormerViT(ViTConfig(**TINY | {"num_classes": 3, "image_size": 16}))
    model.pretrained_cfg = {"label_names": ["dark", "grey", "bright"], "input_size": [3, 16, 16], "crop_pct": 1.0}
    save_pretrained(model, folder)
    return folder, model.eval()


def test_images(image_model, images, tmp_path, recwarn):
    shutil.copytree(images / "val", tmp_path / "photos")
    (tmp_path / "photos/dark/torn.png").write_bytes(b"none")
    shutil.copytree(images / "val/grey", tmp_path / "photos/unknown")
    main(
        [
            "inspect",
            str(image_model[0]),
            "--images",
            str(tmp_path / "photos"),
            "--out",
            str(tmp_path / "out"),
            "--ablate",
        ]
    )
    assert any("torn.png" in str(warning.message) for warning in recwarn)
    found, losses = rows(tmp_path / "out", "predictions"), rows(tmp_path / "out", "losses")
    assert [row["target"] for row in found] == ["bright"] * 8 + ["dark"] * 8 + ["grey"] * 7 + [""] * 7
    known = found[:23]
    assert [row["right"] for row in known] == [str(int(row["target"] == row["predicted"])) for row in known]
    assert [row["nats"] for row in found[23:]] == [""] * 7
    assert [row["silent"] for row in losses] == [
        "nothing",
        "feed-forward",
        "projections",
        *(f"block {i}" for i in range(3)),
    ]
    assert {row["predictions"] for row in losses} == {"23"}
    assert float(losses[0]["loss"]) == pytest.approx(np.mean([float(row["nats"]) for row in known]), rel=1e-4)
    contexts = rows(tmp_path / "out", "contexts")
    assert {(row["row"], row["column"]) for row in contexts} == {
        ("", ""),
        ("0", "0"),
        ("0", "1"),
        ("1", "0"),
        ("1", "1"),
    }
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    images_of(page, 3 + 3 * 3)


def test_the_patch_at_a_place(image_model, images):
    shown = inspect_inputs.Images(image_model[1], image_model[0], images / "val")
    place = 9 * shown.num_tokens + 1 + 2  # the second patch of the first row is 2, behind the class token
    assert shown.context(place) == {"file": str(images / "val/dark/1.png"), "row": 1, "column": 0}
    for at, (left, top, right, bottom) in (
        (place, (0, 48, 47, 95)),
        (place - 3, (0, 0, 95, 95)),
    ):  # the class token's: all
        pixels = np.asarray(shown.picture(at))
        assert pixels.shape == (96, 96, 3)
        frame = (pixels == (0xE0, 0x7B, 0)).all(-1)
        rows, columns = frame.nonzero()
        assert (columns.min(), rows.min(), columns.max(), rows.max()) == (left, top, right, bottom)


def test_what_can_not_be_inspected(text_model, image_model, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("text")
    (tmp_path / "folder").mkdir()
    baseline = tmp_path / "baseline"
    save_pretrained(TokenFormerLM(LMConfig(vocab_size=257, baseline="parameters", **SIZES)), baseline)
    for source, option, path, message in (
        (text_model[0], "--text", "absent", "--text .*absent: no such file"),
        (text_model[0], "--text", "empty", "--text .*empty: is empty"),
        (text_model[0], "--images", "folder", "is a language model: give --text FILE"),
        (image_model[0], "--text", "text", "is an image model: give --images FOLDER alone"),
        (image_model[0], "--images", "absent", "--images .*absent: no such folder"),
        (image_model[0], "--images", "folder", "no images in it"),
        (baseline, "--text", "text", "is a baseline and has no parameter tokens"),
        (tmp_path / "folder", "--text", "text", "neither a checkpoint nor"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["inspect", str(source), option, str(tmp_path / path), "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists: choose another name"):
        main(["inspect", str(text_model[0]), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "folder")])
