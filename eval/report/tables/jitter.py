"""What pooling a probe is worth at equal work: fidelity, and how unsteady the metric is that decides."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from h2cache.eval.report.results import BASELINE, KEY, Artifact, Results
from h2cache.eval.report.tables.quantities import MEANINGLESS
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import Summary, summarize


@dataclass(frozen=True)
class JitterTable:
    """For each setting the blocks computed, PSNR, its difference from the first setting's, and the metric's jitter.

    Jitter is the mean absolute second difference of a stage's metric over three steps in a row, relative to the mean of
    the metric at these; only steps that were compared with the same reference count. Everything is of one image, and
    then averaged over images.
    """

    name: str = "equal_work"
    title: str = "Pooling at equal work"

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None with fewer than two settings."""
        frame = results.frame[(results.frame["setting"] != BASELINE) & results.frame["trace"].notna()]
        groups = {name: rows.set_index(KEY) for name, rows in frame.groupby("setting", sort=False, observed=True)}
        if len(groups) < 2:
            return None
        first = next(iter(groups))
        jitters = {
            name: pd.DataFrame([jitter(pd.read_csv(path)) for path in rows["trace"]], rows.index)
            for name, rows in groups.items()
        }
        stages = list(dict.fromkeys(stage for each in jitters.values() for stage in each))
        changes = {name: _finite(rows["psnr"] - groups[first]["psnr"]) for name, rows in groups.items()}
        table = []
        for name, rows in groups.items():
            table.append(
                (
                    name,
                    f"{100 * rows['computed_fraction'].mean():.1f} %",
                    f"{_finite(rows['psnr']).mean:.2f}",
                    MEANINGLESS if name == first else _change(changes[name]),
                    *(_jitter(jitters[name], stage) for stage in stages),
                )
            )
        header = ("setting", "computed", "PSNR, dB", f"against {first}, dB", *(f"jitter, {stage}" for stage in stages))
        notes = (
            _sentence(first, changes, jitters, stages),
            "In brackets: 95 % intervals over the same images. Jitter: mean absolute second difference of the metric "
            "over steps with the same reference, relative to its mean; n is the number of images that have such steps.",
        )
        kept = {name: rows[["computed_fraction", "psnr"]] for name, rows in groups.items()}
        data = pd.concat([kept[name].join(jitters[name]).assign(setting=name) for name in groups])
        return Sheet(self.title, header, tuple(table), notes).write(data.reset_index(), folder, self.name, results.name)


def jitter(trace: pd.DataFrame) -> dict[str, float]:
    """Of each stage that measured, over all runs of a trace; NaN where no three steps in a row shared a reference."""
    found = {}
    for stage, rows in trace[trace["diff"].notna()].groupby("stage", sort=False):
        bends, levels = [], []
        for _, run in rows.groupby(["run", "context", "sample"], dropna=False):
            steps, metric = run["step"].to_numpy(), run["diff"].to_numpy(np.float64)
            kept = (run["decision"] == "hit").to_numpy()  # the reference of this step is that of the next one
            for k in range(len(steps) - 2):
                if kept[k] and kept[k + 1] and steps[k + 2] - steps[k] == 2:
                    bends.append(abs(metric[k] - 2 * metric[k + 1] + metric[k + 2]))
                    levels.append(metric[k : k + 3].mean())
        found[stage] = float(np.mean(bends) / np.mean(levels)) if levels else np.nan
    return found


def _finite(values: pd.Series) -> Summary:
    return summarize(values.replace([np.inf, -np.inf], np.nan).dropna())


def _change(change: Summary) -> str:
    if np.isnan(change.low):
        return f"{change.mean:+.2f}"
    return f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"


def _jitter(jitters: pd.DataFrame, stage: str) -> str:
    summary = summarize(jitters[stage].dropna()) if stage in jitters else Summary(0, *[np.nan] * 6)
    return f"{summary.mean:.3f} (n = {summary.n})" if summary.n else MEANINGLESS


def _sentence(first: str, changes: dict[str, Summary], jitters: dict[str, pd.DataFrame], stages: list[str]) -> str:
    """Which poolings change the fidelity beyond chance, and which way the jitter of the first stage goes."""
    others = [name for name in changes if name != first]
    better = [name for name in others if changes[name].low > 0]
    worse = [name for name in others if changes[name].high < 0]
    parts = [f"nearer to the baseline with {', '.join(better)}"] * bool(better)
    parts += [f"further from it with {', '.join(worse)}"] * bool(worse)
    verdict = (
        f"images are {' and '.join(parts)}" if parts else "no setting's images are nearer or further beyond chance"
    )
    steady = []
    for stage in stages:
        level = {name: jitters[name][stage].mean() for name in jitters if stage in jitters[name]}
        lower = sum(level[name] < level[first] for name in others if name in level) if first in level else 0
        steady.append(f"{lower} of {len(others)} in {stage}")
    return f"Against {first}, at equal work, {verdict}; the metric has less jitter in {', '.join(steady)}."
