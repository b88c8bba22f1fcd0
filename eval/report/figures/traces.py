"""The metric that decides, step by step: what each stage of a method measured, and what it did."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import MaxNLocator

from h2cache.eval.errors import UserError
from h2cache.eval.report.figures.output import Drawn, FigureOutput, row_of, select
from h2cache.eval.report.figures.style import BLACK, COLUMN, GREY, LINE, PAGE, text_width, wrap
from h2cache.eval.report.results import BASELINE, Results

PANEL = 0.85  # inches of height
STRIP = -0.13  # of the panel's top: where steps stand at which nothing was measured
MARGINS = 0.75  # inches that labels take beside the panels


@dataclass(frozen=True)
class Mark:
    """How a decision is drawn; the shapes alone tell them apart."""

    label: str
    marker: str
    colour: str
    filled: bool
    size: float


MARKS = {
    "compute": Mark("computed", "o", "#d55e00", True, 10),
    "hit": Mark("hit", "o", "#0072b2", False, 12),
    "forced": Mark("forced hit", "|", "#0072b2", True, 14),
    "warmup": Mark("warm-up", "^", BLACK, True, 12),
}
LEGEND = {"loc": "outside upper center", "columnspacing": 1.0, "handletextpad": 0.3}
THRESHOLD = {"color": BLACK, "linestyle": (0, (4, 2)), "linewidth": 0.8}


@dataclass(frozen=True, kw_only=True)
class MetricTrace(FigureOutput):
    """Traces of `settings` (none given: all that measure) on the first `count` prompts, or on `prompt_ids`.

    One panel for each stage of each setting over a shared axis of steps, one column for each prompt. Decisions are the
    trace's own. A step that measured nothing stands on a strip below zero.
    """

    name: str = "metric_traces"
    title: str = "Metric and decisions, step by step"
    settings: tuple[str, ...] = ()
    prompt_ids: tuple[str, ...] = ()
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.count >= 1, "count", "a whole number from 1")

    def draw(self, results: Results) -> Drawn | None:
        prompts = select(results, "prompt_id", self.prompt_ids, self.count)
        settings = [name for name in select(results, "setting", self.settings) if name != BASELINE]
        traces = {(name, prompt): _stages(results, name, prompt) for name in settings for prompt in prompts}
        panels = {name: list(dict.fromkeys(s for p in prompts for s in traces[name, p])) for name in settings}
        panels = {name: stages for name, stages in panels.items() if any(_measured(traces[name, p]) for p in prompts)}
        if not panels:
            return None

        width = COLUMN if len(prompts) == 1 else PAGE
        room = width / len(prompts) - MARGINS - (max(map(text_width, prompts)) if len(prompts) > 1 else 0)
        headings = {name: wrap(name, room, weight="bold") for name in panels}
        rows = [(name, stage) for name, stages in panels.items() for stage in stages]
        height = len(rows) * PANEL + LINE * sum(len(lines) + 0.6 for lines in headings.values()) + 0.75
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(len(rows), len(prompts), sharex=True, sharey="row", squeeze=False)
        for (name, stage), row in zip(rows, axes, strict=True):
            parts = [traces[name, prompt].get(stage) for prompt in prompts]
            top = max(_top(part) for part in parts if part is not None)
            for ax, part in zip(row, parts, strict=True):
                _panel(ax, part, top)
            row[0].set_ylabel(stage)
            if stage == panels[name][0]:
                row[0].set_title("\n".join(headings[name]), loc="left", weight="bold", x=0)
        if len(prompts) > 1:
            for prompt, ax in zip(prompts, axes[0], strict=True):
                ax.set_title(prompt, loc="right", color=GREY)
        for ax in axes[-1]:
            ax.set_xlabel("denoising step")
        figure.supylabel("metric of the stage (relative L1 change)", size=8)
        figure.legend(handles=_legend(), **LEGEND, ncols=5)
        return Drawn(figure, _caption(results, prompts, panels))


def timeline(trace: pd.DataFrame) -> Figure:
    """One run of one image, a panel for each stage, drawn inside `styled()`: also of a method that measures nothing.

    Args:
        trace: `handle.trace.to_pandas()` of one run or more, of which the first is shown; it has a row.
    """
    stages = _by_stage(trace)
    figure = Figure(figsize=(COLUMN, len(stages) * PANEL + 0.95), layout="constrained")
    axes = figure.subplots(len(stages), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (stage, rows) in zip(axes, stages.items(), strict=True):
        _panel(ax, rows, _top(rows))
        ax.set_ylabel(stage)
        if not _measured({stage: rows}):
            ax.set_yticks([])
    axes[-1].set_xlabel("denoising step")
    if _measured(stages):
        figure.supylabel("metric", size=8)
    figure.legend(handles=_legend(), **LEGEND, ncols=3)
    return figure


def _caption(results: Results, prompts: list[str], panels: dict[str, list[str]]) -> str:
    accumulates = "TeaCache" in set(results.frame.loc[results.frame["setting"].isin(panels), "method"])
    return (
        "What each stage compared with its threshold (dashed) at each denoising step, and what it decided: computed, "
        "hit, hit forced by the stage above it, warm-up. Steps that measured nothing stand on the strip below zero. "
        + ("TeaCache compares the sum of its rescaled metric since the last computed step. " if accumulates else "")
        + f"Prompt{'s' if len(prompts) > 1 else ''} {', '.join(prompts)}."
    )


def _stages(results: Results, setting: str, prompt_id: str) -> dict[str, pd.DataFrame]:
    """Stage to its rows, of one run and its first context and sample; empty without a trace."""
    row = row_of(results, setting, prompt_id)
    if row is None or row["trace"] is None or pd.isna(row["trace"]):
        return {}
    try:
        trace = pd.read_csv(row["trace"], dtype={"context": str}, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        advice = "delete it and run the experiment again"
        raise UserError(f"cannot read the trace {row['trace']}: {error}; {advice}") from error
    return _by_stage(trace)


def _by_stage(trace: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Stage to its rows in a trace, of one run and its first context and sample."""
    same = trace.groupby(["run", "context", "sample"], sort=False, dropna=False).ngroup() == 0
    return dict(iter(trace[same].groupby("stage", sort=False)))


def _measured(stages: dict[str, pd.DataFrame]) -> bool:
    return any(rows["diff"].notna().any() for rows in stages.values())


def _top(rows: pd.DataFrame) -> float:
    """The upper end of a panel that holds the metric and the threshold."""
    values = rows[["diff", "threshold"]].to_numpy(dtype=float)
    return 1.12 * max([*values[np.isfinite(values)], 1e-9])


def _panel(ax: Axes, rows: pd.DataFrame | None, top: float) -> None:
    ax.set_ylim(1.6 * STRIP * top, top)
    ax.yaxis.set_major_locator(MaxNLocator(3))
    if rows is None:
        return
    diff = rows["diff"].to_numpy(dtype=float)
    threshold = rows["threshold"].to_numpy(dtype=float)
    ax.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    steps = rows["step"].to_numpy()
    ax.plot(steps, diff, color=GREY, linewidth=0.7, zorder=1, gid="metric")
    ax.plot(steps, threshold, **THRESHOLD, zorder=2, gid="threshold")
    shown = np.where(np.isfinite(diff), diff, STRIP * top)
    for decision, mark in MARKS.items():
        chosen = (rows["decision"] == decision).to_numpy()
        if chosen.any():
            ax.scatter(steps[chosen], shown[chosen], zorder=3, gid=decision, **_strokes(mark))
    if np.isfinite(threshold).any():
        ax.annotate(
            f"{threshold[np.isfinite(threshold)][-1]:g}",
            (1, threshold[np.isfinite(threshold)][-1]),
            (2, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            size=7,
        )


def _strokes(mark: Mark) -> dict:
    """Arguments of `scatter`. A marker without a face, such as a bar, has no edge of its own either."""
    strokes = {"marker": mark.marker, "s": mark.size, "linewidths": 0.8}
    if mark.marker not in MarkerStyle.filled_markers:
        return strokes | {"color": mark.colour}
    return strokes | {"edgecolors": mark.colour, "facecolors": mark.colour if mark.filled else "white"}


def _legend() -> list[Line2D]:
    handles = [
        Line2D(
            *([], []),
            linestyle="none",
            marker=mark.marker,
            markersize=mark.size**0.5 + 0.5,
            markeredgecolor=mark.colour,
            markerfacecolor=mark.colour if mark.filled else "white",
            markeredgewidth=0.8,
            label=mark.label,
        )
        for mark in MARKS.values()
    ]
    return [*handles, Line2D([], [], **THRESHOLD, label="threshold")]
