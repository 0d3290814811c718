"""The page of a table: one HTML file with its figures in it, readable in light and dark."""

import base64
from pathlib import Path

import jinja2

from report import tables


def html(table, lines, remarks, commands, figures):
    """Fill in page.html; opening what it returns fetches nothing.

    Args:
        table, lines: see `tables`. remarks: sentences that stand below the table.
        commands: text, what was run. figures: {title: [Path of a PNG]}.
    """
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    template = page.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    columns, rows, notes = tables.grid(table, lines)
    return template.render(table=table, columns=columns, rows=rows, notes=notes,
                           remarks=remarks, commands=commands, figures=figures)
