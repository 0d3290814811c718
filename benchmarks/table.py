#!/usr/bin/env python3
"""Print the README's benchmark table, which is made of benchmarks/records/*.json.

    python benchmarks/table.py                      # print it
    python benchmarks/table.py --write README.md    # put it between the file's two markers
    python benchmarks/table.py --check README.md    # exit status 1 if the file holds another

A record gives rows to it by its entry "table", a list of what common.row returns.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

import utils

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
ORDER = ("bench_step", "bench_augment", "bench_extract", "bench_detection")
HEAD = ("measured", "unit", "plain", "ours", "times as fast", "products alone")


def read_records(folder):
    """Records that have rows, by name: those of ORDER first."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}
    names = sorted(found, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    return {name: found[name] for name in names if "table" in found[name]}


def figure(value):
    """A number with three digits that count, or nothing."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".removesuffix(".")


def table(records):
    """Make the table, and a line for each machine that the records come from.

    Args:
        records: {name: record}.

    Returns:
        str, lines of Markdown.
    """
    lines = [HEAD, ("---", "---", "---:", "---:", "---:", "---:")]
    machines = {}
    for name, record in records.items():
        machines.setdefault(machine(record["facts"]), []).append(name)
        for r in record["table"]:
            gain = r["ours"] / r["plain"] if "/" in r["unit"] else r["plain"] / r["ours"]
            lines.append((r["what"], r["unit"], figure(r["plain"]), figure(r["ours"]),
                          f"{gain:.1f}", figure(r["products"])))
    text = ["| " + " | ".join(line) + " |" for line in lines] + [""]
    text += [f"{', '.join(names)}: {machine}." for machine, names in machines.items()]
    return "\n".join(text)


def machine(facts):
    """Where a record comes from, in one sentence without a full stop."""
    place = f"{facts['cpu']}, {facts['cores']} cores, {facts['torch_threads']} used by torch"
    if "gpu" in facts:
        place = f"{facts['gpu']}, {place}"
    return f"{place}; torch {facts['versions']['torch']}; {facts['time'][:10]}"


def put(text, made):
    """Return a file's text with what stands between the markers replaced.

    Raises:
        utils.UserError: the markers are not there once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise utils.UserError(f"one line {BEGIN} and one line {END} after it are needed")
    return f"{before}{begin}\n{made}\n{end}{after}"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--records", type=Path, default=common.RECORDS, help="their folder")
    p.add_argument("--write", type=Path, metavar="FILE", help="put the table into this file")
    p.add_argument("--check", type=Path, metavar="FILE", help="compare this file with the records")
    args = p.parse_args()
    made = table(read_records(args.records))
    print(made)
    for path in (args.write, args.check):
        if path is None:
            continue
        text = path.read_text(encoding="utf-8")
        new = put(text, made)
        if path == args.write:
            with utils.whole_file(path, "w", encoding="utf-8") as file:
                file.write(new)
        elif new != text:
            raise utils.RunError(f"{path} holds another table; benchmarks/table.py --write {path}")


if __name__ == "__main__":
    utils.program(main)
