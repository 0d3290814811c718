#!/usr/bin/env python3
"""Print the benchmark table of docs/costs.md, which is made of benchmarks/records/*.json.

    python benchmarks/table.py                          # print it
    python benchmarks/table.py --write docs/costs.md    # put it between the file's two markers
    python benchmarks/table.py --check docs/costs.md    # exit status 1 if the file holds another
"""

import json
from pathlib import Path

import common

import utils
from infra import program, storage
from utils import RunError, UserError

ORDER = ("bench_step", "bench_augment", "bench_extract", "bench_detection", "bench_detection_full")
HEAD = ("measured", "unit", "plain", "ours", "times as fast", "products alone")


def read_records(folder):
    """Records that have rows, a list of common.row under "table", by name, in ORDER."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    names = sorted(found, key=lambda name: (*ORDER, name).index(name))
    return {name: found[name] for name in names if "table" in found[name]}


def figure(value):
    """A number with three digits that count, or nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".removesuffix(".")


def markdown(head, rows, left=1):
    """The lines of a table, all but `left` columns aligned to the right, and an empty line."""
    bars = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(row) + " |" for row in (head, bars, *rows)] + [""]


def table(records):
    """The table of {name: record}, and a line for each machine that they come from: Markdown."""
    rows, machines = [], {}
    for name, record in records.items():
        machines.setdefault(machine(record["facts"]), []).append(name)
        for r in record["table"]:
            gain = r["ours"] / r["plain"] if "/" in r["unit"] else r["plain"] / r["ours"]
            rows.append((r["what"], r["unit"], figure(r["plain"]), figure(r["ours"]),
                         f"{gain:.1f}", figure(r["products"])))
    return "\n".join(markdown(HEAD, rows, left=2)
                     + [f"{', '.join(names)}: {where}." for where, names in machines.items()])


def machine(facts):
    """Where a record comes from, in one sentence without a full stop."""
    gpu = f"{facts['gpu']}, " if "gpu" in facts else ""
    return (f"{gpu}{facts['cpu']}, {facts['cores']} cores, {facts['torch_threads']} used by torch; "
            f"torch {facts['versions']['torch']}; {facts['time'][:10]}")


def put(path, made, name="benchmarks", check=False):
    """Put a table between the markers of a name in a file, or only check that it is there.

    Raises:
        UserError: the markers are not there once each, in order. RunError: another table is there.
    """
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end or begin in after or end in before + after:
        raise UserError(f"{path}: one line {begin} and one line {end} after it are needed")
    new = f"{before}{begin}\n{made}\n{end}{after}"
    if not check:
        with storage.atomic_write(path, "w", encoding="utf-8") as file:
            file.write(new)
    elif new != text:
        raise RunError(f"{path} holds another table; benchmarks/table.py --write {path}")


def main(argv=None):
    p = utils.Parser(__doc__)
    p.add_argument("--records", type=Path, default=common.RECORDS, help="their folder")
    p.add_argument("--write", type=Path, metavar="FILE", help="put the table into this file")
    p.add_argument("--check", type=Path, metavar="FILE", help="compare this file with the records")
    args = utils.parse_args(p, argv)
    made = table(read_records(args.records))
    print(made)
    for path in filter(None, (args.write, args.check)):
        put(path, made, check=path is not args.write)


if __name__ == "__main__":
    program.run(main)
