"""Tables as the page shows them: cells, what they sort by, and which columns are numbers."""

import math
import re
from dataclasses import dataclass

from h2cache.eval.report.tables.sheet import Sheet

NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
ABSENT = ("", "n/a", "-", "–", "—", "nan", "failed")
INFINITE = ("∞", "inf", "identical")  # an image identical to the reference has an infinite PSNR


@dataclass(frozen=True)
class Cell:
    """`value` is the number that a numeric column sorts by: the first of the text; None where it has none."""

    text: str
    value: float | None


@dataclass(frozen=True)
class WebTable:
    """`numeric`, a flag for each column: every cell begins with a number or says that there is none."""

    columns: tuple[str, ...]
    numeric: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]


def web_table(sheet: Sheet) -> WebTable:
    """What a sheet shows, for the page."""
    rows = tuple(tuple(Cell(text, _value(text)) for text in row) for row in sheet.rows)
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(sheet.header)
    numeric = tuple(all(cell.value is not None or cell.text.lower() in ABSENT for cell in column) for column in columns)
    return WebTable(sheet.header, numeric, rows)


def _value(text: str) -> float | None:
    if text in INFINITE:
        return math.inf
    found = NUMBER.match(text)
    return float(found[0].replace(",", "").replace("−", "-")) if found else None
