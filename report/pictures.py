"""The page of detect.py: the oddest pictures, what decided, and what they are like.

One file that opens anywhere, on a phone too, and fetches nothing: the pictures are in it.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from infra import image_files, storage
from report import figures, page
from utils import UserError

SHOWN = 200  # pictures on the page; the others are in its table
SIDE, SMALL_SIDE = 160, 72  # pixels, of a picture and of the good ones that it is like
MARK = '<meta name="generator" content="SSD detect.py">'  # by which a page is known as ours


def is_ours(path):
    """Tell whether a page is one that `write` wrote."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return MARK in file.read(500)


class Row(NamedTuple):
    """What was found of one picture."""

    rank: int  # 1 is the oddest
    path: str
    score: float
    p: float | None  # share of good pictures that look at least as odd; None: nothing is known
    flagged: bool | None


def write(path, title, rows, alike, unread, calibration, false_alarms, facts):
    """Write the page of pictures to a file.

    Args: title: text, what was compared with what. rows: list of Row, by rank. alike: a list of
        paths of good pictures for each of the first rows, the most alike first. unread: {path:
        reason}. calibration: float [n], scores of good pictures outside the fit.
        false_alarms: the share of them to be flagged. facts: {name: text}, how it was made.
    """
    shown = rows[:SHOWN]
    wanted = [(row.path, SIDE) for row in shown]
    wanted += dict.fromkeys((name, SMALL_SIDE) for names in alike for name in names)
    with ThreadPoolExecutor() as pool:
        images = dict(zip(wanted, pool.map(_picture, wanted), strict=True))
    histogram = io.BytesIO()
    figures.decision(calibration, [row.score for row in rows], false_alarms, histogram)
    html = page.fill(
        "pictures", mark=MARK, title=title, shown=list(zip(shown, alike, strict=True)),
        others=rows[SHOWN:], images=images, side=SIDE, small=SMALL_SIDE, unread=unread,
        calibration=len(calibration), false_alarms=false_alarms, facts=facts,
        histogram=histogram.getvalue(), count=len(rows),
        flagged=None if rows[0].flagged is None else sum(row.flagged for row in rows))
    with storage.atomic_write(path, "w", encoding="utf-8") as file:
        file.write(html)


def _picture(wanted):
    """The JPEG of a (path, side), or None where the file is gone or cannot be read any more."""
    try:
        return image_files.thumbnail(*wanted)
    except UserError:
        return None
