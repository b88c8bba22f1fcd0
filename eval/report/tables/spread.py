"""How much times vary: over prompts, and between the first drawing with a setting and the later ones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from h2cache.eval.report.results import Artifact, Results
from h2cache.eval.report.tables.quantities import DENOISING, FAILED, MEANINGLESS, TOTAL, Measured, Quantity, numbers
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import summarize
from h2cache.eval.report.tables.summary import means_over, notes_on_failures

COLD = Quantity("cold_seconds", "first denoising, s", lambda frame: frame["cold_seconds"], lambda s: f"{s:.2f}")


@dataclass(frozen=True)
class SpreadTable:
    """Mean, standard deviation and 95th percentile of the times; the first denoising with a method in a process."""

    name: str = "spread"
    title: str = "Spread of the times"

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None if no image was made."""
        measured = Measured.of(results)
        if all(measured.failed(setting) for setting in measured):
            return None
        times = [f"{time}, s: {what}" for time in ("all", "denoising") for what in ("mean", "std", "p95")]
        rows = tuple((setting, *self._times(measured, setting)) for setting in measured)
        notes = (
            f"{means_over(results, measured)}; std and p95 (the 95th percentile) are over images.",
            "All: with text encoding and VAE. First: the denoising of the first drawing with a method in a process, "
            "which is in no other number; on a CPU a method's other settings have none.",
            *notes_on_failures(measured, measured),
        )
        sheet = Sheet(self.title, ("setting", *times, COLD.label), rows, notes)
        return sheet.write(self._data(measured), folder, self.name, results.name)

    def _times(self, measured: Measured, setting: str) -> list[str]:
        group = measured.groups[setting]
        if measured.failed(setting):
            return [FAILED] * 7
        times = [summarize(quantity.of(group)) for quantity in (TOTAL, DENOISING)]
        texts = [_seconds(value) for each in times for value in (each.mean, each.std, each.p95)]
        return [*texts, _seconds(summarize(COLD.of(group).astype(np.float64)).mean)]

    def _data(self, measured: Measured) -> pd.DataFrame:
        rows = []
        for setting in measured:
            row: dict[str, object] = {"setting": setting}
            for quantity in (TOTAL, DENOISING, COLD):
                row |= numbers(measured.cell(setting, quantity), quantity)
            rows.append(row)
        return pd.DataFrame(rows)


def _seconds(value: float) -> str:
    return MEANINGLESS if np.isnan(value) else f"{value:.3f}"
