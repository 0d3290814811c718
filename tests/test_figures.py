"""Figures show the numbers they are made of, whatever sets are called; the commands draw them all.

What a picture looks like, a person has to see; `drawn` hands out the matplotlib figure, so that
what its lines and labels say can be asserted.
"""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from report import figures


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Function (a function of figures, *content) -> the figure that it saved, once it is a PNG."""
    kept, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure) or
                        save(figure, path))

    def draw(function, *content):
        path = tmp_path / "picture.png"
        function(*content, path)
        is_picture(path)
        return kept[-1]

    return draw


def is_picture(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 200
    return True


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


# --- training curves ------------------------------------------------------------------------------


def epoch(number, loss=1.0, monitor=0.5, **more):
    return {"event": "epoch", "epoch": number, "loss": loss, "monitor": monitor,
            "monitor_name": "20-NN accuracy on the test images", "lr": 0.1, **more}


def points(axis):
    return [tuple(p) for p in axis.get_lines()[0].get_xydata().tolist()]


def test_training_curves_count_epochs_from_one_and_mark_the_best(drawn):
    records = [{"event": "start"}, epoch(0, 3.0, 0.2), {"event": "step"}, epoch(1, 2.0, 0.9),
               epoch(2, 1.0, 0.8)]
    loss, monitor, lr = drawn(figures.training_curves, records).axes
    assert points(loss) == [(1, 3), (2, 2), (3, 1)]
    assert points(monitor) == [(1, 0.2), (2, 0.9), (3, 0.8)]
    assert points(lr) == [(1, 0.1), (2, 0.1), (3, 0.1)]
    assert labels(monitor) == ["best: 0.9000, epoch 2"]
    assert monitor.get_title() == "20-NN accuracy on the test images"
    assert loss.get_xlabel() == "epoch"


def test_the_warm_up_is_shaded_and_has_no_monitor(drawn):
    records = [epoch(-2, monitor=None), epoch(-1, monitor=None), epoch(0)]
    loss, monitor, _ = drawn(figures.training_curves, records).axes
    assert [x for x, _ in points(loss)] == [-1, 0, 1]
    assert [x for x, y in points(monitor) if y == y] == [1]  # a nan is not drawn
    assert loss.get_xlabel() == "epoch (shaded: warm-up)"
    (nothing,) = drawn(figures.training_curves, records[:2]).axes[1].get_lines()
    assert np.isnan(nothing.get_ydata()).all()


def test_what_was_done_again_after_a_stop_replaces_what_was_recorded_before(drawn):
    records = [{"event": "start"}, epoch(0, 9.0), epoch(1, 8.0), epoch(2, 7.0), epoch(3, 6.0),
               {"event": "start"}, epoch(2, 5.0)]
    loss = drawn(figures.training_curves, records).axes[0]
    assert points(loss) == [(1, 9), (2, 8), (3, 5)]  # epoch 4 is not there yet, again
    assert loss.get_lines()[1].get_xdata()[0] == 2.5
    assert loss.get_xlabel() == "epoch (dotted: resumed)"


def test_a_run_resumed_where_it_stopped_is_one_curve_with_a_mark(drawn):
    records = [{"event": "start"}, epoch(0), {"event": "resume"}, epoch(1), epoch(2)]
    loss = drawn(figures.training_curves, records).axes[0]
    assert [x for x, _ in points(loss)] == [1, 2, 3]
    assert [line.get_xdata()[0] for line in loss.get_lines()[1:]] == [1.5]


def test_a_start_before_any_epoch_is_no_place_to_mark(drawn):
    records = [{"event": "start"}, {"event": "start"}, epoch(0)]
    loss = drawn(figures.training_curves, records).axes[0]
    assert len(loss.get_lines()) == 1


# --- scores ---------------------------------------------------------------------------------------

ODD_NAMES = ["npz:/x, y/a$b^{.npz", "folder:/x/\udcff\n", "_hidden", "a" * 99, "svhn", "blobs",
             "rest", "uniform", "gaussian"]


def panel(names=("cifar10", "svhn", "texture"), shift=3.0, low=1.0):
    rng = np.random.default_rng(0)
    scores = {n: low + rng.gamma(4 + shift * bool(i), 2, 50 + i) for i, n in enumerate(names)}
    return f"{names[0]}, 1 cluster", names[0], scores


def test_every_histogram_adds_up_to_all_images_of_its_set_the_far_ones_included(drawn):
    title, inside, scores = panel()
    scores["svhn"][0], scores["svhn"][1] = 1e9, 1e-9
    (axis,) = drawn(figures.score_histograms, [(title, inside, scores)]).axes
    assert labels(axis) == ["cifar10", "svhn", "texture", "95 % of cifar10"]
    (inside,), (*outside, limit) = axis.patches, axis.get_lines()
    for heights in (inside.get_data().values, *(line.get_ydata() for line in outside)):
        assert sum(heights) == pytest.approx(100)
    assert len(outside) == 2
    assert limit.get_xdata()[0] == np.percentile(scores["cifar10"], 95)


@pytest.mark.parametrize(("low", "scale"), [(0.01, "log"), (-30.0, "linear")])
def test_scores_over_decades_are_drawn_on_a_logarithmic_axis(low, scale, drawn):
    (axis,) = drawn(figures.score_histograms, [panel(low=low)]).axes
    assert axis.get_xscale() == scale


def test_the_area_under_a_roc_curve_is_the_auroc_that_its_label_says(drawn):
    title, inside, scores = panel()
    (axis,) = drawn(figures.roc_curves, [(title, inside, scores)]).axes
    for line, name in zip(axis.get_lines(), ("svhn", "texture"), strict=False):
        truth = np.repeat([0, 1], [len(scores[inside]), len(scores[name])])
        auroc = roc_auc_score(truth, np.concatenate([scores[inside], scores[name]]))
        assert auc(*line.get_xydata().T) == pytest.approx(1e4 * auroc)
        assert line.get_label() == f"{name}  {auroc:.4f}"


def test_the_area_under_the_steps_of_a_precision_recall_curve_is_the_aupr_of_its_label(drawn):
    title, inside, scores = panel()
    scores[inside][0] = 1e9  # so that the curve does not begin at precision 1
    (axis,) = drawn(figures.precision_recall_curves, [(title, inside, scores)]).axes
    for line, name in zip(axis.get_lines(), ("svhn", "texture"), strict=True):
        truth = np.repeat([0, 1], [len(scores[inside]), len(scores[name])])
        aupr = average_precision_score(truth, np.concatenate([scores[inside], scores[name]]))
        assert line.get_drawstyle() == "steps-post"
        recall, precision = line.get_xydata().T
        assert precision[-1] == precision[-2]  # no step up to scikit-learn's last point
        assert -np.sum(np.diff(recall) * precision[:-1]) == pytest.approx(1e4 * aupr)
        assert line.get_label() == f"{name}  {aupr:.4f} ({truth.mean():.4f})"


@pytest.mark.parametrize(
    "function", [figures.score_histograms, figures.roc_curves, figures.precision_recall_curves]
)
def test_sets_of_any_name_number_and_score_can_be_drawn(function, drawn):
    everything = panel(ODD_NAMES)
    equal = ("a, 2 clusters", "a", {"a": np.zeros(3), "b": np.zeros(1)})
    axes = drawn(function, [everything, equal, panel(), panel()]).axes  # in two rows
    assert len(axes) == 4
    shown = " ".join(labels(axes[0]))
    assert "folder:??" in shown
    assert " _hidden" in shown
    assert "a" * 29 not in shown
    assert axes[0].get_title() == r"npz:a\$b^{.npz, 1 cluster"


def test_neighbouring_lines_differ_in_colour_and_all_lines_in_colour_or_style():
    _, (axis,) = figures._new(1)
    lines = [axis.plot([0, 1])[0] for _ in range(28)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 28
    assert len({line.get_color() for line in lines[:7]}) == 7


# --- the spectrum ---------------------------------------------------------------------------------


def test_the_spectrum_shows_means_of_neighbouring_directions(drawn):
    eigenvalues, share = np.geomspace(10, 1e-3, 150), np.arange(1.0, 151)
    left, right = drawn(figures.spectrum, eigenvalues, {"in": share, "out": 2 * share}, "in").axes
    assert left.get_lines()[0].get_ydata().tolist() == eigenvalues.tolist()
    inside, outside = right.get_lines()[:2]
    assert inside.get_ydata().tolist() == [np.mean(share[i : i + 3]) for i in range(0, 150, 3)]
    assert inside.get_xdata().tolist() == list(range(2, 150, 3))
    assert (outside.get_ydata() == 2 * inside.get_ydata()).all()
    assert labels(right) == ["in (test)", "out", "training images"]
    assert "means of 3 neighbouring directions" in right.get_title()


def test_the_last_bin_of_the_spectrum_may_be_smaller(drawn):
    share = np.ones(130)
    _, right = drawn(figures.spectrum, share, {"in": share}, "in").axes
    assert right.get_lines()[0].get_ydata().tolist() == [1] * 44
    assert right.get_lines()[0].get_xdata()[-1] == 130


# --- contact sheets -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_a_contact_sheet_shows_the_images_in_order_with_their_scores(kind, drawn):
    images = np.random.default_rng(0).random((12, 3, 4, 5)).astype(np.float32)
    images = (255 * images).astype(np.uint8) if kind == "uint8" else images
    scores = np.array([123456.7, -2000.2, 1e9, 0.01234, *range(8)])
    figure = drawn(figures.contact_sheet, [("a, most", images, scores),
                                           ("a, least", images[:2], scores[:2])])
    filled = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in filled[:5]] == ["123,457", "-2,000", "1e+09", "0.0123",
                                                         "0"]
    assert len(filled) == 14
    shown = filled[1].images[0].get_array()
    assert (shown == images[1].transpose(1, 2, 0)).all()
    assert [part.get_suptitle() for part in figure.subfigs] == ["a, most", "a, least"]


# --- AUROC against a setting ----------------------------------------------------------------------


def record(ood="svhn", clusters=1, auroc=0.5, **more):
    return {"in": "cifar10", "ood": ood, "clusters": clusters, "auroc": auroc, "seed": 0, **more}


def test_a_sweep_is_the_mean_of_each_setting_with_its_spread(drawn):
    curves = {"svhn": [(5, 0.8), (1, 0.5), (1, 0.7)], "blobs": [(1, 0.9)]}
    (axis,) = drawn(figures.sweep, curves, figures.SETTINGS["k"]).axes
    svhn, blobs = axis.get_lines()
    assert svhn.get_xydata().tolist() == [[1, pytest.approx(0.6)], [5, 0.8]]
    assert blobs.get_xydata().tolist() == [[1, 0.9]]
    assert axis.collections[0].get_segments()[0].tolist() == [[1, 0.5], [1, 0.7]]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "5"]
    assert axis.get_xlabel() == "k, known outliers of each class"


def test_tick_labels_of_a_sweep_are_some_of_its_settings_that_do_not_run_into_each_other(drawn):
    curve = {"svhn": [(m, 0.5) for m in range(1, 21)]}
    (axis,) = drawn(figures.sweep, curve, figures.SETTINGS["clusters"]).axes
    shown = [t.get_window_extent() for t in axis.get_xticklabels()]
    assert [t.get_text() for t in axis.get_xticklabels()] == [str(m) for m in range(1, 21, 3)]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(shown))


def test_curves_are_told_apart_by_what_differs_and_repeats_count_once():
    records = [record(clusters=1, time="a", seconds=1), record(clusters=1, time="b", seconds=2),
               record(clusters=2, auroc=0.6), record("blobs", auroc=0.9),
               record(clusters=1, auroc=0.7, seed=1)]
    assert figures.curves_of(records, "clusters") == {
        "svhn": [(1, 0.5), (2, 0.6), (1, 0.7)], "blobs": [(1, 0.9)]
    }
    records = [record(training_mode=mode) for mode in ("SimCLR", "SupCon")]
    assert list(figures.curves_of(records, "clusters")) == ["svhn, SimCLR", "svhn, SupCon"]


# --- the commands ---------------------------------------------------------------------------------


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_figures_draws_a_run_folder_and_says_where(tmp_path):
    write(tmp_path / "run/log.jsonl", [{"event": "start"}, epoch(0), epoch(1)])
    done = subprocess.run([sys.executable, "-m", "report.figures", tmp_path / "run"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    path = tmp_path / "run/training.png"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    assert is_picture(path)


def test_figures_draws_a_log_whose_last_line_a_crash_cut(call, tmp_path):
    path = write(tmp_path / "run/log.jsonl", [{"event": "start"}, epoch(0)])
    path.write_text(path.read_text() + '{"event": "epo')
    done = call("report/figures.py", "run", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "run/training.png\n", "")


def test_figures_draws_a_sweep_of_k_from_several_files(call, tmp_path):
    for k in (1, 5):
        write(tmp_path / f"{k}.jsonl", [record(k=k, auroc=k / 10)])
    done = call("report/figures.py", "sweep", "1.jsonl", "5.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1_sweep.png\n", "")
    assert is_picture(tmp_path / "1_sweep.png")


def test_bad_calls_say_how_to_call(call, tmp_path):
    for words in (["sweep"], ["a", "b"]):
        done = call("report/figures.py", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"figures.py: error: {figures.USAGE}\n"
    done = call("report/figures.py", "--help", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{figures.USAGE}\n")


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [("run", "", "no log.jsonl beside it that holds a finished epoch"),
     ("run", '{"event": "start"}\n{"event"', "holds a finished epoch"),
     ("run", "[1]\n", "holds a finished epoch"),
     ("run", '{"event": "epoch", "epoch": 0, "loss": "x"}\n', "holds a finished epoch"),
     ("run", None, "no log.jsonl beside it"),
     ("sweep run/log.jsonl", "", "found no record"),
     ("sweep run/log.jsonl", "".join(json.dumps(record(k=k)) + "\n" for k in (None, 1)),
      "found clusters, k"),
     ("sweep run/log.jsonl", json.dumps({"ood": "a", "auroc": 1, "score": "crossval"}),
      "found none"),
     ("sweep run/log.jsonl", '{"in": "a"}', "found no record")],
    ids=["empty", "cut", "no object", "no number", "missing", "none", "both kinds", "no setting",
         "foreign"],
)
def test_what_cannot_be_drawn_is_refused_by_name(words, content, message, call, tmp_path):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run/log.jsonl").write_text(content)
    done = call("report/figures.py", *words.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "run/" in line
    assert message in line
    assert not list(tmp_path.rglob("*.png"))


def test_plot_draws_every_figure_of_an_evaluation(call, tmp_path, trained, other_npz):
    done = call("eval_ssd.py", "--ckpt", trained, "--ood", f"npz:{other_npz}", "--clusters", 1,
                   3, "--plot", "--exp-name", "e", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "eval_results").glob("*.png")}
    assert names == {f"e_ssd_{name}.png" for name in (
        "histograms", "roc", "precision_recall", "spectrum", "clusters", "images_npz_tiny.npz",
        "images_npz_other.npz")}
    for name in names:
        assert is_picture(tmp_path / "eval_results" / name)
        assert f"eval_results/{name}" in done.stdout.splitlines()[-1].split()


def test_plot_of_ssdk_has_a_sheet_of_each_outlier_set(call, tmp_path, trained, other_npz):
    done = call("eval_ssdk.py", "--ckpt", trained, "--ood", f"npz:{other_npz}", "--plot",
                   "--copies", 1, "--exp-name", "e", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "eval_results").glob("*.png")}
    assert names == {f"e_ssdk_{name}.png" for name in (
        "histograms", "roc", "precision_recall", "images_npz_other.npz")}
