"""One value over two fields of a method, for ablations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from h2cache.eval.errors import UserError
from h2cache.eval.report.results import Artifact, Results
from h2cache.eval.report.tables.quantities import (
    COMPUTED,
    DENOISING,
    EVALUATIONS,
    MEANINGLESS,
    MEMORY,
    TOTAL,
    Cell,
    Measured,
    Quantity,
    hit_rates,
    metric,
    numbers,
)
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.summary import means_over, notes_on_failures

SPEEDUPS = {"speedup": TOTAL, "denoising_speedup": DENOISING}
LABELS = {
    "speedup": "speedup",
    "denoising_speedup": "speedup of denoising",
    "total_seconds": "time, s",
    "denoising_seconds": "time of denoising, s",
}


@dataclass(frozen=True)
class GridTable:
    """`value` for each setting that has the fields `rows` and `columns`.

    value: speedup, denoising_speedup, total_seconds, denoising_seconds, computed_fraction, evaluations,
    peak_memory_bytes, a metric, or hit_rate.STAGE. where: fields that must have a value, where settings differ in more
    than the two.
    """

    value: str = "speedup"
    rows: str = "tau1"
    columns: str = "tau2"
    where: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    title: str | None = None

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """.md and .tex as a grid, .csv with a row a cell; None if no setting has both fields or no image was made."""
        measured = Measured.of(results)
        places = self._places(results)
        if all(measured.failed(setting) for setting in places.values()):
            return None
        quantity = self._quantity(results, measured)
        cells = {place: measured.cell(setting, quantity) for place, setting in places.items()}
        name = self.name or f"{self.value}_by_{self.rows}_and_{self.columns}"
        sheet = self._sheet(results, measured, places, cells, quantity)
        return sheet.write(self._data(places, cells, quantity), folder, name, results.name)

    def _places(self, results: Results) -> dict[tuple[Any, Any], str]:
        """(row, column) to the setting there."""
        places: dict[tuple[Any, Any], str] = {}
        for setting, fields in results.frame[["setting", "fields"]].itertuples(index=False):
            if self.rows not in fields or self.columns not in fields:
                continue
            if any(fields.get(name) != value for name, value in self.where.items()):
                continue
            place = (fields[self.rows], fields[self.columns])
            if places.setdefault(place, setting) != setting:
                raise UserError(
                    f"GridTable {self.value}: {places[place]!r} and {setting!r} both have {self.rows}={place[0]} and "
                    f"{self.columns}={place[1]}; say which one is meant with where="
                )
        return places

    def _quantity(self, results: Results, measured: Measured) -> Quantity:
        known = {each.name: each for each in (TOTAL, DENOISING, COMPUTED, EVALUATIONS, MEMORY, *hit_rates(measured))}
        known |= SPEEDUPS | {name: metric(name) for name in results.metrics}
        if self.value not in known:
            raise UserError(
                f"GridTable: value={self.value!r} is not measured by {results.name}; choose {', '.join(known)}"
            )
        return known[self.value]

    def _text(self, cell: Cell) -> str:
        return (cell.comparison_text or cell.text) if self.value in SPEEDUPS else cell.text

    def _sheet(
        self,
        results: Results,
        measured: Measured,
        places: Mapping[tuple[Any, Any], str],
        cells: Mapping[tuple[Any, Any], Cell],
        quantity: Quantity,
    ) -> Sheet:
        rows, columns = (_ordered(place[axis] for place in places) for axis in (0, 1))
        header = (f"{self.rows} \\ {self.columns}", *(str(column) for column in columns))
        texts = {place: self._text(cell) for place, cell in cells.items()}
        body = [(str(row), *(texts.get((row, column), MEANINGLESS) for column in columns)) for row in rows]
        title = self.title or f"{results.title}: {LABELS.get(self.value) or quantity.label}"
        what = f"Rows: {self.rows}; columns: {self.columns}."
        notes = (what, f"{means_over(results, measured)}.", *notes_on_failures(measured, places.values()))
        reason = results.unavailable.get(self.value)
        reasons = (f"n/a: {quantity.label} ({reason}).",) if reason else ()
        return Sheet(title, header, tuple(body), notes, reasons=reasons)

    def _data(
        self,
        places: Mapping[tuple[Any, Any], str],
        cells: Mapping[tuple[Any, Any], Cell],
        quantity: Quantity,
    ) -> pd.DataFrame:
        rows = _ordered(place[0] for place in places)
        columns = _ordered(place[1] for place in places)
        return pd.DataFrame(
            [
                {self.rows: r, self.columns: c, "setting": places[r, c]} | numbers(cells[r, c], quantity)
                for r in rows
                for c in columns
                if (r, c) in places
            ]
        )


def _ordered(values: Any) -> list[Any]:
    """Each once; numbers by size and before words, None (no pooling, no limit) last."""
    return sorted(set(values), key=lambda value: (value is None, isinstance(value, str), 0 if value is None else value))
