"""`tokenformer plot`: what is drawn, read back from the figure."""

import csv
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lit_modules.callbacks import LossCurve
from lit_modules.commands.plot import main, plot
from lit_modules.runs.curves import COLOURS, DASHES, MARKERS, Run, draw, short

STEP, TOKENS, FLOPS, TIME = range(4)


def write(path, rows):
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def make_run(folder, seconds=True, growths=True, val=True):
    """Training logged after 10, 20, 30 steps of 100 tokens; a token costs 6 FLOPs, from step 14 on 10; 6 s a step."""
    folder.mkdir(parents=True)
    rows = []
    for steps, loss, flops in ((10, 5.0, 6000), (20, 4.0, 14400), (30, 3.0, 24400)):
        rows.append({"step": steps - 1, "train/loss": loss, "train/tokens": 100 * steps, "train/flops": flops})
        rows[-1] |= {"train/seconds": 6 * steps} if seconds else {}
    if val:
        rows[1:1] = [{"step": 4, "val/loss": 5.5}, {"step": 13, "val/loss": 4.5}]
        rows += [{"step": 34, "val/loss": 2.5}]
    write(folder / "metrics.csv", rows)
    if growths:
        sizes = {"params_before": 1_100_000, "params_after": 2_200_000}
        write(folder / "growth.csv", [{"step": 14, "tokens": 1400, "flops": 8400, "seconds": 0.5, **sizes}])
    return folder


def line(axes, label):
    (found,) = (line for line in axes.get_lines() if line.get_label() == label)
    return found


@pytest.fixture
def grown(tmp_path):
    return make_run(tmp_path / "runs" / "grown" / "20260131-120000-ab12")


@pytest.fixture
def plain(tmp_path):
    return make_run(tmp_path / "runs" / "plain" / "20260131-130000-cd34", growths=False)


@pytest.mark.parametrize(
    ("panel", "label", "training", "validation"),
    [
        (STEP, "optimizer steps", [10, 20, 30], [5, 14, 35]),
        (TOKENS, "training tokens", [1000, 2000, 3000], [500, 1400, 3500]),
        (FLOPS, "training FLOPs", [6000, 14400, 24400], [3000, 8400, 29400]),  # bends where it grew
        (TIME, "wall-clock training time (minutes)", [1, 2, 3], [0.5, 1.4, 3.5]),
    ],
)
def test_points_stand_where_the_run_was(grown, panel, label, training, validation):
    axes = draw([Run(grown)]).axes[panel]
    assert axes.get_xlabel() == label
    assert list(line(axes, "grown training").get_xdata()) == pytest.approx(training)
    assert list(line(axes, "grown training").get_ydata()) == [5.0, 4.0, 3.0]
    assert list(line(axes, "grown validation").get_xdata()) == pytest.approx(validation)
    assert list(line(axes, "grown validation").get_ydata()) == [5.5, 4.5, 2.5]


@pytest.mark.parametrize(("panel", "x"), [(STEP, 14), (TOKENS, 1400), (FLOPS, 8400), (TIME, 1.4)])
def test_a_growth_is_marked_on_the_curve_and_named(grown, panel, x):
    axes = draw([Run(grown)]).axes[panel]
    (tick,) = (line for line in axes.get_lines() if line.get_marker() == "|")
    assert (tick.get_xdata()[0], tick.get_ydata()[0]) == pytest.approx((x, 4.5))
    (collection,) = axes.collections
    (segment,) = collection.get_segments()
    assert segment == pytest.approx(np.array([[x, 4.5], [x, axes.get_ylim()[1]]]))
    (label,) = (text for text in axes.texts if "→" in text.get_text())
    assert label.get_text() == "1.1M → 2.2M"
    assert label.xy[0] == pytest.approx(x)


def test_labels_of_growths_at_one_step_do_not_overlap(grown, tmp_path):
    other = make_run(tmp_path / "other")
    (other / "growth.csv").write_text((grown / "growth.csv").read_text().replace("2200000", "4400000"))
    same = make_run(tmp_path / "same")
    figure = draw([Run(grown), Run(other), Run(same)])
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = [text for text in axes.texts if "→" in text.get_text()]
        assert [text.get_text() for text in labels] == ["1.1M → 2.2M", "1.1M → 4.4M"]
        upper, lower = (text.get_window_extent() for text in labels)
        assert lower.y1 < upper.y0


def test_runs_differ_without_colour(grown, plain):
    axes = draw([Run(grown), Run(plain)]).axes[STEP]
    first, second = (line(axes, f"{name} validation") for name in ("grown", "plain"))
    assert first.get_marker() != second.get_marker()
    assert first._unscaled_dash_pattern != second._unscaled_dash_pattern
    for name in ("grown", "plain"):
        thin, thick = line(axes, f"{name} training"), line(axes, f"{name} validation")
        assert thin.get_color() == thick.get_color()
        assert thin.get_linewidth() < thick.get_linewidth()
    grey = [np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) for colour in COLOURS]
    assert abs(grey[0] - grey[1]) > 0.4
    assert min(abs(a - b) for a, b in combinations(grey, 2)) > 0.05
    assert len({(COLOURS[i % 6], DASHES[i % 6], MARKERS[i % 7]) for i in range(42)}) == 42


def test_a_run_without_a_column_is_named_and_the_others_are_drawn(grown, tmp_path):
    old = make_run(tmp_path / "old", seconds=False)
    figure = draw([Run(grown), Run(old)])
    notes = ["".join(text.get_text() for text in axes.texts if "logged no" in text.get_text()) for axes in figure.axes]
    assert notes == ["", "", "", "old logged no train/seconds"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [6, 6, 6, 3]
    assert not draw([Run(old)]).axes[TIME].get_lines()


def test_long_runs_are_in_hours_and_dense_ones_smoothed(tmp_path):
    (tmp_path / "long").mkdir()
    rows = [{"step": i, "train/loss": float(i % 2 + i), "train/seconds": 36.0 * (i + 1)} for i in range(400)]
    write(tmp_path / "long" / "metrics.csv", rows)
    axes = draw([Run(tmp_path / "long")]).axes[TIME]
    assert axes.get_xlabel() == "wall-clock training time (hours)"
    drawn = line(axes, "long training, mean of 5 rows")
    assert drawn.get_xdata()[-1] == 4.0
    expected = [np.mean([row["train/loss"] for row in rows[max(0, i - 2) : i + 3]]) for i in range(400)]
    assert list(drawn.get_ydata()) == pytest.approx(expected)


def test_the_first_fall_does_not_flatten_the_rest_and_a_later_rise_is_shown(tmp_path):
    for name, at in (("fall", 0), ("rise", 99)):
        (tmp_path / name).mkdir()
        rows = [{"step": i, "train/loss": 50.0 if i == at else 1 + 1 / (i + 1)} for i in range(100)]
        write(tmp_path / name / "metrics.csv", rows)
    assert draw([Run(tmp_path / "fall")]).axes[STEP].get_ylim()[1] < 1.5
    assert draw([Run(tmp_path / "rise")]).axes[STEP].get_ylim()[1] > 50


def test_a_loss_of_nan_is_drawn_as_a_gap(plain, tmp_path):
    text = (plain / "metrics.csv").read_text()
    (plain / "metrics.csv").write_text(text.replace("4.0", "nan").replace("2.5", "inf"))
    assert np.isnan(line(draw([Run(plain)]).axes[STEP], "plain training").get_ydata()[1])
    (plain / "metrics.csv").write_text("step,train/loss\n0,nan\n")
    plot([plain], tmp_path / "nan")


def test_names_are_as_long_as_needed(grown, plain, tmp_path):
    def names(*folders):
        figure = draw([Run(folder) for folder in folders], panels=("step",))
        return [text.get_text() for text in figure.legends[0].get_texts()][: len(folders)]

    assert names(grown, plain) == ["grown validation", "plain validation"]
    mine, again = make_run(tmp_path / "mine"), make_run(grown.parent / "20260201-120000-ef56")
    assert names(grown, mine, again) == [
        "grown/20260131-120000-ab12 validation",
        "mine validation",
        "grown/20260201-120000-ef56 validation",
    ]


def test_pictures_are_written_and_the_same_again(grown, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(grown)])
    assert capsys.readouterr().out == f"wrote {grown}/curves.png {grown}/curves.svg\n"
    svg, png = (grown / "curves.svg").read_text(), (grown / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert svg.count(">1.1M → 2.2M</text>") == 4
    for out in ("a/b.c", "a/b.c.png", "a/b.c.svg"):
        main([str(grown), "--out", out])
        assert {path.name for path in (tmp_path / "a").iterdir()} == {"b.c.png", "b.c.svg"}
        assert (tmp_path / "a/b.c.svg").read_text() == svg
        assert (tmp_path / "a/b.c.png").read_bytes() == png
    (grown / "curves.svg").unlink()
    plot([grown / "metrics.csv"])  # as the shell completes it
    assert (grown / "curves.svg").read_text() == svg
    main([str(grown), str(plain), "--metric", "train/loss"])
    assert (tmp_path / "curves.png").exists()


def test_another_metric(plain):
    write(plain / "metrics.csv", [{"step": 9, "val/bits_per_byte": 2.0, "train/loss": 1.0}])
    figure = draw([Run(plain)], "val/bits_per_byte", panels=("step",))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain validation"]
    assert figure.get_supylabel() == "bits per byte"


def test_a_folder_of_runs_is_all_trainings_in_it(grown, tmp_path, monkeypatch):
    make_run(grown.parent / "20260201-120000-ef56")
    make_run(tmp_path / "runs/other/20260301-120000-ab12")
    (grown.parent / "20260301-120000-0000-validate").mkdir()
    (grown.parent / "20260301-120000-0000-validate" / "metrics.csv").write_text("step,val/loss\n0,1.0\n")
    drawn = []
    monkeypatch.setattr("lit_modules.commands.plot.draw", lambda runs, *rest: drawn.append(runs) or draw(runs, *rest))
    assert plot([grown.parent]) == [grown.parent / "curves.png", grown.parent / "curves.svg"]
    plot([tmp_path], tmp_path / "all")
    assert [len(runs) for runs in drawn] == [2, 3]
    assert drawn[1][0].folder == grown


def test_mistakes_are_named_with_their_fix(grown, plain, tmp_path):
    with pytest.raises(ValueError, match=f"step.ckpt/metrics.csv: no such file; .*, such as {plain}$"):
        main([str(plain / "checkpoints/step.ckpt")])
    with pytest.raises(ValueError, match="such as runs/NAME/STAMP"):
        plot([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=f"{plain}/metrics.csv: no val/los; .* logged .*train/loss, .*val/loss"):
        plot([plain], metric="val/los")
    (plain / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match="nothing yet"):
        plot([plain])


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "tokenformer plot runs/quickstart/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1100, "1.1k"), (999_999, "1M"), (1_234_567, "1.23M"), (2e9, "2B")]
)
def test_counts_in_three_digits(count, text):
    assert short(count) == text


def end_of_training(folder):
    LossCurve().on_fit_end(SimpleNamespace(loggers=[], default_root_dir=str(folder)), None)


def test_loss_curve_at_the_end_of_training(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lit_modules.callbacks.loss_curve.rank_zero_info", said.append)
    end_of_training(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,train/lr\n0,1.0\n")
    end_of_training(tmp_path)
    assert not (tmp_path / "loss.png").exists()
    folder = make_run(tmp_path / "run", val=False)
    end_of_training(folder)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert said[0] == "no loss curve: the run wrote no metrics.csv"
    assert said[1].startswith("no loss curve: ")
    assert said[2] == f"loss curve: {folder / 'loss.png'}"


DAMAGED = {
    "no number": ("train/loss=.x., no number", lambda text: text.replace(b"5.0", b"x")),
    "no CSV": ("no CSV: new-line", lambda text: text.replace(b",5.0", b",5\r.0")),
    "other bytes": ("no column .step.", lambda text: bytes(range(128, 200)) + text),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_log_is_named(tmp_path, message, damage):
    log = make_run(tmp_path / "run") / "metrics.csv"
    log.write_bytes(damage(log.read_bytes()))
    for folder in (log.parent, tmp_path):
        with pytest.raises(ValueError, match=rf"run/metrics.csv: .*{message}"):
            plot([folder])


def test_a_damaged_table_of_growths_is_named(tmp_path):
    table = make_run(tmp_path / "run") / "growth.csv"
    for column, at in (("flops", "8400"), ("params_after", "2200000")):
        text = table.read_text()
        table.write_text(text.replace(at, "?"))
        with pytest.raises(ValueError, match=rf"growth.csv: the row of step 14 has {column}='\?', no number"):
            plot([table.parent])
        table.write_text(text)
