"""Tables of results: their files under configs/tables, ours beside the published, as text.

    table = tables.read("readme")                       # configs/tables/readme.yaml, or a path
    lines = tables.lines(table, measured)               # a Line for each number
    tables.markdown(table, lines), tables.as_csv(lines)

A table file has a title and rows; a row names how a network is trained, how it is evaluated, and
what was published for it, with the source. Runs nothing; reproduce.py does.
"""

import csv
import io
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import utils
from utils import UserError

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "configs/tables"

# Script of each method, and the flags that a row may give it besides its outlier sets
METHODS = {
    "ssd": ("eval_ssd.py", ("clusters", "data-mode")),
    "ssdk": ("eval_ssdk.py", ("k", "copies", "data-mode")),
}
METRICS = {
    "fpr95": "FPR95", "auroc": "AUROC", "aupr": "AUPR",
    "fpr95_ood_positive": "FPR95, outliers positive", "aupr_in": "AUPR, inliers positive",
}
SETS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "mnist": "MNIST",
    "texture": "Texture", "blobs": "Blobs", "gaussian": "Gaussian", "uniform": "Uniform",
    "rest": "the other classes",
}

# Keys of a table file: type, and whether it must be there
TABLE = {"title": (str, True), "about": (str, False), "metrics": (list, False),
         "sets": (dict, False), "rows": (dict, True), "means": (list, False)}
SET = {"label": (str, True), "needs": (str, True)}
ROW = {"label": (str, True), "train": (dict, True), "eval": (dict, True), "draws": (int, False),
       "published": (list, False)}
MEAN = {"label": (str, True), "outliers": (str, True), "ood": (list, True), "rows": (list, False),
        "clusters": (int, False), "published": (dict, False)}
PUBLISHED = {"ood": (str, True), "clusters": (int, False), "source": (str, True),
             **{metric: (object, False) for metric in METRICS}}


@dataclass(frozen=True)
class Published:
    """A number somebody reported, and where it can be read."""

    value: float
    source: str


@dataclass(frozen=True)
class Row:
    """A network and an evaluation of it.

    Attributes:
        name, label: of the row, in file names and in print.
        config: path of the training recipe, as the table has it. overrides: flags that replace its.
        method: key of METHODS. flags: of the evaluation. clusters: the numbers of clusters.
        ood: names of outlier sets. draws: evaluations that differ in their seed alone.
        published: {(outlier set, clusters, metric): Published}.
    """

    name: str
    label: str
    config: str
    overrides: dict
    method: str
    flags: dict
    clusters: tuple
    ood: tuple
    draws: int
    published: dict


@dataclass(frozen=True)
class Mean:
    """The mean over the outlier sets of some rows. published: {metric: Published}."""

    label: str
    outliers: str
    rows: tuple
    ood: tuple
    clusters: int
    published: dict


@dataclass(frozen=True)
class Table:
    """A table file. sets: {name: {"label", "needs"}} of the sets that the user must provide."""

    name: str
    path: Path
    title: str
    about: str
    metrics: tuple
    sets: dict
    rows: dict
    means: tuple


# --- the file -------------------------------------------------------------------------------------


def read(name):
    """Read a table and check all that can be checked before anything runs.

    Args:
        name: of a file in configs/tables, without its ending; or the path of a YAML file.

    Returns:
        Table.

    Raises:
        UserError: no such table, an unknown or missing key, a wrong type, a recipe that is gone, a
            published value that is not a number in [0, 1] or has no source; names file and place.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UserError(f"no table {name}: {path} is not there; known are {known}, or the path of "
                        "a .yaml file")
    content = utils.read_yaml(path, "the table")
    _check(path, content, TABLE)
    for key, facts in content.get("sets", {}).items():
        _check(f"{path}: sets: {key}", facts, SET)
    metrics = tuple(content.get("metrics", ("fpr95", "auroc", "aupr")))
    _known(f"{path}: metrics", metrics, METRICS)
    rows = {}
    for key, row in content["rows"].items():
        _check_name(f"{path}: row '{key}'", key)
        rows[key] = _row(f"{path}: row '{key}'", key, row)
    if not rows:
        raise UserError(f"{path}: rows: at least one is needed")
    means = tuple(_mean(f"{path}: means", mean, rows) for mean in content.get("means", []))
    _check_name(str(path), path.stem)
    return Table(path.stem, path, content["title"], content.get("about", ""), metrics,
                 content.get("sets", {}), rows, means)


def _check(where, found, keys):
    """Stop unless `found` has the keys that it must have, no other, of the right types."""
    if not isinstance(found, dict):
        raise UserError(f"{where}: 'key: value' lines are needed, found {found!r:.60}")
    for key, value in found.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key '{key}'; known are {', '.join(keys)}")
        kind = keys[key][0]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{where}: {key}: {value!r:.60} does not do; {_KINDS[kind]} is needed")
    for key, (_, needed) in keys.items():
        if needed and key not in found:
            raise UserError(f"{where}: the key '{key}' is missing")
        if needed and found[key] == "":
            raise UserError(f"{where}: {key} is empty")


_KINDS = {str: "text", list: "a list", dict: "a block of 'key: value' lines",
          int: "a whole number"}


def _check_name(where, name):
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise UserError(f"{where}: a name becomes part of file names; letters, digits and _ only")


def _known(where, found, known):
    for item in found:
        if item not in known:
            raise UserError(f"{where}: unknown '{item}'; known are {', '.join(known)}")


def _row(where, name, row):
    _check(where, row, ROW)
    training, evaluation = ({str(k).replace("_", "-"): v for k, v in row[part].items()}
                            for part in ("train", "eval"))
    config = training.pop("config", None)
    if not isinstance(config, str):
        raise UserError(f"{where}: train: config: the name of a recipe is needed")
    if not (HERE / config).is_file():
        raise UserError(f"{where}: its recipe {config} is gone: no file {HERE / config}")
    _check_flags(f"{where}: train", training)
    method = evaluation.pop("method", None)
    if method not in METHODS:
        raise UserError(f"{where}: eval: method: {method!r} does not do; known are "
                        f"{', '.join(METHODS)}")
    ood = evaluation.pop("ood", None)
    if not ood or not isinstance(ood, list) or not all(isinstance(o, str) for o in ood):
        raise UserError(f"{where}: eval: ood: a list of outlier sets is needed")
    _known(f"{where}: eval", evaluation, METHODS[method][1])
    _check_flags(f"{where}: eval", evaluation)
    clusters = evaluation.get("clusters", 1)
    clusters = tuple(clusters) if isinstance(clusters, list) else (clusters,)
    draws = row.get("draws", 1)
    if draws < 1:
        raise UserError(f"{where}: draws: {draws} does not do; at least 1 is needed")
    published = {}
    for entry in row.get("published", []):
        at = f"{where}: published"
        _check(at, entry, PUBLISHED)
        _known(f"{at}: ood", [entry["ood"]], ood)
        m = entry.get("clusters", clusters[0])
        _known(f"{at}: clusters", [m], [*clusters])
        for metric, number in _numbers(f"{at}: {entry['ood']}", entry).items():
            published[entry["ood"], m, metric] = number
    return Row(name, row["label"], config, training, method, evaluation, clusters, tuple(ood),
               draws, published)


def _check_flags(where, flags):
    """Stop unless every value is one that a command line can have."""
    for key, value in flags.items():
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, (str, int, float)):
                raise UserError(f"{where}: {key}: {value!r:.60} does not do; text, a number, true, "
                                "false or a list is needed")


def _numbers(where, entry):
    """The published numbers of an entry, by metric."""
    found = {}
    for metric in METRICS:
        if metric not in entry:
            continue
        value = entry[metric]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"{where}: {metric}: the published value {value!r} is not a number "
                            "between 0 and 1")
        found[metric] = Published(float(value), entry["source"])
    if not found:
        raise UserError(f"{where}: no value; known are {', '.join(METRICS)}")
    return found


def _mean(where, mean, rows):
    _check(where, mean, MEAN)
    where = f"{where}: {mean['label']}"
    chosen = tuple(mean.get("rows", rows))
    _known(f"{where}: rows", chosen, rows)
    for row in chosen:
        _known(f"{where}: ood", mean["ood"], rows[row].ood)
    clusters = mean.get("clusters", rows[chosen[0]].clusters[0])
    published = {}
    if "published" in mean:
        keys = {k: v for k, v in PUBLISHED.items() if k not in ("ood", "clusters")}
        _check(f"{where}: published", mean["published"], keys)
        published = _numbers(f"{where}: published", mean["published"])
    return Mean(mean["label"], mean["outliers"], chosen, tuple(mean["ood"]), clusters, published)


# --- ours beside the published --------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One number of a table.

    Attributes:
        row: name of the row, "" for a mean. label, outliers, clusters, metric: what it is.
        values: one for each trained network (the mean of its draws).
        spread: standard deviation over the draws of one network, mean over networks; None: 1 draw.
        draws: per network. published, source: None and "" where nothing was confirmed.
    """

    row: str
    label: str
    outliers: str
    clusters: int
    metric: str
    values: tuple
    spread: float | None
    draws: int
    published: float | None
    source: str

    @property
    def mean(self):
        """Mean over networks, None while there is none."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self):
        """Sample standard deviation over networks, None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self):
        """Ours less the published, None without either."""
        known = self.values and self.published is not None
        return self.mean - self.published if known else None


def lines(table, measured):
    """Set ours beside the published.

    Args:
        table: Table.
        measured: {(row, outlier set, clusters): {training seed: [record of each draw]}}; a record
            is a dict with the metrics. Seeds that lack a draw should not be in it.

    Returns:
        list of Line, in the order of the table; those of the means come last.
    """
    found = []
    for row in table.rows.values():
        for m in row.clusters:
            for ood in row.ood:
                runs = measured.get((row.name, ood, m), {})
                found += [_line(table, row, ood, m, metric, runs) for metric in table.metrics]
    for mean in table.means:
        found += [_mean_line(table, mean, metric, measured) for metric in table.metrics]
    return found


def _line(table, row, ood, m, metric, runs):
    drawn = [[record[metric] for record in records] for _, records in sorted(runs.items())]
    spreads = [statistics.stdev(d) for d in drawn if len(d) > 1]
    number = row.published.get((ood, m, metric))
    return Line(
        row.name, row.label, set_label(table, ood), m, metric,
        tuple(statistics.fmean(d) for d in drawn),
        statistics.fmean(spreads) if spreads else None, row.draws,
        number.value if number else None, number.source if number else "",
    )


def _mean_line(table, mean, metric, measured):
    cells = [measured.get((row, ood, mean.clusters), {}) for row in mean.rows for ood in mean.ood]
    seeds = set.intersection(*(set(runs) for runs in cells))
    values = tuple(
        statistics.fmean(statistics.fmean(r[metric] for r in runs[seed]) for runs in cells)
        for seed in sorted(seeds)
    )
    number = mean.published.get(metric)
    return Line("", mean.label, mean.outliers, mean.clusters, metric, values, None, 1,
                number.value if number else None, number.source if number else "")


def set_label(table, ood):
    """Return how an outlier set is called in print."""
    return table.sets[ood]["label"] if ood in table.sets else SETS.get(ood, ood)


HEAD = ("network", "outliers", "metric", "ours", "n", "published", "difference", "source")


def cells(table, line):
    """Return a line's cells as text, under HEAD."""
    many = line.row and len(table.rows[line.row].clusters) > 1
    ours = "" if line.mean is None else f"{line.mean:.4f}"
    if line.deviation is not None:
        ours += f" ± {line.deviation:.4f}"
    if line.spread is not None:
        ours += f" (draws ± {line.spread:.4f})"
    n = f"{len(line.values)}" + (f" × {line.draws} draws" if line.draws > 1 else "")
    return (
        line.label + (f", m = {line.clusters}" if many else ""), line.outliers,
        METRICS[line.metric], ours, n if line.values else "",
        "" if line.published is None else f"{line.published:.10g}",
        "" if line.difference is None else f"{line.difference:+.4f}", line.source,
    )


def grouped(table, found):
    """Return the cells of lines, without what the line above says of network and outliers too."""
    rows, above = [], (None, None)
    for line in found:
        network, outliers, *rest = cells(table, line)
        same = network == above[0], (network, outliers) == above
        above = network, outliers
        rows.append(["" if same[0] else network, "" if same[1] else outliers, *rest])
    return rows


def markdown(table, found):
    """Return the lines as a Markdown table."""
    def row(shown):
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in shown)

    rows = [[cell.replace("|", "\\|") for cell in shown] for shown in grouped(table, found)]
    return "\n".join([row(HEAD), "|" + "---|" * len(HEAD), *map(row, rows)]) + "\n"


CSV_HEAD = ("row", "label", "outliers", "clusters", "metric", "mean", "deviation", "n", "draws",
            "draws_deviation", "published", "difference", "source")


def as_csv(found):
    """Return the lines as CSV with all digits; an empty field where there is nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for x in found:
        writer.writerow([x.row, x.label, x.outliers, x.clusters, x.metric, x.mean, x.deviation,
                         len(x.values), x.draws, x.spread, x.published, x.difference, x.source])
    return out.getvalue()
