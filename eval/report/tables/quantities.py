"""What a table can show of a setting, where it stands in a frame of results, and how it is put into a cell."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from h2cache.eval.metrics.registry import BASELINE_IMAGE, UNCACHED_IMAGE, Kind, kind
from h2cache.eval.report.results import BASELINE, KEY, Results
from h2cache.eval.report.tables.statistics import Ratio, Summary, ratio, summarize

FAILED = "failed"  # no image was made
ABSENT = "n/a"  # could not be measured
MEANINGLESS = "–"  # nothing to measure here


@dataclass(frozen=True)
class Comparison:
    """How a ratio to the baseline is shown. `of` is monotonic, so that it takes an interval to an interval."""

    name: str
    of: Callable[[float], float]
    text: Callable[[float], str]


SPEEDUP = Comparison("speedup", lambda times: 1 / times if times else math.inf, lambda speedup: f"{speedup:.2f}x")
CHANGE = Comparison("change_percent", lambda share: 100 * (share - 1), lambda percent: f"{percent:+.2f} %")


@dataclass(frozen=True)
class Quantity:
    """`name` is its name in a CSV, `label` its header; `of` takes rows of a frame to their values."""

    name: str
    label: str
    of: Callable[[pd.DataFrame], pd.Series]
    text: Callable[[float], str]
    comparison: Comparison | None = None
    against_baseline: bool = False  # the baseline is the reference
    absent: str = ABSENT


@dataclass(frozen=True)
class Cell:
    """One quantity of one setting: its numbers, and what a table shows of them."""

    summary: Summary
    ratio: Ratio | None
    text: str
    comparison_text: str

    @property
    def whole_text(self) -> str:
        return f"{self.text} ({self.comparison_text})" if self.comparison_text else self.text


def _column(name: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda frame: frame[name]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


TOTAL = Quantity("total_seconds", "time, s (speedup)", _column("total_seconds"), lambda s: f"{s:.2f}", SPEEDUP)
DENOISING = replace(TOTAL, name="denoising_seconds", of=_column("denoising_seconds"))
TIMES = {"end_to_end": TOTAL, "denoising": DENOISING}
COMPUTED = Quantity("computed_fraction", "computed", _column("computed_fraction"), _percent)
EVALUATIONS = Quantity("evaluations", "evaluations", _column("evaluations"), lambda count: f"{count:.1f}")
MEMORY = Quantity("peak_memory_bytes", "peak memory, GB", _column("peak_memory_bytes"), lambda b: f"{b / 1e9:.2f}")


def metric(name: str) -> Quantity:
    """Metrics that judge an image by itself are compared with the baseline's, others already are."""
    found: Kind = kind(name)
    text = _percent if found.form == "%" else (lambda value: f"{value:{found.form}}")
    comparison = CHANGE if not found.needs_reference and found.has_zero and found.form != "%" else None
    absent = MEANINGLESS if found.reference == UNCACHED_IMAGE else ABSENT
    return Quantity(name, found.label, _column(name), text, comparison, found.reference == BASELINE_IMAGE, absent)


def hit_rate(stage: str) -> Quantity:
    def of(frame: pd.DataFrame) -> pd.Series:
        return frame["hit_rates"].map(lambda rates: rates.get(stage, math.nan) if isinstance(rates, dict) else math.nan)

    return Quantity(f"hit_rate.{stage}", stage, of, _percent, absent=MEANINGLESS)


@dataclass(frozen=True)
class Measured:
    """Results by setting, every prompt at its place, whatever the order of the frame's rows."""

    groups: dict[str, pd.DataFrame]
    prompts: int

    @classmethod
    def of(cls, results: Results) -> "Measured":
        """Settings in the order of the categories if `setting` has some, else in that of their first rows.

        A category without a row is a setting that failed everywhere. ValueError if a setting has a prompt twice.
        """
        frame = results.frame
        if frame.duplicated(["setting", *KEY]).any():
            raise ValueError(f"{results.name}: a setting has the same prompt and seed twice")
        column = frame["setting"]
        names = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column.unique()
        groups = {name: frame[column == name].set_index(KEY).sort_index() for name in names}
        return cls(groups, prompts=len(frame[KEY].drop_duplicates()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def failed(self, setting: str) -> bool:
        """Whether it made no image."""
        return summarize(self.groups[setting]["total_seconds"]).n == 0

    def incomplete(self, setting: str) -> bool:
        return summarize(self.groups[setting]["total_seconds"]).n < self.prompts

    def cell(self, setting: str, quantity: Quantity) -> Cell:
        group = self.groups[setting]
        values = quantity.of(group).astype(np.float64)
        summary = summarize(values)
        compared = None
        if quantity.comparison and BASELINE in self.groups:
            compared = ratio(values, quantity.of(self.groups[BASELINE]).astype(np.float64))
        text, comparison = self._text(setting, quantity, summary), _compared(quantity, summary, compared)
        return Cell(summary, compared, text, comparison)

    def _text(self, setting: str, quantity: Quantity, summary: Summary) -> str:
        if self.failed(setting):
            return FAILED
        if quantity.against_baseline and setting == BASELINE:
            return MEANINGLESS
        if summary.count == 0:
            return quantity.absent
        text = quantity.text(summary.mean) if summary.n else "identical"
        if summary.n and summary.infinite:
            text += f" ({summary.infinite} identical)"
        return text if summary.count == self.prompts else f"{text} [n = {summary.count} of {self.prompts}]"


def _compared(quantity: Quantity, summary: Summary, compared: Ratio | None) -> str:
    """Empty where there is nothing to compare."""
    if compared is None or math.isnan(compared.value):
        return ""
    text = quantity.comparison.text(quantity.comparison.of(compared.value))
    return text if compared.n == summary.n else f"{text}, n = {compared.n}"


def hit_rates(measured: Measured) -> tuple[Quantity, ...]:
    """One for each stage that any setting has, in the order in which they run."""
    dicts = (rates for group in measured.groups.values() for rates in group["hit_rates"] if isinstance(rates, dict))
    return tuple(hit_rate(stage) for stage in dict.fromkeys(stage for rates in dicts for stage in rates))


def numbers(cell: Cell, quantity: Quantity) -> dict[str, float | int]:
    """All of a cell's numbers under their names in a CSV."""
    name, summary = quantity.name, cell.summary
    found: dict[str, float | int] = {
        f"{name}_n": summary.n,
        f"{name}_mean": summary.mean,
        f"{name}_std": summary.std,
        f"{name}_median": summary.median,
        f"{name}_p95": summary.p95,
        f"{name}_ci95_low": summary.low,
        f"{name}_ci95_high": summary.high,
    }
    if quantity.name.partition("@")[0] == "psnr":
        found[f"{name}_identical"] = summary.infinite
    if cell.ratio is not None:
        comparison = f"{name}_{quantity.comparison.name}"
        ends = sorted(quantity.comparison.of(end) for end in (cell.ratio.low, cell.ratio.high))
        found |= {
            f"{comparison}_n": cell.ratio.n,
            comparison: quantity.comparison.of(cell.ratio.value),
            f"{comparison}_ci95_low": ends[0],
            f"{comparison}_ci95_high": ends[1],
        }
    return found
