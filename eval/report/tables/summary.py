"""One row a setting, in the form of the paper's table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.table import Table

from h2cache.eval.errors import UserError
from h2cache.eval.metrics.registry import (
    BASELINE_IMAGE,
    CONVERGED_IMAGE,
    TRUTH_IMAGE,
    UNCACHED_IMAGE,
    kind,
    set_metric,
)
from h2cache.eval.metrics.sets import SetScore
from h2cache.eval.report.results import BASELINE, Artifact, Results
from h2cache.eval.report.tables.quantities import (
    ABSENT,
    COMPUTED,
    DENOISING,
    EVALUATIONS,
    FAILED,
    MEANINGLESS,
    MEMORY,
    TIMES,
    TOTAL,
    Measured,
    Quantity,
    hit_rates,
    metric,
    numbers,
)
from h2cache.eval.report.tables.sheet import Sheet


@dataclass(frozen=True)
class SummaryTable:
    """Time `55.72 (1.00x)`, metrics such as `0.7688 (-0.07 %)`, the work done, and memory where it was measured.

    time: "end_to_end", with text encoding and VAE as in the paper's table, or "denoising"; the CSV has both.
    metrics: which of the experiment's to show, in this order; None for all that have a value. The CSV has all.
    Nothing is set in bold: the fastest setting is hardly ever the most faithful one, and a column's best says nothing.
    """

    name: str = "summary"
    title: str | None = None
    time: str = "end_to_end"
    metrics: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.time not in TIMES:
            raise UserError(f"SummaryTable: time={self.time!r} is not allowed; choose {' or '.join(TIMES)}")
        if self.metrics is not None:
            object.__setattr__(self, "metrics", tuple(self.metrics))

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None if no image was made."""
        measured = Measured.of(results)
        if all(measured.failed(setting) for setting in measured):
            return None
        sheet = self._sheet(results, measured, self._columns(results), hit_rates(measured))
        return sheet.write(self._data(results, measured), folder, self.name, results.name)

    def terminal(self, results: Results) -> Table:
        """The same rows for the end of a run, without hit rates and what nothing is known of: terminals are narrow."""
        measured = Measured.of(results)
        columns = self._columns(results)
        known = [
            q
            for q in columns
            if any(measured.cell(setting, q).whole_text not in (ABSENT, MEANINGLESS) for setting in measured)
        ]
        return self._sheet(results, measured, known, ()).to_rich()

    def _sheet(
        self, results: Results, measured: Measured, columns: Sequence[Quantity], stages: Sequence[Quantity]
    ) -> Sheet:
        labels = [*(quantity.label for quantity in columns), *(set_metric(name).label for name in results.set_scores)]
        header = ["setting", *labels, *(["hits"] if stages else [])]
        rows = []
        for setting in measured:
            cells = [measured.cell(setting, quantity).whole_text for quantity in columns]
            cells += [_of_the_set(name, scores.get(setting)) for name, scores in results.set_scores.items()]
            if stages:
                cells.append(_hits(measured, setting, stages))
            rows.append((setting, *cells))
        shown = results.metrics if self.metrics is None else self.metrics
        reasons = tuple(_reasons(results, (*shown, *results.set_metrics)))
        notes = tuple(self._notes(results, measured, shown))
        return Sheet(self.title or results.title, tuple(header), tuple(rows), notes, reasons=reasons)

    def _data(self, results: Results, measured: Measured) -> pd.DataFrame:
        """Everything that is known, a row a setting."""
        metrics = map(metric, results.metrics)
        quantities = [TOTAL, DENOISING, EVALUATIONS, COMPUTED, MEMORY, *hit_rates(measured), *metrics]
        rows = []
        for setting in measured:
            row: dict[str, object] = {"setting": setting, "prompts": measured.prompts}
            for quantity in quantities:
                row |= numbers(measured.cell(setting, quantity), quantity)
            for name, scores in results.set_scores.items():
                found = scores.get(setting, SetScore(0, math.nan))
                row |= {f"{name}_n": found.n, name: found.value}
                row |= {f"{name}_ci95_low": found.low, f"{name}_ci95_high": found.high}
            rows.append(row)
        return pd.DataFrame(rows)

    def _columns(self, results: Results) -> list[Quantity]:
        shown = results.metrics if self.metrics is None else self.metrics
        for name in shown:
            if name not in results.metrics:
                raise UserError(
                    f"SummaryTable: metric {name!r} is not measured by experiment {results.name}; "
                    f"add it to the experiment's metrics ({', '.join(results.metrics)}) or leave it out"
                )
        if self.metrics is None:  # what has no value at all is named below the table, and would make it too wide
            shown = [name for name in shown if not results.frame[name].isna().all()]
        memory = [MEMORY] if results.frame["peak_memory_bytes"].notna().any() else []
        return [TIMES[self.time], *map(metric, shown), EVALUATIONS, *memory]

    def _notes(self, results: Results, measured: Measured, shown: Sequence[str]) -> list[str]:
        what = "with text encoding and VAE" if self.time == "end_to_end" else "of denoising alone"
        notes = [f"{means_over(results, measured)}; time is {what}."]
        if BASELINE in measured.groups:
            notes.append("In brackets: against the baseline, over the same prompts.")
        notes.append("Evaluations: the multiply-adds that ran, in whole evaluations of the model.")
        notes += [compared_with(results, shown)] if any(kind(name).needs_reference for name in shown) else []
        if results.set_scores:
            names = ", ".join(set_metric(name).label for name in results.set_scores)
            notes.append(
                f"{names}: of all images as a set, from the baseline's of the same prompts; 0 is the same, in brackets "
                "the 95 % interval over resampled prompts."
            )
        notes += [f"Left out: {name} ({reason})." for name, reason in results.left_out.items()]
        return notes + notes_on_failures(measured, measured)


def means_over(results: Results, measured: Measured) -> str:
    """What all numbers of a table are."""
    prompts = f"{measured.prompts} prompt{'s' if measured.prompts != 1 else ''}"
    return f"Means over {prompts} on {results.model}, {results.machine}"


def compared_with(results: Results, metrics: Iterable[str]) -> str:
    """What each of the metrics that need a reference compares an image with, in a sentence."""
    images = {
        BASELINE_IMAGE: f"the baseline's image ({results.baseline_run})",
        UNCACHED_IMAGE: "the uncached image of the same scheduler and steps",
        CONVERGED_IMAGE: f"the converged solution ({results.converged_run})",
        TRUTH_IMAGE: "the ground truth",
    }
    compared: dict[str, list[str]] = {}
    for each in map(kind, metrics):
        if each.needs_reference:
            compared.setdefault(each.reference, []).append(each.short)
    return "; ".join(f"{', '.join(names)} against {images[reference]}" for reference, names in compared.items()) + "."


def _reasons(results: Results, shown: Iterable[str]) -> list[str]:
    """Why some metrics are n/a, each reason once."""
    lacking: dict[str, list[str]] = {}
    for name in shown:
        if name in results.unavailable:
            label = set_metric(name).label if name in results.set_metrics else metric(name).label
            lacking.setdefault(results.unavailable[name], []).append(label)
    return [f"n/a: {', '.join(labels)} ({reason})." for reason, labels in lacking.items()]


def notes_on_failures(measured: Measured, settings: Iterable[str]) -> list[str]:
    """Which of the settings lack images, by name."""
    lacking = [setting for setting in settings if measured.incomplete(setting)]
    failed = [setting for setting in lacking if measured.failed(setting)]
    partial = [setting for setting in lacking if setting not in failed]
    notes = [f"No image was made by: {', '.join(failed)}."] if failed else []
    if partial:
        notes.append(f"Some images are missing, so that the means are over fewer prompts: {', '.join(partial)}.")
    return notes


def _of_the_set(name: str, found: SetScore | None) -> str:
    """The score with its interval, as far as there are any: the baseline has none."""
    if found is None or math.isnan(found.value):
        return MEANINGLESS
    form = set_metric(name).form
    interval = "" if math.isnan(found.low) else f" ({found.low:{form}} to {found.high:{form}})"
    return f"{found.value:{form}}{interval}"


def _hits(measured: Measured, setting: str, stages: tuple[Quantity, ...]) -> str:
    """The hit rate of each stage that the setting has, by name if there are several."""
    if measured.failed(setting):
        return FAILED
    cells = {stage.label: measured.cell(setting, stage) for stage in stages}
    texts = {label: cell.text for label, cell in cells.items() if cell.summary.n}
    if not texts:
        return MEANINGLESS
    return ", ".join(texts.values() if len(texts) == 1 else (f"{label} {text}" for label, text in texts.items()))
