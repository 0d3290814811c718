"""Pages: one HTML file each with its images in it, readable in light and dark."""

import base64
from pathlib import Path

import jinja2


def fill(name, **content):
    """Fill in the template NAME.html beside this file; opening what it returns fetches nothing."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters["base64"] = lambda content: base64.b64encode(content).decode()
    page.filters["text"] = lambda name: name.encode("utf-8", "replace").decode()
    template = Path(__file__).with_name(f"{name}.html").read_text(encoding="utf-8")
    return page.from_string(template).render(content)
