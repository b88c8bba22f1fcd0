"""A summary of settings that were tuned to the same speedup: what was found, asked for, and measured where."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from h2cache.eval.report.results import BASELINE, Results
from h2cache.eval.report.tables.quantities import MEANINGLESS, Measured, Quantity
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.summary import SummaryTable

HEADER = ("found", "asked", "tuning")
WORK = {"time": "the time of whole pipeline calls", "blocks": "the number of blocks computed"}


@dataclass(frozen=True)
class MatchedTable(SummaryTable):
    """The columns of a `SummaryTable` after the setting that was found, the speedup asked for, and that when tuning."""

    name: str = "matched"

    def _sheet(
        self, results: Results, measured: Measured, columns: Sequence[Quantity], stages: Sequence[Quantity]
    ) -> Sheet:
        sheet = super()._sheet(results, measured, columns, stages)
        rows = tuple((row[0], *_found(row[0], results), *_drawn(row, results)) for row in sheet.rows)
        return replace(sheet, header=(sheet.header[0], *HEADER, *sheet.header[1:]), rows=rows)

    def _notes(self, results: Results, measured: Measured, shown: Sequence[str]) -> list[str]:
        tunings = results.tunings.values()
        work = " and ".join(dict.fromkeys(WORK[each.measured] for each in tunings))
        counts = " or ".join(dict.fromkeys(str(each.prompts) for each in tunings))
        note = f"Found: on {counts} prompts that are not in this table; the speedup asked for and found is in {work}."
        return [*([note] if results.tunings else []), *super()._notes(results, measured, shown)]

    def _data(self, results: Results, measured: Measured) -> pd.DataFrame:
        data = super()._data(results, measured)
        found = {name: _found(name, results) for name in data["setting"]}
        for place, column in enumerate(HEADER):
            data.insert(1 + place, column, [found[name][place] for name in data["setting"]])
        return data


def _found(setting: str, results: Results) -> tuple[str, str, str]:
    tuning = results.tunings.get(setting)
    if tuning is None:
        return (MEANINGLESS if setting == BASELINE else "as written"), MEANINGLESS, MEANINGLESS
    return tuning.words, f"{tuning.asked:.2f}x", f"{tuning.speedup:.2f}x"


def _drawn(row: tuple[str, ...], results: Results) -> tuple[str, ...]:
    """The cells of what was drawn: nothing of a setting that does not reach its speedup."""
    tuning = results.tunings.get(row[0])
    return row[1:] if tuning is None or tuning.reached else (MEANINGLESS,) * (len(row) - 1)
