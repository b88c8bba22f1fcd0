"""Images a second over the number of images that are drawn at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from h2cache.eval.errors import UserError
from h2cache.eval.report.results import BASELINE, Artifact, Results
from h2cache.eval.report.tables.quantities import MEANINGLESS, Measured
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import Ratio, ratio
from h2cache.eval.report.tables.summary import means_over, notes_on_failures

UNCACHED = "none"  # `backend` of settings without a cache


@dataclass(frozen=True)
class ThroughputTable:
    """A row for each method, a column for each batch: images a second, and how many times those of no cache."""

    name: str = "throughput"
    title: str = "Images a second over the batch"

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md and .tex as a grid, .csv with a row a setting; None where no setting draws several at a time."""
        measured = Measured.of(results)
        places = self._places(measured)
        if not any(batch > 1 for _, batch in places):
            return None
        plain = {batch: setting for (method, batch), setting in places.items() if method == BASELINE}
        rates = {place: self._rate(measured, setting, place[1]) for place, setting in places.items()}
        gains = {
            (method, batch): self._speedup(measured, setting, plain[batch])
            for (method, batch), setting in places.items()
            if batch in plain
        }
        batches = sorted({batch for _, batch in places})
        methods = dict.fromkeys(method for method, _ in places)
        rows = tuple((method, *(_text(rates, gains, (method, batch)) for batch in batches)) for method in methods)
        notes = (
            f"{means_over(results, measured)}; of denoising alone.",
            "In brackets: against no cache at the same batch. Each image of a batch is decided on its own.",
            *notes_on_failures(measured, measured),
        )
        data = [
            {"setting": places[place], "method": place[0], "images": place[1], "images_per_second": rate}
            | ({"speedup": gain.value, "speedup_ci95_low": gain.low, "speedup_ci95_high": gain.high} if gain else {})
            for place, rate in rates.items()
            for gain in [gains.get(place)]
        ]
        sheet = Sheet(self.title, ("images at a time", *map(str, batches)), rows, notes)
        return sheet.write(pd.DataFrame(data), folder, self.name, results.name)

    def _places(self, measured: Measured) -> dict[tuple[str, int], str]:
        """(method, batch) to the setting; what has no cache is the baseline's."""
        places = {}
        for setting, rows in measured.groups.items():
            if not measured.failed(setting):
                first = rows.iloc[0]
                place = (BASELINE if first["backend"] == UNCACHED else first["method"], int(first["images"]))
                if places.setdefault(place, setting) != setting:
                    raise UserError(
                        f"ThroughputTable: {places[place]!r} and {setting!r} both draw {place[1]} images at a time "
                        f"with {place[0]}; leave one out"
                    )
        return places

    def _rate(self, measured: Measured, setting: str, batch: int) -> float:
        return batch / float(measured.groups[setting]["denoising_seconds"].astype(np.float64).mean())

    def _speedup(self, measured: Measured, setting: str, plain: str) -> Ratio:
        """How many times as many images a second as `plain`, of the same batch."""
        return ratio(*(measured.groups[each]["denoising_seconds"] for each in (plain, setting)))


def _text(rates: Mapping, gains: Mapping, place: tuple[str, int]) -> str:
    if place not in rates:
        return MEANINGLESS
    return f"{rates[place]:.2f}" + (f" ({gains[place].value:.2f}x)" if place in gains else "")
