"""Tables as the page shows them: cells, what they sort by, and which columns are numbers; read from the files."""

import csv
import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
ABSENT = ("", "n/a", "-", "–", "—", "nan", "failed")
INFINITE = ("∞", "inf", "identical")  # an image identical to the reference has an infinite PSNR
ESCAPED = re.compile(r"\\([!-/:-@\[-`{-~])")
RULE = re.compile(r":?-+:?")


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


def read_table(files: Sequence[Path]) -> WebTable | None:
    """The table in the .md file among `files`, as the paper prints it, or else in the .csv; None without either."""
    readers = {".md": _markdown, ".csv": _comma_separated}
    for suffix, reader in readers.items():
        for path in files:
            if path.suffix == suffix:
                return _table(reader(path))
    return None


def _markdown(path: Path) -> list[list[str]]:
    """Header and rows of the first table of pipes; a pipe within a cell is written with a backslash before it."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    table: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            table.append([_unescaped(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
        elif table:
            break
    return [row for row in table if not all(RULE.fullmatch(cell) for cell in row)]


def _comma_separated(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def _unescaped(text: str) -> str:
    """What Markdown shows: a backslash makes punctuation plain, and an ampersand begins a character's name."""
    return html.unescape(ESCAPED.sub(r"\1", text))


def _table(lines: list[list[str]]) -> WebTable | None:
    if not lines:
        return None
    header, *body = lines
    rows = tuple(tuple(map(_cell, row)) for row in body)
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    numeric = tuple(all(cell.value is not None or cell.text.lower() in ABSENT for cell in column) for column in columns)
    return WebTable(tuple(header), numeric, rows)


def _cell(text: str) -> Cell:
    return Cell(text, _value(text))


def _value(text: str) -> float | None:
    if text in INFINITE:
        return math.inf
    found = NUMBER.match(text)
    return float(found[0].replace(",", "").replace("−", "-")) if found else None
