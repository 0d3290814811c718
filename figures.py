"""Pictures of a run: training curves, score histograms, ROC curves. One PNG each.

    python figures.py RUN_FOLDER          # draws RUN_FOLDER/training.png from its log.jsonl

matplotlib is imported where it is used, so nothing else of the project needs it.
"""

import json
import sys
from pathlib import Path

import numpy as np

import utils

GREY = "0.55"


def _new(rows, columns, height=3.2):
    """A figure that needs no screen, and its axes as a flat list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * columns + 0.6, height * rows + 0.4), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure, path):
    with utils.whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def training_curves(records, path):
    """Draw loss, monitor and learning rate of a training over its epochs.

    Args:
        records: dicts of log.jsonl. path: of the PNG.

    Raises:
        utils.UserError: no epoch among the records.
    """
    epochs = [r for r in records if r.get("event") == "epoch"]
    if not epochs:
        raise utils.UserError(f"{path}: the log holds no finished epoch to draw")
    x = [r["epoch"] + 1 for r in epochs]
    marker = "o" if len(x) < 40 else None
    figure, axes = _new(1, 3)
    panels = (
        ("loss", "mean loss of the epoch", "tab:blue"),
        ("monitor", epochs[-1]["monitor_name"], "tab:green"),
        ("lr", "learning rate at the last step", "tab:red"),
    )
    for axis, (key, title, colour) in zip(axes, panels, strict=True):
        points = [(e, r[key]) for e, r in zip(x, epochs, strict=True) if r[key] is not None]
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    _save(figure, path)


def score_histograms(panels, path):
    """Draw the distribution of scores, the in-distribution images' filled, the outliers' as lines.

    Args:
        panels: list of (title, in-distribution name, {set name: float array [N]}), a plot each.
        path: of the PNG.
    """
    columns = min(len(panels), 3)
    figure, axes = _new(-(-len(panels) // columns), columns)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, inside, scores) in zip(axes, panels, strict=False):
        pooled = np.concatenate(list(scores.values()))
        positive = pooled.min() > 0
        # Distances span decades; the few beyond the outermost percentiles would squeeze the rest.
        low, high = np.percentile(pooled, [0.1, 99.9])
        if not high > low:
            low, high = pooled.min() - 0.5, pooled.max() + 0.5
        bins = np.geomspace(low, high, 61) if positive and low > 0 else np.linspace(low, high, 61)
        for name, values in scores.items():
            style = (
                {"histtype": "stepfilled", "color": GREY, "alpha": 0.6}
                if name == inside
                else {"histtype": "step", "linewidth": 1.4}
            )
            weights = np.full(len(values), 100 / len(values))
            axis.hist(values.clip(low, high), bins, weights=weights, label=name, **style)
        if positive and low > 0:
            axis.set_xscale("log")
        axis.set(title=title, xlabel="score (larger = more outlying)", ylabel="% of images")
        axis.legend(fontsize=8)
    _save(figure, path)


def roc_curves(panels, path):
    """Draw the ROC curve of each outlier set, with its AUROC.

    Args: as for score_histograms.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    columns = min(len(panels), 3)
    figure, axes = _new(-(-len(panels) // columns), columns, height=4.2)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, inside, scores) in zip(axes, panels, strict=False):
        for name, values in scores.items():
            if name == inside:
                continue
            outlier = np.repeat([0, 1], [len(scores[inside]), len(values)])
            both = np.concatenate([scores[inside], values])
            false, true, _ = roc_curve(outlier, both)
            axis.plot(false, true, label=f"{name}  {roc_auc_score(outlier, both):.4f}")
        axis.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        axis.set(title=title, xlabel=f"{inside} called outliers", ylabel="outliers found")
        axis.set_aspect("equal")
        axis.legend(title="AUROC", fontsize=8, loc="lower right")
    _save(figure, path)


def main():
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        raise utils.UserError("usage: python figures.py RUN_FOLDER (a run folder of train.py)")
    run = Path(sys.argv[1])
    try:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise utils.UserError(f"{run / 'log.jsonl'}: {error}") from None
    training_curves(records, run / "training.png")
    print(run / "training.png")


if __name__ == "__main__":
    utils.program(main)
