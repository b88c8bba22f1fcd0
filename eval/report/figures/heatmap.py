"""How two fields of a method act together: one heat map for each measure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke

from h2cache.eval.errors import UserError
from h2cache.eval.report.figures.measures import FIELD_LABELS, Measure, best_setting, measure
from h2cache.eval.report.figures.output import Drawn, FigureOutput
from h2cache.eval.report.figures.style import BLACK, COLUMN, LINE, PAGE, wrap
from h2cache.eval.report.results import Results

COLOURS = "cividis"  # the same for every kind of colour vision, and monotone in greyscale
CELL = 0.36  # inches of height


@dataclass(frozen=True, kw_only=True)
class HeatMap(FigureOutput):
    """Field `rows` against field `columns`, a panel for each of `values` (see `measure`).

    `marked` is the setting that gets a frame, such as {tau1: 0.15, tau2: 0.22}. Settings without both fields, or with
    other values than `where` gives, are left out; UserError where two settings fall into one cell.
    """

    name: str = "heatmap"
    title: str = "Two fields together"
    rows: str = "tau1"
    columns: str = "tau2"
    values: tuple[str, ...] = ("denoising_speedup", "psnr")
    where: dict[str, Any] = field(default_factory=dict)
    marked: dict[str, Any] | None = None
    marked_label: str = "published setting"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(len(self.values) > 0, "values", "a list of one or more measures")
        self._require(self.rows != self.columns, "columns", f"another field than rows={self.rows!r}")
        if self.marked is not None:
            self._require(set(self.marked) == {self.rows, self.columns}, "marked", f"{self.rows} and {self.columns}")

    def draw(self, results: Results) -> Drawn | None:
        grid = self._grid(results)
        measures = [measure(results, value) for value in self.values]
        shown = [each for each in measures if each.measured]
        if not (grid and shown):
            return None
        rows, columns = (sorted({key[i] for key in grid}, key=_order) for i in (0, 1))
        across = min(2, len(shown))
        down = -(-len(shown) // across)
        width = COLUMN if across == 1 else PAGE
        names = [wrap(each.label, width / across - 0.8, weight="bold") for each in shown]
        panel = CELL * len(rows) + 0.5 + LINE * max(map(len, names))
        figure = Figure(figsize=(width, down * panel + (0.1 + LINE if self.marked else 0)), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for ax, each, lines in zip(axes, shown, names, strict=False):
            numbers = np.array(
                [[each.of(grid[r, c]).value if (r, c) in grid else np.nan for c in columns] for r in rows]
            )
            title = "\n".join(lines)
            heat_panel(ax, numbers, each.format, title, {self.rows: rows}, {self.columns: columns})
            self._mark(ax, rows, columns)
        for ax in axes[len(shown) :]:
            ax.remove()
        frame = self._frame((0, 0))
        if frame is not None:
            figure.legend(handles=[frame], labels=[self.marked_label], loc="outside lower center", handlelength=1.4)
        return Drawn(figure, " ".join([self._caption(results, measures), *self._best_pairs(results, grid, shown)]))

    def _best_pairs(self, results: Results, grid: dict[tuple, pd.DataFrame], shown: list[Measure]) -> list[str]:
        """Which pair is best by each metric at the marked one's speed, in a sentence; none without a marked one."""
        at = (self.marked[self.rows], self.marked[self.columns]) if self.marked else None
        found = [
            f"{each.label.partition(',')[0]} {each.format(each.of(grid[pair]).value)} at {self._pair(pair)}"
            for each in shown
            if each.name in results.metrics and (pair := best_setting(results, grid, each.name, at)) is not None
        ]
        if not found:
            return []
        return [f"Best among the pairs that denoise at least as fast as {self._pair(at)}: {'; '.join(found)}."]

    def _pair(self, pair: tuple) -> str:
        names = (FIELD_LABELS.get(name, name) for name in (self.rows, self.columns))
        return ", ".join(f"{name} = {_text(value)}" for name, value in zip(names, pair, strict=True))

    def _grid(self, results: Results) -> dict[tuple, pd.DataFrame]:
        """(value of `rows`, value of `columns`) to the rows of the frame."""
        grid: dict[tuple, pd.DataFrame] = {}
        for setting, rows in results.frame.groupby("setting", sort=False, observed=True):
            fields = rows["fields"].iloc[0]
            if self.rows not in fields or self.columns not in fields:
                continue
            if any(fields.get(name) != value for name, value in self.where.items()):
                continue
            key = (fields[self.rows], fields[self.columns])
            if key in grid:
                both = f"{grid[key]['setting'].iloc[0]!r} and {setting!r}"
                raise UserError(
                    f"figure {self.name}: {both} both have {self.rows}={key[0]}, {self.columns}={key[1]}; "
                    "say which one is meant with where="
                )
            grid[key] = rows
        return grid

    def _mark(self, ax: Axes, rows: list, columns: list) -> None:
        if self.marked and self.marked[self.rows] in rows and self.marked[self.columns] in columns:
            at = (columns.index(self.marked[self.columns]), rows.index(self.marked[self.rows]))
            ax.add_patch(self._frame(at))

    def _frame(self, cell: tuple[int, int]) -> Rectangle | None:
        if not self.marked:
            return None
        corner = (cell[0] - 0.44, cell[1] - 0.40)
        halo = [Stroke(linewidth=3.2, foreground="white"), Normal()]  # seen on dark cells as on bright ones
        strokes = {"fill": False, "edgecolor": BLACK, "linewidth": 1.4, "path_effects": halo, "gid": "marked"}
        return Rectangle(corner, 0.88, 0.80, **strokes)

    def _caption(self, results: Results, measures: list[Measure]) -> str:
        images = results.frame["prompt_id"].nunique()
        missing = [
            f"{each.label}: n/a ({results.unavailable.get(each.name, 'not measured')})."
            for each in measures
            if not each.measured
        ]
        text = f"Means over {images} prompts; a speedup is the ratio of mean times."
        return " ".join([text, *missing])


def heat_panel(
    ax: Axes,
    numbers: np.ndarray,
    words: Callable[[float], str],
    title: str,
    rows: Mapping[str, Sequence],
    columns: Mapping[str, Sequence],
) -> None:
    """Coloured cells with their numbers in `words`; a cell without one, NaN, is hatched.

    `rows` and `columns` each have one field and its values.
    """
    ((across, ticks_across),), ((down, ticks_down),) = columns.items(), rows.items()
    ax.set_title(title, weight="bold")
    ax.set_xticks(range(len(ticks_across)), [_text(value) for value in ticks_across])
    ax.set_yticks(range(len(ticks_down)), [_text(value) for value in ticks_down])
    ax.set_xlabel(FIELD_LABELS.get(across, across))
    ax.set_ylabel(FIELD_LABELS.get(down, down))
    finite = numbers[np.isfinite(numbers)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    norm = Normalize(low, high if high > low else low + 1, clip=True)
    colours = colormaps[COLOURS](norm(np.nan_to_num(numbers, posinf=high, neginf=low)))
    colours[np.isnan(numbers)] = (1, 1, 1, 1)
    ax.imshow(colours, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(numbers):
        if np.isnan(value):
            corner = (column - 0.5, row - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="#c0c0c0", linewidth=0))
        ink = "white" if _luminance(colours[row, column]) < 0.42 else BLACK
        ax.text(column, row, words(value), ha="center", va="center", color=ink, gid=f"cell {row} {column}")
    ax.set_xticks(np.arange(numbers.shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(numbers.shape[0] + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


def _luminance(colour: np.ndarray) -> float:
    return float(np.dot(colour[:3], (0.2126, 0.7152, 0.0722)))


def _order(value: Any) -> tuple:
    """Numbers in their order, None after them, words last: pool targets may be 16, 64 and None."""
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else 0, value is not None, str(value))


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
