"""Plot trainings and evaluations: every function writes one PNG at its `path`.

    python -m report.figures RUN_FOLDER               # RUN_FOLDER/training.png, from its log
    python -m report.figures sweep RESULTS.jsonl ...  # AUROC against m or k: RESULTS_sweep.png

The evaluations' --plot makes the others. Colours are Okabe and Ito's, which the colour-blind tell
apart; where they run out, the line style changes.
"""

import json
import sys
import textwrap
from pathlib import Path

import numpy as np

from infra import program, storage
from utils import UserError

USAGE = "usage: python -m report.figures RUN_FOLDER, or: sweep RESULTS.jsonl [...]"
GREY = "0.55"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
SETTINGS = {"clusters": "m, clusters of the training features",
            "neighbours": "k, the nearest training feature that counts",
            "k": "k, known outliers of each class"}
# What tells curves of one outlier set apart, beside the seed, in the order of a label
KINDS = ("in", "score", "training_mode", "arch", "in_classes", "copies", "data_mode", "size",
         "normalize")
# What the records that are plotted hold
EPOCH = {"epoch": int, "loss": int | float, "monitor": int | float | None, "monitor_name": str,
         "lr": int | float}
EVALUATION = {"ood": str, "auroc": int | float, **dict.fromkeys(SETTINGS, int | None)}


def _new(count, height=3.2, width=4.8):
    """A figure that needs no screen, and its axes, three in a row; sizes of one in inches."""
    from matplotlib.figure import Figure

    columns, rows = min(count, 3), -(-count // 3)
    figure = Figure(figsize=(width * columns + 0.6, height * rows + 0.4), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axis in axes:
        axis.set_prop_cycle(color=COLOURS * 4, linestyle=[s for s in STYLES for _ in COLOURS])
        axis.grid(alpha=0.3)
    return figure, axes


def _each_plot(panels, path, height=3.2, legend=None):
    """Yield (axis, in-distribution name, scores) of each plot, then title and save the figure."""
    figure, axes = _new(len(panels), height, width=6.4)
    for axis, (title, inside, scores) in zip(axes, panels, strict=True):
        yield axis, inside, scores
        axis.set_title(_shown(title, 60))
        _legend(axis, legend)
    _save(figure, path)


def _legend(axis, title=None):
    """A legend beside the plot, where it can't hide a curve."""
    axis.legend(title=title, title_fontsize=8, fontsize=8, loc="upper left", frameon=False,
                bbox_to_anchor=(1, 1.02))


def _save(figure, path):
    with storage.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight", pad_inches=0.1)


def _shown(name, longest=28):
    """The name of a set as a figure can show it: without its folder, printable, no mathematics."""
    kind, colon, path = str(name).partition(":")
    text = f"{kind}:{Path(path).name}" if colon else kind
    text = "".join(c if c.isprintable() else "?" for c in text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-longest // 2 + 1 :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # matplotlib hides names with a leading _


def training_curves(records, path):
    """Plot loss, monitor and learning rate over the epochs of records, the dicts of a log.jsonl.

    Where a run was resumed at an epoch, its earlier records from there on are void, and a dotted
    line marks the place. UserError: no epoch in them.
    """
    epochs, resumed = _valid_epochs(records)
    if not epochs:
        raise UserError(f"{path}: no log.jsonl beside it that holds a finished epoch")
    x = sorted(epochs)
    signs = ["shaded: warm-up"] * (x[0] < 1) + ["dotted: resumed"] * bool(resumed)
    figure, axes = _new(3)
    titles = {"loss": "mean loss of the epoch", "monitor": epochs[x[-1]]["monitor_name"],
              "lr": "learning rate at the epoch's last step"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        y = np.array([epochs[e][key] for e in x], dtype=float)  # None, as in a warm-up, becomes nan
        axis.plot(x, y, "o-", markersize=3 if len(x) < 40 else 0)
        if key == "monitor" and not np.isnan(y).all():
            best = np.nanargmax(y)
            axis.plot(x[best], y[best], "o", color="black", fillstyle="none", markersize=8,
                      label=f"best: {y[best]:.4f}, epoch {x[best]}")
            axis.legend(fontsize=8)
        if x[0] < 1:
            axis.axvspan(x[0] - 0.5, 0.5, color=GREY, alpha=0.2, linewidth=0)
        for place in resumed:
            axis.axvline(place, color=GREY, linestyle=":", linewidth=1)
        axis.set_title(textwrap.fill(title, 60), fontsize=10)
        axis.set(xlabel=f"epoch ({', '.join(signs)})" if signs else "epoch",
                 xlim=(min(x[0], 1) - 0.5, max(x[-1], 1) + 0.5))
        axis.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def _valid_epochs(records):
    """({epoch from 1: its last record}, places where the run was resumed)."""
    epochs, resumed, restarted = {}, [], False
    for record in records:
        restarted = restarted or record.get("event") in ("start", "resume")
        if record.get("event") == "epoch" and _holds(record, EPOCH):
            here = record["epoch"] + 1
            kept = {e: r for e, r in epochs.items() if e < here}
            resumed = [place for place in resumed if place < here - 0.5]
            if epochs and (restarted or len(kept) < len(epochs)):
                resumed.append(here - 0.5)
            epochs, restarted = {**kept, here: record}, False
    return epochs, resumed


def score_histograms(panels, path):
    """Plot the distribution of scores: filled for the in-distribution set, lines for outliers.

    Panels are a list of (title, in-distribution name, {set name: float array [N]}), a plot each.
    """
    for axis, inside, scores in _each_plot(panels, path):
        # Distances span decades; the few far out on either side of a set would squeeze the rest
        low = min(np.percentile(values, 0.5) for values in scores.values())
        high = max(np.percentile(values, 99.5) for values in scores.values())
        if not high > low:
            low, high = low - 0.5, high + 0.5
        decades = low > 0 and high > 10 * low
        bins = np.geomspace(low, high, 61) if decades else np.linspace(low, high, 61)
        for name, values in scores.items():
            counts, _ = np.histogram(np.clip(values, low, high), bins)
            heights, label = 100 * counts / len(values), _shown(name)
            if name == inside:
                axis.stairs(heights, bins, fill=True, color=GREY, alpha=0.6, label=label)
            else:
                axis.plot(bins, [*heights, 0], drawstyle="steps-post", label=label)
        axis.axvline(np.percentile(scores[inside], 95), color="black", linestyle=":", linewidth=1,
                     label=f"95 % of {_shown(inside)}")
        axis.set(xscale="log" if decades else "linear", xlabel="score (larger = more outlying)",
                 ylim=(0, None), ylabel="% of the set's images")


def decision(calibration, scores, share, file):
    """Plot scores [n >= 0] of good pictures that calibrate, filled, and [M] to judge, a line.

    Another line shows from where on a `share` of the good pictures is flagged, if n allows it.
    """
    low, high = min([*calibration, *scores]), np.percentile([*calibration, *scores], 99.5)
    high = max(high, low + 1e-9)
    bins = (np.geomspace if low > 0 and high > 10 * low else np.linspace)(low, high, 41)
    figure, (axis,) = _new(1, height=2.8, width=7.2)
    for values, title, style in ((calibration, "good", {"fill": True, "color": GREY, "alpha": 0.6}),
                                 (scores, "searched", {"color": COLOURS[1], "linewidth": 1.5})):
        if len(values):
            counts, _ = np.histogram(np.clip(values, low, high), bins)
            axis.stairs(100 * counts / len(values), bins, label=f"{len(values)} {title}", **style)
    flagging = int(share * (len(calibration) + 1)) - 1  # calibration scores above a flagged one
    if flagging >= 0:
        axis.axvline(np.sort(calibration)[-flagging - 1], color="black", linestyle=":",
                     linewidth=1, label="flagged from here")
    axis.set(xscale="log" if high > 10 * low > 0 else "linear", ylim=(0, None),
             xlabel="score (larger = odder)", ylabel="% of the pictures")
    _legend(axis)
    figure.savefig(file, format="png", dpi=120, bbox_inches="tight", pad_inches=0.1)


def _pairs(inside, scores):
    """Each outlier set as (name, labels, scores): 0 for in-distribution, 1 for outliers."""
    for name, values in scores.items():
        if name != inside:
            labels = np.repeat([0, 1], [len(scores[inside]), len(values)])
            yield _shown(name), labels, np.concatenate([scores[inside], values])


def roc_curves(panels, path):
    """Plot the ROC curve of each outlier set, with its AUROC. Args: as for score_histograms."""
    from sklearn.metrics import roc_auc_score, roc_curve

    for axis, inside, scores in _each_plot(panels, path, 4.2, "AUROC"):
        for name, labels, values in _pairs(inside, scores):
            false, true, _ = roc_curve(labels, values)
            axis.plot(100 * false, 100 * true, label=f"{name}  {roc_auc_score(labels, values):.4f}")
        axis.plot([0, 100], [0, 100], color=GREY, linestyle=":", linewidth=1)
        axis.set(xlabel=f"% of {_shown(inside)} called outliers", ylabel="% of outliers found")


def precision_recall_curves(panels, path):
    """Plot precision against recall, with average precision. Args: as for score_histograms."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    for axis, inside, scores in _each_plot(panels, path, 4.2, "AUPR (by chance)"):
        for name, labels, values in _pairs(inside, scores):
            precision, recall, _ = precision_recall_curve(labels, values)
            aupr = average_precision_score(labels, values)
            # scikit-learn's last point, precision 1 at recall 0, is no part of the area
            axis.plot(100 * recall, 100 * np.append(precision[:-1], precision[-2]),
                      drawstyle="steps-post", label=f"{name}  {aupr:.4f} ({labels.mean():.4f})")
        axis.set(xlabel="recall: % of outliers found", xlim=(-2, 102), ylim=(-2, 102),
                 ylabel="precision: % outliers among the found")


def spectrum(eigenvalues, shares, inside, path):
    """Plot the eigenvalues of the training covariance and how far each set lies along each.

    Args: eigenvalues: float [r], falling. inside: name of the in-distribution set. shares: {set
        name: float [r]}, as of detection.Gaussian.along.
    """
    rank = len(eigenvalues)
    width = -(-rank // 64)  # of a bin of neighbouring directions; one direction alone is noise
    bins = [slice(i, i + width) for i in range(0, rank, width)]
    index = np.arange(1, rank + 1)
    marker = "o" if rank < 16 else None  # a single direction has no line
    figure, (left, right) = _new(2, height=3.6, width=6.0)
    left.plot(index, eigenvalues, color="black", linewidth=1.4, marker=marker)
    left.set(title="Covariance of the training features", ylabel="eigenvalue (variance)")
    for name, share in shares.items():
        style = {"color": GREY, "linestyle": "-", "linewidth": 3} if name == inside else {}
        right.plot([index[b].mean() for b in bins], [share[b].mean() for b in bins], marker=marker,
                   label=f"{_shown(name)} (test)" if style else _shown(name), **style)
    right.axhline(1, color="black", linestyle=":", linewidth=1, label="training images")
    means = "" if width == 1 else f"\n(means of {width} neighbouring directions)"
    right.set(title=f"Share of the score{means}", ylabel="mean squared distance / eigenvalue")
    _legend(right)
    for axis in (left, right):
        axis.set(xlabel="eigen-direction, by falling eigenvalue", yscale="log")
    _save(figure, path)


def contact_sheet(rows, path):
    """Plot (title, images, scores) rows: uint8, or float in [0, 1], [n, 3, H, W]; float [n]."""
    from matplotlib.figure import Figure

    columns = 10
    heights = [-(-len(scores) // columns) for _, _, scores in rows]
    figure = Figure(figsize=(0.95 * columns + 0.2, 1.2 * sum(heights) + 0.4 * len(rows)),
                    layout="constrained")
    parts = figure.subfigures(len(rows), height_ratios=[h + 0.35 for h in heights], squeeze=False)
    for part, (title, images, scores), height in zip(parts.flat, rows, heights, strict=True):
        part.suptitle(_shown(title, 96), fontsize=10)
        for i, (image, score) in enumerate(zip(images, scores, strict=True), 1):
            axis = part.add_subplot(height, columns, i)
            axis.axis("off")
            axis.imshow(np.asarray(image).transpose(1, 2, 0), interpolation="nearest")
            form = ",.0f" if 1000 <= abs(score) < 1e7 else ".3g"
            axis.set_title(f"{score:{form}}", fontsize=8, pad=2)
    _save(figure, path)


def sweep(curves, xlabel, path):
    """Plot AUROC against a setting, a line for each of curves, {name: list of (setting, AUROC)}.

    Of several AUROCs of a setting (seeds, say) it shows the mean, and a bar from least to largest.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, (axis,) = _new(1, height=3.8, width=6.8)
    for name, points in curves.items():
        x = sorted({setting for setting, _ in points})
        y = [[value for setting, value in points if setting == at] for at in x]
        (line,) = axis.plot(x, [*map(np.mean, y)], marker="o", markersize=4, label=_shown(name))
        axis.vlines(x, [*map(min, y)], [*map(max, y)], line.get_color(), linewidth=3, alpha=0.4)
    settings = sorted({x for points in curves.values() for x, _ in points})
    scale = "log" if 0 < 10 * settings[0] < settings[-1] else "linear"
    axis.set(xscale=scale, xlabel=xlabel, ylabel="AUROC")
    axis.xaxis.set(major_locator=FixedLocator(settings, nbins=8), major_formatter="{x:g}",
                   minor_locator=NullLocator())
    _legend(axis)
    _save(figure, path)


def curves_of(records, setting):
    """Sort records of evaluations into curves for `sweep` against a key of SETTINGS.

    There is one per outlier set; where they differ in more (network, copies), its name says it.
    """
    differ = [k for k in KINDS if len({json.dumps(r.get(k)) for r in records}) > 1]
    # A repeated evaluation, which counts once, differs in when it was and how long it took
    once = {json.dumps(r | {"time": 0, "seconds": 0}, sort_keys=True): r for r in records}
    curves = {}
    for record in once.values():
        name = ", ".join([record["ood"], *(str(record.get(k)) for k in differ)])
        curves.setdefault(name, []).append((record[setting], record["auroc"]))
    return curves


def _holds(record, fields):
    """Whether a record has the fields {name: type}."""
    return all(isinstance(record.get(key), kind) for key, kind in fields.items())


def plot_sweep(files):
    """Plot AUROC against the setting that varies in records of evaluations; return the path."""
    records = [record for path in files for record in storage.read_records(path)
               if _holds(record, EVALUATION)]
    settings = {next((s for s in ("k", *SETTINGS) if r.get(s) is not None), "none")
                for r in records}
    if len(settings) != 1 or "none" in settings:
        raise UserError(f"{', '.join(files)}: expected records with one of {', '.join(SETTINGS)}, "
                        f"the same in all; found {', '.join(sorted(settings)) or 'no record'}")
    (setting,) = settings
    path = Path(files[0]).with_name(f"{Path(files[0]).stem}_sweep.png")
    sweep(curves_of(records, setting), SETTINGS[setting], path)
    return path


def main(argv=None):
    match argv or sys.argv[1:]:
        case ["-h" | "--help"]:
            print(USAGE)
        case ["sweep", *files] if files:
            print(plot_sweep(files))
        case [run] if run != "sweep":
            path = Path(run) / "training.png"
            training_curves(storage.read_records(path.with_name("log.jsonl")), path)
            print(path)
        case _:
            raise UserError(USAGE)


if __name__ == "__main__":
    program.run(main)
