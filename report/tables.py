"""Tables of results: their files under configs/tables, ours beside the published, as text.

A table file has a title and rows; a row names how a network is trained, how it is evaluated, and
what was published for it, with the source. Runs nothing; reproduce.py does.
"""

import csv
import html
import io
import re
import reprlib
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import utils
from detection import DEFAULTS, SCORES, Choice, choices
from utils import UserError

HERE = Path(__file__).resolve().parent.parent
FOLDER = HERE / "configs/tables"
METHODS = {"ssd": "eval_ssd.py", "ssdk": "eval_ssdk.py"}
METRICS = {  # in print; the arrow says which way is better
    "fpr95": "FPR95 ↓", "auroc": "AUROC ↑", "aupr": "AUPR ↑",
    "fpr95_ood_positive": "FPR95, outliers positive ↓", "aupr_in": "AUPR, inliers positive ↑"}
OPENOOD = {"fpr95_ood_positive": "FPR@95", "auroc": "AUROC", "aupr_in": "AUPR_IN",
           "aupr": "AUPR_OUT"}  # the columns of its leaderboard
SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "mnist": "MNIST",
        "texture": "Texture", "blobs": "Blobs", "gaussian": "Gaussian", "uniform": "Uniform",
        "rest": "the other classes"}

# What a table file may hold: at each place what is expected in words, and a test. Of a block's keys
# those with a * must be there, and "..." stands for any other.
TEXT = ("text", lambda x: isinstance(x, str) and x.strip() and "".join(x.split()).isprintable())
COUNT = ("an integer of at least 1", lambda x: type(x) is int and x >= 1)
SHARE = ("a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1)
FLAG = ("text, a number, true, false or a list of them", lambda x: x != [] and all(
    isinstance(part, (str, int, float)) for part in (x if isinstance(x, list) else [x])))
METRIC = (f"one of {', '.join(METRICS)}", lambda x: x in [*METRICS])
SCORE = (f"one of {', '.join(SCORES)}", lambda x: x in [*SCORES])
METHOD = (f"one of {', '.join(METHODS)}", lambda x: x in [*METHODS])
RECIPE = ("the path of a recipe", lambda x: isinstance(x, str) and (HERE / x).is_file())
CHOICE = {"score": SCORE, **dict.fromkeys(DEFAULTS, COUNT)}
PUBLISHED = {"source*": TEXT, **dict.fromkeys(METRICS, SHARE)}
SCHEMA = {
    "title*": TEXT, "about": TEXT, "metrics": [METRIC],
    "layout": ("openood", lambda x: x == "openood"),
    "sets": {"...": {"label*": TEXT, "needs": TEXT}},
    "rows*": {"...": {
        "label*": TEXT, "outliers": TEXT, "encoder": TEXT,
        "train": {"config*": RECIPE, "...": FLAG},
        "eval*": {"method*": METHOD, "ood*": [TEXT], "score": [SCORE], "...": FLAG},
        "draws": COUNT, "published": [{"ood*": TEXT, **CHOICE, **PUBLISHED}]}},
    "means": [{"label*": TEXT, "outliers*": TEXT, "ood*": [TEXT], "rows": [TEXT],
               **CHOICE, "published": PUBLISHED}],
}


def names():
    """Return the names of the tables in configs/tables."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name):
    """Read the table of a name in configs/tables, or of the path of a YAML file; check all of it.

    Returns: dict as the file has it (SCHEMA), with defaults, "name", "path" and "entries": (row,
        label, outlier set as printed, Choice, [(row, outlier set)], published blocks), means last.
    Raises: UserError: names the file, the place in it, what was found and what is allowed.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no table {name}: {path} is not there; known are {', '.join(names())}, or "
                        "the path of a .yaml file")
    content = _checked(path, utils.read_yaml(path, "the table"), SCHEMA)
    table = {"about": "", "layout": "", "metrics": ["fpr95", "auroc", "aupr"], "sets": {},
             "means": [], **{k: v for k, v in content.items() if v},
             "name": path.stem, "path": path}
    rows, places, table["entries"] = table["rows"], {}, []
    for key in (path.stem, *rows, *table["sets"]):
        if not re.fullmatch(r"\w+", key):
            raise UserError(f"{path}: '{key}' is part of file names: expected letters, digits, _")
    for name, row in rows.items():
        if ("train" in row) == ("encoder" in row):
            raise UserError(f"{path}: rows: {name}: expected either train or encoder")
        given = {"score": "ssd", **DEFAULTS, **row["eval"]}
        given = {key: value if isinstance(value, list) else [value]
                 for key, value in given.items() if key in CHOICE}
        row["choices"], row["draws"] = choices(given["score"], given), row.get("draws", 1)
        row["default"] = {key: values[0] for key, values in given.items()}
        places[name] = {place: [] for place in product(row["choices"], row["eval"]["ood"])}
        for entry in row.get("published", []):
            place = Choice.of(row["default"] | entry), entry["ood"]
            check_known(f"{path}: rows: {name}: published: {', '.join(CHOICE)}, ood", [place],
                        places[name])
            places[name][place].append(entry)
        for (choice, ood), published in places[name].items():
            which = str(choice).removeprefix(f"{choice.score}, " * (len(given["score"]) == 1))
            label = row["label"] + (f", {which}" if len(row["choices"]) > 1 else "")
            outliers = table["sets"].get(ood, {"label": SETS.get(ood, ood)})["label"]
            outliers = row.get("outliers", outliers)
            table["entries"].append((name, label, outliers, choice, [(name, ood)], published))
    for mean in table["means"]:
        where, chosen = f"{path}: means: {mean['label']}", mean.get("rows") or [*rows]
        check_known(f"{where}: rows", chosen, rows)
        choice = Choice.of(rows[chosen[0]]["default"] | mean)
        for name in chosen:
            check_known(f"{where}: {', '.join(CHOICE)}, ood", product([choice], mean["ood"]),
                        places[name])
        table["entries"].append(("", mean["label"], mean["outliers"], choice,
                                 [*product(chosen, mean["ood"])], [mean.get("published", {})]))
    return table


def _checked(where, found, schema):
    """A value if it is what its part of SCHEMA says, its texts in one line."""
    kind = type(schema)
    expected, is_right = schema if kind is tuple else {
        list: ("a list", lambda x: isinstance(x, list)), dict: ("lines of 'key: value'", lambda x: (
            isinstance(x, dict) and all(isinstance(key, str) for key in x)))}[kind]
    if not is_right(found):
        raise UserError(f"{where}: expected {expected}, not {reprlib.repr(found)}")
    if kind is list:
        return [_checked(where, item, schema[0]) for item in found]
    if kind is dict:
        parts = {key.rstrip("*"): part for key, part in schema.items()}
        check_known(f"{where}: key", found if "..." not in parts else [], parts)
        for key in schema:
            if key.endswith("*") and not found.get(key[:-1]):
                raise UserError(f"{where}: {key[:-1]} is missing or empty")
        return {key: _checked(f"{where}: {key}", value, parts.get(key, parts.get("...")))
                for key, value in found.items()}
    return " ".join(found.split()) if schema is TEXT else found


def check_known(where, found, known):
    """Stop unless all that was found is known."""
    for item in found:
        if item not in [*known]:
            raise UserError(f"{where}: unknown {reprlib.repr(item)}; known are "
                            f"{', '.join(map(str, known))}")


def lines(table, measured):
    """Set ours beside the published: a dict for each number, in the order of the table.

    Args: table: see `read`. measured: {(row, outlier set, Choice): {training seed: [record of each
        draw]}}; a record is a dict with the metrics. Seeds that lack a draw do not count.
    """
    found = []
    for entry, metric in product(table["entries"], table["metrics"]):
        row, label, outliers, choice, places, published = entry
        cells = [{seed: [record[metric] for record in records]
                  for seed, records in measured.get((name, ood, choice), {}).items()
                  if len(records) == table["rows"][name]["draws"]
                  and all(metric in record for record in records)} for name, ood in places]
        networks = [[cell[seed] for cell in cells]
                    for seed in sorted(set.intersection(*map(set, cells)))]
        means = [fmean(map(fmean, draws)) for draws in networks]
        spreads = [stdev(draws[0]) for draws in networks if row and len(draws[0]) > 1]
        mean = fmean(means) if means else None
        known = next((p for p in published if metric in p), {"source": "", metric: None})
        found.append({
            "row": row, "label": label, "outliers": outliers, "score": choice.score,
            **dict.fromkeys(DEFAULTS), **choice.fields(), "metric": metric,
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
    """Lay lines out as papers do, or as OpenOOD, without what is neither measured nor published.

    Returns: {outlier set: [metric]}; a list of (label, whether published, [text of a cell]), with a
        mean in the row of its label, else in one at the end; and sentences for below.
    """
    found, openood = [x for x in found if x["n"] or x["source"]], table["layout"] == "openood"
    if openood:
        found = [_in_percent(x) for x in found]
    pairs = {(x["outliers"], x["metric"]) for x in found}
    columns = {o: [metric for metric in table["metrics"] if (o, metric) in pairs]
               for o in dict.fromkeys(x["outliers"] for x in found)}
    sources = list(dict.fromkeys(x["source"] for x in found if x["source"]))
    labels, rows = {}, []
    for x in found:
        labels.setdefault(x["label"], {})[x["outliers"], x["metric"]] = x
    for label, known in labels.items():
        cells = [known.get((o, metric)) for o, metrics in columns.items() for metric in metrics]
        rows.append((label, False, [_ours(x, 2 if openood else 4) if x else "" for x in cells]))
        shown = [f"{x['published']:.10g}" if x and x["source"] else "" for x in cells]
        if any(shown):
            numbers = {sources.index(x["source"]) + 1 for x in cells if x and x["source"]}
            rows.append((f"published {sorted(numbers)}", True, shown))
    n = sorted({x["n"] for x in found} - {0})
    ours = f"mean ± standard deviation over {' or '.join(map(str, n))} networks"
    notes = [f"Ours: {ours if n and n[-1] > 1 else 'one network' if n else 'not measured yet'}."]
    notes += [f"[{i}] {source}." for i, source in enumerate(sources, 1)]
    notes += ["In percent, with OpenOOD's deviation, that of a population."] * openood
    names = METRICS | (OPENOOD if openood else {})
    return {o: [names[m] for m in metrics] for o, metrics in columns.items()}, rows, notes


def _in_percent(x):
    """A line under the name of network and set, in percent, with a population's deviation."""
    factors = dict.fromkeys(("mean", "draws_deviation", "published"), 100)
    factors["deviation"] = 100 * (1 - 1 / max(x["n"], 1)) ** 0.5
    scaled = {key: factor * x[key] for key, factor in factors.items() if x[key] is not None}
    return x | scaled | {"label": f"{x['label']}: {x['outliers']}", "outliers": ""}


def _ours(x, digits):
    text = f"{x['mean']:.{digits}f}" if x["n"] else "–"
    text += f" ± {x['deviation']:.{digits}f}" if x["n"] > 1 else ""
    drawn = x["draws"] > 1 and x["n"]
    return text + (f" (draws ± {x['draws_deviation']:.{digits}f})" if drawn else "")


def markdown(table, found):
    """Return lines as a Markdown table, published values in italics below ours, and the notes."""
    columns, rows, notes = grid(table, found)
    bars = [["network", *("<br>".join(filter(None, (plain(o), m)))
                          for o, metrics in columns.items() for m in metrics)]]
    bars += [["---"] * len(bars[0])]
    bars += [[f"*{cell}*" if cell and published else cell for cell in (plain(label), *cells)]
             for label, published, cells in rows]
    return "".join("|" + "".join(f" {cell.replace('|', '&#124;')} |" for cell in bar) + "\n"
                   for bar in bars) + f"\n{plain(' '.join(notes))}\n"


def plain(text):
    """Return text in one line of which Markdown takes nothing for HTML."""
    return html.escape(" ".join(text.split()), quote=False)


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
