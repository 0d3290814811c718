"""Tables of results: their files under configs/tables, ours beside the published, as text.

A table file has a title and rows; a row names how a network is trained, how it is evaluated, and
what was published for it, with the source. Runs nothing; reproduce.py does.
"""

import csv
import io
import re
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import utils
from utils import UserError

HERE = Path(__file__).resolve().parent.parent
FOLDER = HERE / "configs/tables"
METHODS = {"ssd": "eval_ssd.py", "ssdk": "eval_ssdk.py"}
METRICS = {  # in print; the arrow says which way is better
    "fpr95": "FPR95 ↓", "auroc": "AUROC ↑", "aupr": "AUPR ↑",
    "fpr95_ood_positive": "FPR95, outliers positive ↓", "aupr_in": "AUPR, inliers positive ↑"}
SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "mnist": "MNIST",
        "texture": "Texture", "blobs": "Blobs", "gaussian": "Gaussian", "uniform": "Uniform",
        "rest": "the other classes"}

# What a table file may hold: at each place what is expected in words, and a test. Of a block's keys
# those with a * must be there, and "..." stands for any other.
TEXT = ("text", lambda x: isinstance(x, str) and x.strip())
COUNT = ("an integer of at least 1", lambda x: type(x) is int and x >= 1)
SHARE = ("a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1)
FLAG = ("text, a number, true, false or a list of them", lambda x: x != [] and all(
    isinstance(part, (str, int, float)) for part in (x if isinstance(x, list) else [x])))
METRIC = (f"one of {', '.join(METRICS)}", lambda x: x in [*METRICS])
METHOD = (f"one of {', '.join(METHODS)}", lambda x: x in [*METHODS])
RECIPE = ("the path of a recipe", lambda x: isinstance(x, str) and (HERE / x).is_file())
PUBLISHED = {"source*": TEXT, **dict.fromkeys(METRICS, SHARE)}
SCHEMA = {
    "title*": TEXT, "about": TEXT, "metrics": [METRIC],
    "sets": {"...": {"label*": TEXT, "needs": TEXT}},
    "rows*": {"...": {
        "label*": TEXT, "train*": {"config*": RECIPE, "...": FLAG},
        "eval*": {"method*": METHOD, "ood*": [TEXT], "...": FLAG},
        "draws": COUNT, "published": [{"ood*": TEXT, "clusters": COUNT, **PUBLISHED}]}},
    "means": [{"label*": TEXT, "outliers*": TEXT, "ood*": [TEXT], "rows": [TEXT],
               "clusters": COUNT, "published": PUBLISHED}],
}


def names():
    """Return the names of the tables in configs/tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name):
    """Read a table and check all of it.

    Args:
        name: of a file in configs/tables, without its ending; or the path of a YAML file.

    Returns:
        dict as the file has it (SCHEMA), with defaults, "name", "path" and "entries": (row, label,
        outlier set as printed, clusters, [(row, outlier set)], published blocks), means last.

    Raises: UserError: names the file, the place in it, what was found and what is allowed.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no table {name}: {path} is not there; known are {', '.join(names())}, or "
                        "the path of a .yaml file")
    content = utils.read_yaml(path, "the table")
    _check(path, content, SCHEMA)
    table = {"about": "", "metrics": ["fpr95", "auroc", "aupr"], "sets": {}, "means": [],
             **{k: v for k, v in content.items() if v}, "name": path.stem, "path": path}
    rows, places, table["entries"] = table["rows"], {}, []
    for key in (path.stem, *rows, *table["sets"]):
        if not re.fullmatch(r"\w+", key):
            raise UserError(f"{path}: '{key}' is part of file names: expected letters, digits, _")
    for name, row in rows.items():
        m = row["eval"].get("clusters", 1)
        row["clusters"], row["draws"] = m if isinstance(m, list) else [m], row.get("draws", 1)
        places[name] = {place: [] for place in product(row["clusters"], row["eval"]["ood"])}
        for entry in row.get("published", []):
            place = entry.get("clusters", row["clusters"][0]), entry["ood"]
            check_known(f"{path}: rows: {name}: published: clusters, ood", [place], places[name])
            places[name][place].append(entry)
        for (m, ood), published in places[name].items():
            label = row["label"] + (f", m = {m}" if len(row["clusters"]) > 1 else "")
            outliers = table["sets"].get(ood, {"label": SETS.get(ood, ood)})["label"]
            table["entries"].append((name, label, outliers, m, [(name, ood)], published))
    for mean in table["means"]:
        where, chosen = f"{path}: means: {mean['label']}", mean.get("rows") or [*rows]
        check_known(f"{where}: rows", chosen, rows)
        m = mean.get("clusters", rows[chosen[0]]["clusters"][0])
        for name in chosen:
            check_known(f"{where}: clusters, ood", product([m], mean["ood"]), places[name])
        table["entries"].append(("", mean["label"], mean["outliers"], m,
                                 [*product(chosen, mean["ood"])], [mean.get("published", {})]))
    return table


def _check(where, found, schema):
    """Stop unless a value is what its part of SCHEMA says."""
    kind = type(schema)
    expected, is_right = schema if kind is tuple else {
        list: ("a list", lambda x: isinstance(x, list)), dict: ("lines of 'key: value'", lambda x: (
            isinstance(x, dict) and all(isinstance(key, str) for key in x)))}[kind]
    if not is_right(found):
        raise UserError(f"{where}: expected {expected}, not {found!r:.60}")
    if kind is list:
        for item in found:
            _check(where, item, schema[0])
    if kind is dict:
        parts = {key.rstrip("*"): part for key, part in schema.items()}
        check_known(f"{where}: key", found if "..." not in parts else [], parts)
        for key in schema:
            if key.endswith("*") and not found.get(key[:-1]):
                raise UserError(f"{where}: {key[:-1]} is missing or empty")
        for key, value in found.items():
            _check(f"{where}: {key}", value, parts.get(key, parts.get("...")))


def check_known(where, found, known):
    """Stop unless all that was found is known."""
    for item in found:
        if item not in [*known]:
            raise UserError(f"{where}: unknown {item!r}; known are {', '.join(map(str, known))}")


def lines(table, measured):
    """Set ours beside the published: a dict for each number, in the order of the table.

    Args:
        table: see `read`.
        measured: {(row, outlier set, clusters): {training seed: [record of each draw]}}; a record
            is a dict with the metrics. Seeds that lack a draw do not count.
    """
    found = []
    for entry, metric in product(table["entries"], table["metrics"]):
        row, label, outliers, m, places, published = entry
        cells = [{seed: [record[metric] for record in records]
                  for seed, records in measured.get((name, ood, m), {}).items()
                  if len(records) == table["rows"][name]["draws"]} for name, ood in places]
        networks = [[cell[seed] for cell in cells]
                    for seed in sorted(set.intersection(*map(set, cells)))]
        means = [fmean(map(fmean, draws)) for draws in networks]
        spreads = [stdev(draws[0]) for draws in networks if row and len(draws[0]) > 1]
        mean = fmean(means) if means else None
        known = next((p for p in published if metric in p), {"source": "", metric: None})
        found.append({
            "row": row, "label": label, "outliers": outliers, "clusters": m, "metric": metric,
            "mean": mean, "deviation": stdev(means) if len(means) > 1 else None, "n": len(means),
            "draws": table["rows"][row]["draws"] if row else 1,
            "draws_deviation": fmean(spreads) if spreads else None, "published": known[metric],
            "difference": None if None in (mean, known[metric]) else mean - known[metric],
            "source": known["source"]})
    return found


def as_csv(found):
    """Return lines as CSV with all digits; an empty field where there is nothing."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([found[0], *(x.values() for x in found)])
    return out.getvalue()


def grid(table, found):
    """Lay lines out as papers do, without what is neither measured nor published.

    Returns:
        {outlier set: [metric]}; a list of (label, whether published, [text of a cell]), with a mean
        in the row of its label, else in one at the end; and sentences for below.
    """
    found = [x for x in found if x["n"] or x["source"]]
    pairs = {(x["outliers"], x["metric"]) for x in found}
    columns = {outliers: [metric for metric in table["metrics"] if (outliers, metric) in pairs]
               for outliers in dict.fromkeys(x["outliers"] for x in found)}
    sources = list(dict.fromkeys(x["source"] for x in found if x["source"]))
    labels, rows = {}, []
    for x in found:
        labels.setdefault(x["label"], {})[x["outliers"], x["metric"]] = x
    for label, known in labels.items():
        cells = [known.get((o, metric)) for o, metrics in columns.items() for metric in metrics]
        rows.append((label, False, [_ours(x) if x else "" for x in cells]))
        shown = [f"{x['published']:.10g}" if x and x["source"] else "" for x in cells]
        if any(shown):
            numbers = {sources.index(x["source"]) + 1 for x in cells if x and x["source"]}
            rows.append((f"published {sorted(numbers)}", True, shown))
    n = sorted({x["n"] for x in found} - {0})
    ours = f"mean ± standard deviation over {' or '.join(map(str, n))} networks"
    notes = [f"Ours: {ours if n and n[-1] > 1 else 'one network' if n else 'not measured yet'}."]
    notes += [f"[{i}] {source}." for i, source in enumerate(sources, 1)]
    return {o: [METRICS[m] for m in metrics] for o, metrics in columns.items()}, rows, notes


def _ours(x):
    text = f"{x['mean']:.4f}" if x["n"] else "–"
    text += f" ± {x['deviation']:.4f}" if x["n"] > 1 else ""
    return text + (f" (draws ± {x['draws_deviation']:.4f})" if x["draws"] > 1 and x["n"] else "")


def markdown(table, found):
    """Return lines as a Markdown table, published values in italics below ours, and the notes."""
    columns, rows, notes = grid(table, found)
    bars = [["network", *(f"{o}<br>{m}" for o, metrics in columns.items() for m in metrics)]]
    bars += [["---"] * len(bars[0])]
    bars += [[f"*{cell}*" if cell and published else cell for cell in (label, *cells)]
             for label, published, cells in rows]
    return "".join("|" + "".join(f" {cell.replace('|', '&#124;')} |" for cell in bar) + "\n"
                   for bar in bars) + f"\n{' '.join(notes)}\n"


def text(table, found, width):
    """Return lines as tables of `width` characters, columns that do not fit below the others."""
    columns, rows, notes = grid(table, found)
    heads = [(o, metric) for o, metrics in columns.items() for metric in metrics]
    cells = [["", "", *("  " * published + label for label, published, _ in rows)],
             *([*head, *(row[2][i] for row in rows)] for i, head in enumerate(heads))]
    labels, *rest = ([cell.ljust(max(map(len, column)) + 2) for cell in column] for column in cells)
    made = []
    while rest:
        fitting = max(1, (width + 2 - len(labels[0])) // max(len(column[0]) for column in rest))
        made += ["".join(row).rstrip() for row in zip(labels, *rest[:fitting], strict=True)] + [""]
        rest = rest[fitting:]
    return "\n".join([*made, *notes])
