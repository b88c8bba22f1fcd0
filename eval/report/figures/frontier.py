"""What a method gives for what it costs: speedup against quality, and the frontier that nobody is beyond."""

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from h2cache.eval.report.figures.measures import SPEEDUPS, Measure, Measured, measure
from h2cache.eval.report.figures.output import Drawn, FigureOutput
from h2cache.eval.report.figures.style import COLUMN, LINE, PAGE, Look, looks_of, text_width
from h2cache.eval.report.results import BASELINE, Results

TICKS = (1, 2, 4, 8, 16, 32, 3, 6, 12, 24, 1.5, 5, 10, 2.5, 1.25, 1.1, 0.9, 0.8, 0.5)  # the first are the most wanted
APART = 0.11  # of the axis, from one tick to the next
HEIGHT = 2.6  # inches of the axes with their labels
FEW = 9  # methods that a column has room for
HANDLE = 0.55  # inches of a line in the legend and what is around it
OTHER = Look("#b5b5b5", ".", (0, (1, 1)))  # of methods that are not told apart


@dataclass(frozen=True)
class Point:
    """A setting on the plane."""

    setting: str
    method: str
    gain: Measured
    quality: Measured

    @property
    def x(self) -> float:
        return self.gain.value

    @property
    def y(self) -> float:
        return self.quality.value


@dataclass(frozen=True, kw_only=True)
class Frontier(FigureOutput):
    """Every setting of every method at (`gain`, `quality`); see `measure` for the names.

    A method's line joins those of its settings that none of its own beats in both respects, the others are hollow; the
    grey band is the best quality that any setting has for this gain. `intervals`: bars of 95 % confidence over prompts.
    The baseline is a level where it has a finite quality. `named`: the methods to tell apart, of which the experiment
    has too many; the others are grey. None: all.
    """

    name: str = "frontier"
    title: str = "Speedup against quality"
    gain: str = "denoising_speedup"
    quality: str = "psnr"
    intervals: bool = False
    named: tuple[str, ...] | None = None

    def draw(self, results: Results) -> Drawn | None:
        gain, quality = measure(results, self.gain), measure(results, self.quality)
        points = _points(results, gain, quality)
        shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
        cached = [point for point in shown if point.method != BASELINE]
        if not cached:
            return None
        everyone = list(dict.fromkeys(point.method for point in cached))
        methods = [method for method in everyone if self.named is None or method in self.named]
        looks = looks_of(pd.Series([BASELINE, *methods]))  # those that are grey take no colour from the others
        overall = pareto(cached, gain, quality)
        width = COLUMN if len(methods) <= FEW else PAGE
        columns = max(1, int(width / (HANDLE + max(map(text_width, [*methods, "overall frontier"])))))
        lines = -(-(len(methods) + 2) // columns)
        height = HEIGHT if len(methods) <= FEW else 2 * HEIGHT
        figure = Figure(figsize=(width, height + LINE * (1 + lines)), layout="constrained")
        ax = figure.subplots()
        band = {"color": "#cfcfcf", "linewidth": 5, "zorder": 1, "gid": "pareto"}
        steps = "steps-pre" if gain.more_is_better else "steps-post"
        ax.plot([p.x for p in overall], [p.y for p in overall], drawstyle=steps, **band)
        for method in everyone:
            own = [point for point in cached if point.method == method]
            look = looks[method] if method in methods else OTHER
            _draw_method(ax, own, pareto(own, gain, quality), look, self.intervals)
        level = [point.y for point in shown if point.method == BASELINE]
        for y in level:
            ax.axhline(y, color=looks[BASELINE].colour, linewidth=0.8, linestyle=(0, (1, 2)), gid="baseline")
        _axes(ax, gain, quality, [point.x for point in cached])
        handles = [_handle(method, looks[method]) for method in methods]
        handles += [_handle("others", OTHER)] * (len(methods) < len(everyone))
        handles.append(Line2D([], [], color="#cfcfcf", linewidth=5, label="overall frontier"))
        if level:
            handles.append(Line2D([], [], color=looks[BASELINE].colour, linestyle=(0, (1, 2)), label="no cache"))
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, handlelength=2.6, columnspacing=1.2)
        return Drawn(figure, self._caption(results, points, shown, quality))

    def _caption(self, results: Results, points: list[Point], shown: list[Point], quality: Measure) -> str:
        images = results.frame["prompt_id"].nunique()
        hidden = [point.setting for point in points if point not in shown and point.method != BASELINE]
        better = "higher" if quality.more_is_better else "lower"
        text = (
            f"Each point is a setting over {images} prompts; {better} is better. Lines join a method's settings that "
            "none of its own beats in both respects (hollow: beaten), the grey band is the best that any setting has."
        )
        if self.intervals:
            text += " Bars: 95 % confidence over prompts."
        return text + (f" Not drawn, having no finite value: {'; '.join(hidden)}." if hidden else "")


def pareto(points: list[Point], gain: Measure, quality: Measure) -> list[Point]:
    """The points that no other is at least as good as in both respects and better in one, by growing x."""

    def goodness(point: Point) -> tuple[float, float]:
        return (
            point.x if gain.more_is_better else -point.x,
            point.y if quality.more_is_better else -point.y,
        )

    def beaten(point: Point) -> bool:
        x, y = goodness(point)
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in map(goodness, points))

    return sorted((point for point in points if not beaten(point)), key=lambda point: point.x)


def _points(results: Results, gain: Measure, quality: Measure) -> list[Point]:
    groups = results.frame.groupby("setting", sort=False, observed=True)
    return [_point(setting, rows, gain, quality) for setting, rows in groups]


def _point(setting: str, rows: pd.DataFrame, gain: Measure, quality: Measure) -> Point:
    method = rows["method"].iloc[0]
    return Point(setting, method, gain.of(rows), quality.of(rows))


def _draw_method(ax: Axes, points: list[Point], frontier: list[Point], look: Look, intervals: bool) -> None:
    """Settings as markers, those of the method's own frontier joined; the others are hollow."""
    method = points[0].method
    line = {"color": look.colour, "linestyle": look.dashes, "gid": f"line {method}"}
    ax.plot([point.x for point in frontier], [point.y for point in frontier], zorder=2, **line)
    for point in points:
        face = look.colour if point in frontier else "white"
        strokes = {"marker": look.marker, "s": 18, "edgecolors": look.colour, "linewidths": 0.8}
        ax.scatter([point.x], [point.y], facecolors=face, zorder=4, gid=f"point {point.setting}", **strokes)
        bars = {"color": look.colour, "linewidth": 0.6, "alpha": 0.6, "zorder": 3, "gid": f"interval {point.setting}"}
        if intervals and point.gain.has_interval:
            ax.plot([point.gain.low, point.gain.high], [point.y] * 2, **bars)
        if intervals and point.quality.has_interval:
            ax.plot([point.x] * 2, [point.quality.low, point.quality.high], **bars)


def _axes(ax: Axes, gain: Measure, quality: Measure, xs: list[float]) -> None:
    ax.grid(True)
    ax.set_xlabel(gain.label)
    ax.set_ylabel(quality.label)
    ax.margins(0.06)
    if gain.name in SPEEDUPS and min(xs) > 0:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(_ticks(*ax.get_xlim()) or [min(xs)]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        ax.xaxis.set_minor_locator(NullLocator())
    for axis, each in ((ax.xaxis, gain), (ax.yaxis, quality)):
        if each.form == "%":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _ticks(low: float, high: float) -> list[float]:
    """Round speedups on a logarithmic axis, far enough from one another for their labels."""
    kept: list[float] = []
    for tick in TICKS:
        distances = [abs(math.log(tick / other)) for other in kept]
        if low <= tick <= high and min(distances, default=math.inf) >= APART * math.log(high / low):
            kept.append(tick)
    return sorted(kept)


def _handle(method: str, look: Look) -> Line2D:
    return Line2D([], [], color=look.colour, linestyle=look.dashes, marker=look.marker, label=method)
