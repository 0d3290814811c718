"""Pictures of trainings and evaluations, one PNG each: data in, picture out.

    python figures.py RUN_FOLDER                # RUN_FOLDER/training.png, from its log.jsonl
    python figures.py sweep RESULTS.jsonl ...   # AUROC against m or k: RESULTS_sweep.png

The others are drawn by the evaluations' --plot. matplotlib is imported where it is used, so
nothing else of the project needs it. Colours are Okabe and Ito's, which the colour-blind tell
apart; line styles change where they run out.
"""

import json
import sys
import textwrap
from pathlib import Path

import numpy as np

import utils

USAGE = """usage: python figures.py RUN_FOLDER                 (a run folder of train.py)
       python figures.py sweep RESULTS.jsonl [...]    (records of eval_ssd.py or eval_ssdk.py)"""
GREY = "0.55"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
LONGEST = 28  # characters of a set's name that fit into a legend


def _new(rows, columns, height=3.2, width=4.8):
    """A figure that needs no screen, and its axes as a flat list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.6, height * rows + 0.4), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _panels(count, height=3.2):
    """A figure of `count` plots, at most three in a row, with room for a legend beside each."""
    columns = min(count, 3)
    figure, axes = _new(-(-count // columns), columns, height, width=6.4)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _legend(axis, title=None):
    """A legend beside the plot, where it can't hide a curve."""
    axis.legend(title=title, title_fontsize=8, fontsize=8, loc="upper left", frameon=False,
                bbox_to_anchor=(1, 1.02))


def _save(figure, path):
    with utils.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight", pad_inches=0.1)


def _line(i):
    """Colour and style of the i-th line of a plot."""
    return {"color": COLOURS[i % len(COLOURS)],
            "linestyle": STYLES[i // len(COLOURS) % len(STYLES)], "linewidth": 1.4}


def _shown(name):
    """The name of a set as a picture can show it: short, printable, no mathematics in it."""
    kind, colon, path = str(name).partition(":")
    text = f"{kind}:{Path(path).name}" if colon else kind
    text = "".join(c if c.isprintable() else "?" for c in text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 + 1 :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # matplotlib hides names with a leading _


# --- training -------------------------------------------------------------------------------------


def training_curves(records, path):
    """Draw loss, monitor and learning rate of a training over its epochs.

    Args:
        records: dicts of log.jsonl, in its order. Where a run was taken up again at an epoch, what
            it had recorded from there on is void, and a dotted line shows the place.
        path: of the PNG.

    Raises:
        utils.UserError: no epoch among the records.
    """
    epochs, resumed = _last_word(records)
    if not epochs:
        raise utils.UserError(f"{path}: the log holds no finished epoch to draw")
    x = sorted(epochs)
    figure, axes = _new(1, 3)
    panels = (
        ("loss", "mean loss of the epoch", COLOURS[0]),
        ("monitor", epochs[x[-1]]["monitor_name"], COLOURS[2]),
        ("lr", "learning rate at the epoch's last step", COLOURS[1]),
    )
    for axis, (key, title, colour) in zip(axes, panels, strict=True):
        points = [(e, epochs[e][key]) for e in x if epochs[e][key] is not None]
        marker = "o" if len(points) < 40 else None
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3)
        if key == "monitor" and points:
            best = max(points, key=lambda point: point[1])
            axis.plot(*best, "o", color="black", fillstyle="none", markersize=8,
                      label=f"best: {best[1]:.4f}, epoch {best[0]}")
            axis.legend(fontsize=8)
        if x[0] < 1:
            axis.axvspan(x[0] - 0.5, 0.5, color=GREY, alpha=0.2, linewidth=0)
        for place in resumed:
            axis.axvline(place, color=GREY, linestyle=":", linewidth=1)
        axis.set_title(textwrap.fill(title, 60), fontsize=10)
        signs = ["shaded: warm-up"] * (x[0] < 1) + ["dotted: taken up again"] * bool(resumed)
        axis.set_xlabel(f"epoch ({', '.join(signs)})" if signs else "epoch")
        axis.set_xlim(min(x[0], 1) - 0.5, max(x[-1], 1) + 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    _save(figure, path)


def _last_word(records):
    """({epoch from 1: its last record}, places where a run was taken up again)."""
    epochs, resumed, restarted = {}, [], False
    for record in records:
        event = record.get("event")
        restarted = restarted or event in ("start", "resume")
        if event == "epoch":
            here = record["epoch"] + 1
            lost = [e for e in epochs if e >= here]
            resumed = [place for place in resumed if place < here - 0.5]
            if epochs and (restarted or lost):
                resumed.append(here - 0.5)
            for e in lost:
                del epochs[e]
            epochs[here], restarted = record, False
    return epochs, resumed


# --- scores ---------------------------------------------------------------------------------------


def score_histograms(panels, path):
    """Draw the distribution of scores, the in-distribution images' filled, the outliers' as lines.

    Args:
        panels: list of (title, in-distribution name, {set name: float array [N]}), a plot each.
        path: of the PNG.
    """
    figure, axes = _panels(len(panels))
    for axis, (title, inside, scores) in zip(axes, panels, strict=True):
        # Distances span decades; the few far out on either side of a set would squeeze the rest
        low = min(np.percentile(values, 0.5) for values in scores.values())
        high = max(np.percentile(values, 99.5) for values in scores.values())
        if not high > low:
            low, high = low - 0.5, high + 0.5
        decades = low > 0 and high > 10 * low
        bins = np.geomspace(low, high, 61) if decades else np.linspace(low, high, 61)
        outliers = 0
        for name, values in scores.items():
            style = {"histtype": "stepfilled", "color": GREY, "alpha": 0.6}
            if name != inside:
                style = {"histtype": "step", **_line(outliers)}
                outliers += 1
            weights = np.full(len(values), 100 / len(values))
            axis.hist(np.clip(values, low, high), bins, weights=weights, label=_shown(name),
                      **style)
        limit = np.percentile(scores[inside], 95)
        if low <= limit <= high:
            axis.axvline(limit, color="black", linestyle=":", linewidth=1,
                         label=f"95 % of {_shown(inside)}")
        if decades:
            axis.set_xscale("log")
        axis.set(title=_title(title), xlabel="score (larger = more outlying)",
                 ylabel="% of the set's images")
        _legend(axis)
    _save(figure, path)


def _title(title):
    """A title "SET, more", with the set's name as it can be shown."""
    name, comma, rest = title.rpartition(", ")
    return f"{_shown(name)}{comma}{rest}"


def _pairs(inside, scores):
    """Each outlier set as (name, truth, scores): 0 for in-distribution, 1 for outliers."""
    for name, values in scores.items():
        if name != inside:
            truth = np.repeat([0, 1], [len(scores[inside]), len(values)])
            yield name, truth, np.concatenate([scores[inside], values])


def roc_curves(panels, path):
    """Draw the ROC curve of each outlier set, with its AUROC.

    Args: as for score_histograms.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    figure, axes = _panels(len(panels), height=4.2)
    for axis, (title, inside, scores) in zip(axes, panels, strict=True):
        for i, (name, truth, both) in enumerate(_pairs(inside, scores)):
            false, true, _ = roc_curve(truth, both)
            label = f"{_shown(name)}  {roc_auc_score(truth, both):.4f}"
            axis.plot(100 * false, 100 * true, label=label, **_line(i))
        axis.plot([0, 100], [0, 100], color=GREY, linestyle=":", linewidth=1)
        axis.set(title=_title(title), xlabel=f"% of {_shown(inside)} called outliers",
                 ylabel="% of outliers found")
        _legend(axis, "AUROC")
    _save(figure, path)


def precision_recall_curves(panels, path):
    """Draw precision against recall for each outlier set, with its average precision.

    Args: as for score_histograms.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    figure, axes = _panels(len(panels), height=4.2)
    for axis, (title, inside, scores) in zip(axes, panels, strict=True):
        for i, (name, truth, both) in enumerate(_pairs(inside, scores)):
            precision, recall, _ = precision_recall_curve(truth, both)
            label = (f"{_shown(name)}  {average_precision_score(truth, both):.4f} "
                     f"({truth.mean():.4f})")
            # The area under these steps is the average precision; scikit-learn's last point,
            # precision 1 at recall 0, is no part of it
            axis.plot(100 * recall, 100 * np.append(precision[:-1], precision[-2]),
                      drawstyle="steps-post", label=label, **_line(i))
        axis.set(title=_title(title), xlabel="recall: % of outliers found",
                 ylabel="precision: % outliers among the found", xlim=(-2, 102), ylim=(-2, 102))
        _legend(axis, "AUPR (by chance)")
    _save(figure, path)


# --- why it works ---------------------------------------------------------------------------------


def spectrum(eigenvalues, shares, inside, path):
    """Draw the eigenvalues of the training covariance and how far each set lies along each.

    Args:
        eigenvalues: float [r], falling.
        shares: {set name: float [r]}, the mean squared distance along each eigen-direction in
            units of its eigenvalue, as of detection.Gaussian.along; 1 for training images.
        inside: name of the in-distribution set.
        path: of the PNG.
    """
    rank = len(eigenvalues)
    width = -(-rank // 64)  # of a bin of neighbouring directions; one direction alone is noise
    starts = np.arange(0, rank, width)
    sizes = np.diff(np.append(starts, rank))
    centre = starts + (sizes + 1) / 2
    figure, (left, right) = _new(1, 2, height=3.6, width=6.0)
    marker = "o" if rank < 16 else None
    left.plot(np.arange(1, rank + 1), eigenvalues, color="black", linewidth=1.4, marker=marker)
    left.set(title="Covariance of the training features", yscale="log",
             ylabel="eigenvalue (squared deviation)")
    outliers = 0
    for name, share in shares.items():
        style = {"color": GREY, "linewidth": 3, "label": f"{_shown(name)} (test)"}
        if name != inside:
            style = {**_line(outliers), "label": _shown(name)}
            outliers += 1
        right.plot(centre, np.add.reduceat(share, starts) / sizes, marker=marker, **style)
    right.axhline(1, color="black", linestyle=":", linewidth=1, label="training images")
    bins = "" if width == 1 else f"\n(means of {width} neighbouring directions)"
    right.set(title=f"Share of the score{bins}", yscale="log",
              ylabel="mean squared distance / eigenvalue")
    _legend(right)
    for axis in (left, right):
        axis.set_xlabel("eigen-direction, by falling eigenvalue")
        axis.grid(alpha=0.3)
    _save(figure, path)


def contact_sheet(rows, path):
    """Draw images in rows, each with its score.

    Args:
        rows: list of (title, images, scores): uint8 or float in [0, 1] [n, 3, H, W], float [n].
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    columns = 10
    heights = [-(-len(scores) // columns) for _, _, scores in rows]
    figure = Figure(figsize=(0.95 * columns + 0.2, 1.2 * sum(heights) + 0.4 * len(rows)),
                    layout="constrained")
    parts = figure.subfigures(len(rows), 1, height_ratios=[h + 0.35 for h in heights],
                              squeeze=False)
    for part, (title, images, scores), height in zip(parts.flat, rows, heights, strict=True):
        part.suptitle(_title(title), fontsize=10)
        axes = list(part.subplots(height, columns, squeeze=False).flat)
        for axis in axes:
            axis.axis("off")
        for axis, image, score in zip(axes, images, scores, strict=False):
            pixels = np.asarray(image).transpose(1, 2, 0)
            axis.imshow(pixels.clip(0, 1) if pixels.dtype.kind == "f" else pixels,
                        interpolation="nearest")
            plain = 1000 <= abs(score) < 1e7
            axis.set_title(f"{score:,.0f}" if plain else f"{score:.3g}", fontsize=8, pad=2)
    _save(figure, path)


# --- settings against AUROC -----------------------------------------------------------------------

SETTINGS = {
    "clusters": "m, clusters of the training features",
    "k": "k, known outliers of each class",
}


def sweep(curves, xlabel, path):
    """Draw AUROC against a setting, a line per outlier set.

    Args:
        curves: {name: list of (setting, AUROC)}; several AUROCs of one setting (seeds, say) are
            drawn as their mean, with bars from the least to the largest.
        xlabel: what the setting is. path: of the PNG.
    """
    figure, (axis,) = _new(1, 1, height=3.8, width=6.8)
    for i, (name, points) in enumerate(curves.items()):
        at = {}
        for setting, value in points:
            at.setdefault(setting, []).append(value)
        x = sorted(at)
        axis.plot(x, [np.mean(at[v]) for v in x], label=_shown(name), marker="o", markersize=4,
                  **_line(i))
        spread = [v for v in x if max(at[v]) > min(at[v])]
        axis.vlines(spread, [min(at[v]) for v in spread], [max(at[v]) for v in spread],
                    color=_line(i)["color"], linewidth=3, alpha=0.4)
    settings = sorted({x for points in curves.values() for x, _ in points})
    if settings[0] > 0 and settings[-1] > 10 * settings[0]:
        axis.set_xscale("log")
    axis.set_xticks(_apart(settings, axis.get_xscale()))
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=xlabel, ylabel="AUROC")
    axis.grid(alpha=0.3)
    _legend(axis)
    _save(figure, path)


def _apart(settings, scale):
    """The settings whose tick labels do not run into each other."""
    place = np.log(settings) if scale == "log" else np.asarray(settings, dtype=float)
    gap = (place[-1] - place[0]) / 16
    kept = [0]
    for i in range(1, len(settings)):
        if place[i] - place[kept[-1]] >= gap:
            kept.append(i)
    return [settings[i] for i in kept]


# What tells curves of one outlier set apart, beside the seed, in the order of a label
KINDS = ("in", "training_mode", "arch", "in_classes", "copies", "data_mode", "size",
         "normalize")


def curves_of(records, setting):
    """Sort the records of evaluations into curves of AUROC against a setting.

    Args:
        records: dicts of EXP_ssd.jsonl or EXP_ssdk.jsonl. setting: "clusters" or "k".

    Returns:
        {name: list of (setting, AUROC)}: a curve per outlier set; where the records differ in more
        (network, copies), that is in the name. A repeated evaluation counts once.
    """
    differ = [k for k in KINDS if len({json.dumps(r.get(k)) for r in records}) > 1]
    curves, seen = {}, set()
    for record in records:
        same = json.dumps({k: v for k, v in record.items() if k != "time"}, sort_keys=True)
        if same not in seen:
            seen.add(same)
            name = ", ".join([record["ood"], *(str(record.get(k)) for k in differ)])
            curves.setdefault(name, []).append((record[setting], record["auroc"]))
    return curves


# --- the command line -----------------------------------------------------------------------------


def read_records(path):
    """Read JSON lines.

    Returns:
        list of dicts.

    Raises:
        utils.UserError: no such file, or a line of it that is no JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise utils.UserError(f"{path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise utils.UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(records[-1], dict):
            raise utils.UserError(f"{path}, line {number}: an object is needed, found "
                                  f"{line:.60}")
    return records


# What the records to draw must hold
EPOCH = {"epoch": int, "loss": int | float, "monitor": int | float | None, "monitor_name": str,
         "lr": int | float}
EVALUATION = {"ood": str, "auroc": int | float, "clusters": int, "k": int | None}


def draw_training(run):
    """Draw RUN/training.png from RUN/log.jsonl; returns its path."""
    path = Path(run) / "log.jsonl"
    records = read_records(path)
    _check(path, [r for r in records if r.get("event") == "epoch"], EPOCH)
    training_curves(records, path.with_name("training.png"))
    return path.with_name("training.png")


def draw_sweep(files):
    """Draw AUROC against the setting that varies in records of evaluations; returns the path."""
    records = []
    for path in files:
        found = read_records(path)
        _check(path, found, EVALUATION)
        records += found
    if not records:
        raise utils.UserError(f"{files[0]}: no records to draw")
    setting = "clusters" if records[0].get("k") is None else "k"
    if any((r.get("k") is None) != (setting == "clusters") for r in records):
        raise utils.UserError(f"sweep: records with and without known outliers ("
                              f"{', '.join(files)}) are two figures; draw them one by one")
    path = Path(files[0]).with_name(f"{Path(files[0]).stem}_sweep.png")
    sweep(curves_of(records, setting), SETTINGS[setting], path)
    return path


def _check(path, records, fields):
    """Stop if a record lacks a field, or holds something else in it."""
    for record in records:
        for key, kind in fields.items():
            if not isinstance(record.get(key), kind):
                raise utils.UserError(f"{path}: a record has {key} = {record.get(key)!r:.40}; it "
                                      "is no record of this kind")


def main():
    match sys.argv[1:]:
        case ["-h" | "--help"]:
            print(USAGE)
        case ["sweep", _, *_]:
            print(draw_sweep(sys.argv[2:]))
        case [run] if run != "sweep":
            print(draw_training(run))
        case _:
            raise utils.UserError(" ".join(USAGE.split()))


if __name__ == "__main__":
    utils.program(main)
