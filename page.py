"""The page of a table: one HTML file with its figures in it, readable in light and dark.

    page.html(table, lines, remarks, jobs)     # text; nothing is fetched when it is opened
"""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

import tables

STYLE = """
:root { color-scheme: light dark; --line: #8886; --faint: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; }
.numbers td { white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
pre { background: var(--faint); padding: .8rem; overflow-x: auto; font-size: .85rem; }
img { max-width: 100%; background: white; border-radius: 4px; margin: .3rem 0; }
summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Shown:
    """A training or an evaluation on the page. seconds: of its epochs. figures: paths of PNGs."""

    title: str
    state: str
    command: str
    versions: dict
    seconds: float
    figures: tuple


def html(table, lines, remarks, jobs):
    """Return the page of a table.

    Args:
        table: tables.Table. lines: its tables.Line. remarks: sentences that stand below the table.
        jobs: list of Shown, in the order they are run in.

    Returns:
        text of one HTML file; its images are in it.
    """
    parts = [f"<h1>{escape(table.title)}</h1>"]
    parts += [f"<p>{escape(part)}</p>" for part in table.about.split("\n\n") if part.strip()]
    parts.append(_table(tables.HEAD, tables.grouped(table, lines), "numbers"))
    parts += [f"<p>{escape(remark)}</p>" for remark in remarks]
    parts += ["<h2>What was run</h2>",
              _table(("", "state", "time", "machine"),
                     [(job.title, job.state, _duration(job.seconds), _machine(job.versions))
                      for job in jobs])]
    commands = "\n".join(job.command for job in jobs)
    parts.append(f"<pre>{escape(commands)}</pre>")
    parts.append("<h2>Versions</h2>" + _versions(jobs))
    parts.append("<h2>Figures</h2>")
    parts += [_figures(job) for job in jobs if job.figures]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(table.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _table(head, rows, kind=""):
    def line(row, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide {kind}"><table>\n{line(head, "th")}\n{body}\n</table></div>'


def _figures(job):
    images = "\n".join(_image(Path(path)) for path in job.figures)
    return f"<h3>{escape(job.title)}</h3>\n{images}"


def _image(path):
    content = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.stem, quote=True)
    return f'<img alt="{name}" title="{name}" src="data:image/png;base64,{content}">'


def _duration(seconds):
    """Time as a person says it; nothing for nothing."""
    if not seconds:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _machine(versions):
    return versions.get("gpu", "CPU") if versions else ""


def _versions(jobs):
    """All versions that records of the table name, each once."""
    found = {}
    for job in jobs:
        for name, version in job.versions.items():
            found.setdefault(name, [])
            if version not in found[name]:
                found[name].append(version)
    text = ", ".join(f"{name} {' and '.join(each)}" for name, each in found.items())
    return f"<p>{escape(text) or 'Nothing was run yet.'}</p>"
