"""What figures put on their axes: numbers per image, their label, and what a setting's images add up to.

The summaries are those of the tables (`h2cache.eval.report.tables.statistics`), so that both show the same numbers.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from h2cache.eval.errors import UserError
from h2cache.eval.metrics.registry import kind
from h2cache.eval.report.results import KEY, Results
from h2cache.eval.report.tables.statistics import ratio, summarize

# To the time that is compared; the names are those of GridTable.
SPEEDUPS = {"speedup": "total_seconds", "denoising_speedup": "denoising_seconds"}
HIT_RATE = "hit_rate."  # hit_rate.structure: the fraction of hits (forced ones included) of that stage
LABELS = {
    "speedup": "end-to-end speedup",
    "denoising_speedup": "denoising speedup",
    "computed_fraction": "blocks computed",
    "evaluations": "model evaluations",
    "total_seconds": "time, s",
    "text_seconds": "text encoding, s",
    "denoising_seconds": "denoising, s",
    "vae_seconds": "VAE, s",
    "peak_memory_bytes": "peak memory, GB",
}
FORMS = {  # shorter than in tables
    "psnr": ".1f",
    "psnr_frames": ".1f",
    "psnr_worst_frame": ".1f",
    "flicker": ".2f",
    "evaluations": ".1f",
    "computed_fraction": "%",
}
FIELD_LABELS = {"tau1": "τ₁", "tau2": "τ₂", "sigma": "σ"}


@dataclass(frozen=True)
class Measured:
    """A summary over images, with its 95 % confidence interval (NaN where it is unknown)."""

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Measure:
    """`values`: one number for each row of the frame, NaN where there is none. `of`: some rows of it to their summary.

    A mean is over finite values, and infinite only where all are: an infinite PSNR is an image identical to the
    baseline's.
    """

    name: str
    label: str
    values: pd.Series
    of: Callable[[pd.DataFrame], Measured]
    form: str  # a format specification, or "%" for whole percents
    more_is_better: bool

    @property
    def measured(self) -> bool:
        return bool(self.values.notna().any())

    def format(self, value: float) -> str:
        if math.isnan(value):
            return "n/a"
        if math.isinf(value):
            return "∞"
        return f"{100 * value:.0f} %" if self.form == "%" else f"{value:{self.form}}"


def measure(results: Results, name: str) -> Measure:
    """The measure called `name`: a metric, a column of LABELS, one of SPEEDUPS, or `hit_rate.STAGE`.

    A speedup is the ratio of mean times over the prompts that both setting and baseline have; all else is averaged.
    UserError if the experiment has none of that name.
    """
    frame = results.frame
    if name in results.metrics:
        about = kind(name)
        values = frame[name].astype(float) if name in frame else pd.Series(math.nan, frame.index)
        form = FORMS.get(about.metric, "%" if about.form == "%" else ".3f")
        return Measure(name, about.label, values, _mean(values), form, not about.lower_is_better)
    if name in SPEEDUPS:
        column = SPEEDUPS[name]
        times = results.baseline[column].to_dict()
        keys = pd.MultiIndex.from_frame(frame[KEY])
        before = pd.Series([times.get(key, math.nan) for key in keys], frame.index, dtype=float)
        values = before / frame[column].astype(float)
        return Measure(name, LABELS[name], values, _speedup(results, column), ".2f", True)
    if name.startswith(HIT_RATE):
        stage = name.removeprefix(HIT_RATE)
        rates = pd.Series([rates.get(stage, math.nan) for rates in frame["hit_rates"]], frame.index, dtype=float)
        return Measure(name, f"hit rate of {stage}", rates, _mean(rates), "%", True)
    if name not in LABELS or name not in frame:
        known = ", ".join((*results.metrics, *LABELS, f"{HIT_RATE}STAGE"))
        raise UserError(f"{results.name} has no measure {name!r} to draw; it has {known}")
    values = frame[name].astype(float) / (1e9 if name.endswith("_bytes") else 1)
    return Measure(name, LABELS[name], values, _mean(values), FORMS.get(name, ".2f"), False)


def _mean(values: pd.Series) -> Callable[[pd.DataFrame], Measured]:
    def of(rows: pd.DataFrame) -> Measured:
        summary = summarize(values[rows.index].set_axis(pd.MultiIndex.from_frame(rows[KEY])))
        all_infinite = summary.infinite > 0 and summary.n == 0
        return Measured(math.inf if all_infinite else summary.mean, summary.low, summary.high)

    return of


def _speedup(results: Results, column: str) -> Callable[[pd.DataFrame], Measured]:
    baseline = results.baseline[column]

    def of(rows: pd.DataFrame) -> Measured:
        times = ratio(rows.set_index(KEY)[column], baseline)
        return Measured(1 / times.value, 1 / times.high, 1 / times.low)

    return of


def best_setting(
    results: Results, groups: Mapping[Hashable, pd.DataFrame], name: str, as_fast_as: Hashable
) -> Hashable | None:
    """The key of the group with the best measure `name` among those that denoise at least as fast as one of them.

    The first of equals; None where that one is not there or none has a value. NaN is no value.
    """
    if as_fast_as not in groups:
        return None
    speed, each = measure(results, "denoising_speedup"), measure(results, name)
    floor = speed.of(groups[as_fast_as]).value
    values = {key: each.of(rows).value for key, rows in groups.items() if speed.of(rows).value >= floor}
    known = {key: value for key, value in values.items() if not math.isnan(value)}
    return (max if each.more_is_better else min)(known, key=known.get, default=None)


def measures_of(results: Results, names: Sequence[str]) -> list[Measure]:
    """Those of the measures that something was measured of."""
    return [each for name in names if (each := measure(results, name)).measured]


def described(measures: Sequence[Measure], row: pd.Series) -> str:
    """The measures of one image that it has, as words: 'PSNR 30.1 dB, SSIM 0.982'."""
    values = [(each, float(each.values[row.name])) for each in measures]
    return ", ".join(_worded(each.label, each.format(value)) for each, value in values if not math.isnan(value))


def _worded(label: str, value: str) -> str:
    """'PSNR 30.1 dB' of 'PSNR, dB' and '30.1'."""
    name, _, unit = label.partition(", ")
    return f"{name} {value} {unit}".strip()
