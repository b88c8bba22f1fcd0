"""A run's trace as a picture in the terminal: what each stage did at each denoising step, and why."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

RULER = 10  # steps between two numbers above the cells; rows break at its multiples


@dataclass(frozen=True)
class Look:
    """How a decision is drawn. The glyphs alone tell the decisions apart, with or without colour or Unicode."""

    glyph: str
    ascii: str
    style: str
    meaning: str


LOOKS = {
    "warmup": Look("▓", "W", "yellow", "warm-up"),
    "compute": Look("█", "#", "red", "computed"),
    "hit": Look("·", ".", "green", "hit"),
    "forced": Look("-", "-", "cyan", "forced"),
}
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "12345678"  # the first half is below the threshold
METRIC_COLUMNS = ("threshold", "median", "metric range")


@dataclass(frozen=True)
class Timeline:
    """A rich renderable of one run's trace: `handle.trace.to_pandas()` of a batch of one, restricted to one run.

    A stage gets a row of cells, one for each denoiser call, and a row of bars, the probe's metric against its threshold
    where there is one: a bar of half the height or less is below the threshold. Both wrap at the terminal's width.
    """

    trace: pd.DataFrame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        stages = {stage: rows for stage, rows in self.trace.groupby("stage", sort=False)}
        label_width = max(map(len, [*stages, "metric"])) + 2
        row_length = max(1, (options.max_width - label_width) // RULER) * RULER
        calls = max(map(len, stages.values()))
        for start in range(0, calls, row_length):
            stop = min(start + row_length, calls)
            yield Text(" " * label_width + _ruler(start, stop), style="dim", no_wrap=True)
            for stage, rows in stages.items():
                part = rows.iloc[start:stop]
                yield _row(stage, "bold", label_width, cells(part, options.ascii_only))
                if part["diff"].notna().any():
                    yield _row("metric", "dim", label_width, bars(part, options.ascii_only))
            yield ""
        yield _legend(options.ascii_only, self.trace)


def cells(rows: pd.DataFrame, ascii_only: bool = False) -> Iterator[tuple[str, str]]:
    """(glyph, style) of each row's decision."""
    for decision in rows["decision"]:
        look = LOOKS[decision]
        yield (look.ascii if ascii_only else look.glyph), look.style


def bars(rows: pd.DataFrame, ascii_only: bool = False) -> Iterator[tuple[str, str]]:
    """(bar, style) of each row's metric; blank where the probe was not compared.

    The full height is twice the threshold and more, so that the half that a bar ends in is the decision it asks for.
    """
    glyphs = ASCII_BARS if ascii_only else BARS
    top = len(glyphs) - 1
    for diff, threshold, decision in zip(rows["diff"], rows["threshold"], rows["decision"], strict=True):
        if pd.isna(diff):
            yield " ", ""
            continue
        height = diff / threshold * len(glyphs) / 2 if threshold > 0 else math.inf
        yield glyphs[int(min(height, top))], f"{LOOKS[decision].style} dim"


def decision_table(trace: pd.DataFrame) -> Table:
    """How often each stage decided what, its metric beside the threshold, and the sigma that its forecasts took."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for look in LOOKS.values():
        table.add_column(look.meaning, justify="right", style=look.style)
    measures = trace["diff"].notna().any()
    forecasts = trace["sigma"].notna().any()
    for name in (*(METRIC_COLUMNS if measures else ()), *(("sigma",) if forecasts else ())):
        table.add_column(name, justify="right")
    for stage, rows in trace.groupby("stage", sort=False):
        counts = rows["decision"].value_counts()
        cells = [stage, *(str(counts.get(decision, 0)) for decision in LOOKS)]
        if measures:
            diff, limit = rows["diff"].dropna(), rows["threshold"].iloc[-1]
            cells += [f"{limit:g}", f"{diff.median():.3f}", _range(diff, 3)] if len(diff) else [""] * 3
        if forecasts:
            cells += [_range(rows["sigma"].dropna(), 2)]
        table.add_row(*cells)
    return table


def _range(values: pd.Series, digits: int) -> str:
    """From the smallest to the largest, once where they are the same; empty where there are none."""
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (values.min(), values.max()) if len(values)))


def _row(label: str, style: str, width: int, cells: Iterator[tuple[str, str]]) -> Text:
    return Text(label.ljust(width), style=style, no_wrap=True).append_tokens(cells)


def _ruler(start: int, stop: int) -> str:
    return "".join(str(step).ljust(RULER) for step in range(start, stop, RULER)).rstrip()


def _legend(ascii_only: bool, trace: pd.DataFrame) -> Text:
    legend = Text()
    for look in LOOKS.values():
        legend.append(look.ascii if ascii_only else look.glyph, look.style).append(f" {look.meaning}   ")
    if trace["diff"].notna().any():
        glyphs = ASCII_BARS if ascii_only else BARS
        half = len(glyphs) // 2
        legend.append(f"\n{glyphs[:half]} metric below the threshold   {glyphs[half:]} above it", style="dim")
    return legend
