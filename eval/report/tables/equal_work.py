"""What each method gives at equal work: its quality there, and how far behind the best one it is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from h2cache.eval.errors import UserError
from h2cache.eval.metrics.registry import kind
from h2cache.eval.report.results import BASELINE, KEY, Artifact, Results
from h2cache.eval.report.tables.quantities import MEANINGLESS, Measured
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import SEED, Summary, summarize
from h2cache.eval.report.tables.summary import compared_with, means_over

LESS = {
    "evaluations": "fewer evaluations",
    "denoising_seconds": "less denoising time",
    "total_seconds": "less time",
}
TOLERANCE = 0.01  # a setting that is this much slower counts as being there
DRAWS = 1000  # of the bootstrap
KNOWN = 0.9  # of the draws, which must have a ratio for it to have an interval


@dataclass(frozen=True)
class Curve:
    """The settings of a method that none of its own beats in both work and mean quality.

    gains: how many times less work than the baseline's, ascending, (S,). quality: of each prompt, (S, P).
    """

    gains: np.ndarray
    quality: np.ndarray

    @classmethod
    def of(cls, work: np.ndarray, quality: np.ndarray, baseline: np.ndarray) -> "Curve":
        """Of all settings' work and quality, both (S, P), and the baseline's work (P,)."""
        gains, means = baseline.mean() / work.mean(axis=1), quality.mean(axis=1)
        fastest_first = np.lexsort((means, gains))[::-1]
        best = np.maximum.accumulate(means[fastest_first])
        kept = fastest_first[np.append(True, np.diff(best) > 0)][::-1]
        return cls(gains[kept], quality[kept])

    def at(self, gain: float) -> np.ndarray | None:
        """(P,) at this gain, linear in its logarithm between two settings; that of the slowest where all are faster.

        None where none is so fast.
        """
        if gain > self.gains[-1] * (1 + TOLERANCE):
            return None
        weights = [np.interp(np.log(gain), np.log(self.gains), each) for each in np.eye(len(self.gains))]
        return np.array(weights) @ self.quality

    def gain_at(self, quality: float) -> float:
        """Where its mean quality is this; its fastest setting's where all have more, NaN where all have less."""
        means = self.quality.mean(axis=1)[::-1]
        return float(np.exp(np.interp(quality, means, np.log(self.gains[::-1]), right=np.nan)))


def times_faster(champion: Curve, rival: Curve, gain: float) -> float:
    """The champion's gain at the mean quality that the rival has at `gain`, over that gain; NaN where there is none."""
    there = rival.at(gain)
    return math.nan if there is None else champion.gain_at(float(there.mean())) / gain


@dataclass(frozen=True)
class Table:
    """Of each method the work and the quality of its complete settings, both (S, P); the baseline's work, (P,).

    `incomplete` settings have no finite value on some prompt.
    """

    methods: Mapping[str, tuple[np.ndarray, np.ndarray]]
    baseline: np.ndarray
    incomplete: tuple[str, ...]

    @classmethod
    def of(cls, results: Results, work: str, quality: str) -> "Table | None":
        """None without a baseline, or where no other setting is complete."""
        frame = results.frame.astype({"setting": str})
        tables = [frame.pivot(index="setting", columns=KEY, values=name).astype(float) for name in (work, quality)]
        if BASELINE not in tables[0].index:
            return None
        tables = [table.loc[:, tables[0].loc[BASELINE].notna()] for table in tables]
        complete = np.logical_and(*(np.isfinite(table).all(axis=1) for table in tables))
        families = frame.drop_duplicates("setting").set_index("setting")["method"].drop(BASELINE)
        incomplete = tuple(name for name in families.index if not complete[name])
        families = families.drop(list(incomplete))
        if not len(families):
            return None
        tables = [table.T.groupby(level=0).mean().T for table in tables]  # several seeds of a prompt are one value
        methods = {
            method: tuple(table.loc[families.index[families == method]].to_numpy() for table in tables)
            for method in families.unique()
        }
        return cls(methods, tables[0].loc[BASELINE].to_numpy(), incomplete)

    def curve(self, method: str, prompts: np.ndarray | slice = slice(None)) -> Curve:
        """On some of the prompts, or on some more than once."""
        work, quality = self.methods[method]
        return Curve.of(work[:, prompts], quality[:, prompts], self.baseline[prompts])

    def times_faster(self, champion: str, rival: str, gain: float) -> tuple[float, float, float]:
        """With the ends of its 95 % interval: percentiles of a bootstrap over prompts, the same ones for both."""
        value, count = times_faster(self.curve(champion), self.curve(rival), gain), len(self.baseline)
        if math.isnan(value) or count < 2:
            return value, math.nan, math.nan
        rows = np.random.default_rng(SEED).integers(count, size=(DRAWS, count))
        drawn = np.array([times_faster(self.curve(champion, row), self.curve(rival, row), gain) for row in rows])
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) >= KNOWN * DRAWS else (math.nan, math.nan)
        return value, float(low), float(high)


@dataclass(frozen=True)
class EqualWork:
    """Each method's `quality`, a metric of which more is better, at 1/`at` of the baseline's `work`; the best first.

    A method is at its best settings, interpolated between two of them. Differences from `champion` are by prompt. The
    last column says how many times faster the champion is at the quality that the method has at `compared_at`.
    """

    name: str
    work: str = "evaluations"
    quality: str = "psnr"
    at: tuple[float, ...] = (3.0, 4.0, 6.0)
    compared_at: float = 4.0
    champion: str = "Plan"

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        if self.work not in LESS:
            raise UserError(f"EqualWork: work={self.work!r} is not allowed; choose {', '.join(LESS)}")
        if self.compared_at not in self.at:
            raise UserError(f"EqualWork: compared_at={self.compared_at} is not allowed; choose {self.at}")

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None without a baseline or a complete setting."""
        if self.quality not in results.metrics:
            raise UserError(f"EqualWork: {results.name} does not measure {self.quality}; add it to its metrics")
        table = Table.of(results, self.work, self.quality)
        if table is None:
            return None
        rows = [self._row(table, method) for method in table.methods]
        data = pd.DataFrame(rows).sort_values([self._column(x) for x in (self.compared_at, *self.at)], ascending=False)
        header = ("method", *(f"at {gain:g}x" for gain in self.at), "fastest setting", f"times faster: {self.champion}")
        texts = tuple(self._texts(row) for row in data.to_dict("records"))
        quantity, comma, unit = kind(self.quality).label.partition(", ")
        title = f"{quantity} at equal {LESS[self.work].partition(' ')[2]}{comma}{unit}"
        sheet = Sheet(title, header, texts, tuple(self._notes(results, table)))
        return sheet.write(data, folder, self.name, results.name)

    def _column(self, gain: float) -> str:
        return f"{self.quality}_at_{gain:g}x"

    def _row(self, table: Table, method: str) -> dict[str, float | str]:
        curve = table.curve(method)
        row: dict[str, float | str] = {"method": method}
        champion = table.curve(self.champion) if self.champion in table.methods and method != self.champion else None
        for gain in self.at:
            own, best = curve.at(gain), champion and champion.at(gain)
            row |= _numbers(self._column(gain), own)
            row |= _numbers(f"difference_at_{gain:g}x", None if own is None or best is None else own - best)
        names = ("times_faster", "times_faster_low", "times_faster_high")
        ratios = table.times_faster(self.champion, method, self.compared_at) if champion else (math.nan,) * 3
        row |= dict(zip(names, ratios, strict=True))
        row["at_least"] = bool(champion and champion.quality[-1].mean() > row[self._column(self.compared_at)])
        return row | {"fastest": float(curve.gains[-1]), "fastest_quality": float(curve.quality[-1].mean())}

    def _texts(self, row: Mapping[str, float]) -> tuple[str, ...]:
        cells = [_cell(row, self._column(gain), f"difference_at_{gain:g}x") for gain in self.at]
        faster = MEANINGLESS
        if not math.isnan(row["times_faster"]):
            faster = "≥ " * row["at_least"] + f"{row['times_faster']:.2f}"
            if not math.isnan(row["times_faster_low"]):
                faster += f" ({row['times_faster_low']:.2f} to {row['times_faster_high']:.2f})"
        return row["method"], *cells, f"{row['fastest']:.1f}x, {row['fastest_quality']:.1f}", faster

    def _notes(self, results: Results, table: Table) -> list[str]:
        notes = [f"Left out: {name} ({reason})." for name, reason in results.left_out.items()]
        if table.incomplete:
            notes.append(f"Left out, without a finite value on every prompt: {'; '.join(table.incomplete)}.")
        return [
            f"{means_over(results, Measured.of(results))}.",
            compared_with(results, [self.quality]),
            f"Times {LESS[self.work]} than the baseline; between two settings of a method it is interpolated over "
            f"the logarithm of the work, and {MEANINGLESS} is what its settings do not reach.",
            f"In brackets: the difference from {self.champion}, by prompt, with the 95 % interval of its mean.",
            f"Times faster: {LESS[self.work]} that {self.champion} takes for the quality that the method has at "
            f"{self.compared_at:g}x, with the 95 % interval; ≥ where even its fastest setting is better.",
            *notes,
        ]


def _numbers(name: str, values: np.ndarray | None) -> dict[str, float]:
    found: Summary = summarize(pd.Series([] if values is None else values, dtype=float))
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _cell(row: Mapping[str, float], name: str, difference: str) -> str:
    """44.7 (-10.1, -11.9 to -8.3)"""
    if math.isnan(row[name]):
        return MEANINGLESS
    if math.isnan(row[difference]):
        return f"{row[name]:.1f}"
    ends = "" if math.isnan(row[f"{difference}_low"]) else ", {:+.1f} to {:+.1f}"
    ends = ends.format(row[f"{difference}_low"], row[f"{difference}_high"])
    return f"{row[name]:.1f} ({row[difference]:+.1f}{ends})"
