"""How every figure looks: its style sheet, its widths, and one look a method, told apart in greyscale as well."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import matplotlib.style
import pandas as pd
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from h2cache.eval.report.results import BASELINE

STYLE = Path(__file__).with_name("style.mplstyle")
DPI = 200
COLUMN, PAGE = 3.5, 7.16  # inches: one and two columns of a journal page
LINE = 9.6 / 72  # inches from one line of 8 pt text to the next

GREY, BLACK = "#8c8c8c", "#1a1a1a"


@dataclass(frozen=True)
class Look:
    """A method's colour, marker and dash pattern, the same in every figure."""

    colour: str
    marker: str
    dashes: str | tuple


# Okabe and Ito's colours for colour-blind readers (their yellow is too faint for lines on white), then some of Tol's.
LOOKS = {
    BASELINE: Look(BLACK, "*", "solid"),
    "H2-Cache": Look("#d55e00", "o", "solid"),
    "Block Cache": Look("#0072b2", "s", (0, (5, 1.5))),
    "TeaCache": Look("#009e73", "^", (0, (4, 1.5, 1, 1.5))),
    "TaylorSeer": Look("#e69f00", "D", (0, (1, 1.2))),
    "HiCache": Look("#cc79a7", "v", (0, (7, 1.5, 1, 1.5, 1, 1.5))),
    "ClusCa": Look("#56b4e9", "P", (0, (2.5, 1.5))),
    "Hi-ClusCa": Look("#999933", "X", (0, (8, 2))),
    "Plan": Look("#882255", "h", (0, (14, 1.5))),
    "Euler": Look("#6e6e6e", "p", (0, (1, 3))),
    "Heun": Look("#661100", "d", (0, (1, 2))),
    "DPM++ 2M": Look("#332288", "<", (0, (1, 1))),
    "UniPC": Look("#117733", ">", (0, (1, 0.6))),
}
ON = " on "  # "HiCache on UniPC" looks like HiCache, with another line
# For methods that are not here: each its own colour and marker, for 24 of them.
_TAKEN = {(look.colour, look.marker) for look in LOOKS.values()}
_OTHERS = tuple(
    Look(colour, marker, (0, (3, 1, 1, 1)))
    for marker, colour in product("h8<>dpH", ("#332288", "#aa4499", "#44aa99", "#661100"))
    if (colour, marker) not in _TAKEN
)


def looks_of(methods: pd.Series) -> dict[str, Look]:
    """Method to look, by first appearance. A method that `LOOKS` does not know gets one that no other has."""
    names, others, looks = list(dict.fromkeys(methods)), iter(_OTHERS), {}
    for name in names:
        method, on, _ = name.partition(ON)
        look = LOOKS.get(method) or looks.get(method) or next(others)
        looks[name] = replace(look, dashes=(0, (0.8, 2.2))) if on else look
    return looks


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside: the style sheet over matplotlib's own defaults, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(STYLE, after_reset=True):
        yield


def text_width(text: str, size: float = 8, weight: str = "normal") -> float:
    """Width of one line of text in inches."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrap(text: str, width: float, size: float = 8, weight: str = "normal") -> list[str]:
    """`text` in lines of at most `width` inches, broken at spaces, and within a word that is wider by itself.

    Lines do not break around the equals sign of "tau1 = 0.15".
    """
    lines = [""]
    for word in " ".join(text.split()).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}").split(" "):
        candidate = f"{lines[-1]} {word}".strip()
        if text_width(candidate, size, weight) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and text_width(lines[-1] + letter, size, weight) > width:
                lines.append("")
            lines[-1] += letter
    return lines
