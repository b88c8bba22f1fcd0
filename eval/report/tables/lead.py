"""How far ways of caching are ahead of one of them, prompt by prompt, at each value of a field that they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from h2cache.eval.errors import UserError
from h2cache.eval.report.results import Artifact, Results
from h2cache.eval.report.tables.quantities import FAILED, Measured, metric
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import Summary, summarize
from h2cache.eval.report.tables.summary import means_over, notes_on_failures


@dataclass(frozen=True)
class LeadTable:
    """The value of each way at each `rows`, and its difference from the way `against`, with a 95 % interval.

    Args:
        value: a metric, higher is better.
        rows: a field of the methods.
        ways: by name, what a setting must have to be of it: `method`, and any fields.
        against: the way that the others are held against.
    """

    value: str
    ways: Mapping[str, Mapping[str, Any]]
    against: str
    rows: str = "interval"
    name: str = "lead"
    title: str = "How far ahead"

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None if no setting of the way `against` made an image."""
        if self.against not in self.ways:
            raise UserError(f"LeadTable: against={self.against!r} is not allowed: choose {', '.join(self.ways)}")
        measured, quantity = Measured.of(results), metric(self.value)
        places = self._places(results)
        values = {place: quantity.of(measured.groups[setting]).astype(float) for place, setting in places.items()}
        found = sorted({row for row, way in values if way == self.against and values[row, way].notna().any()})
        if not found:
            return None
        others = [way for way in self.ways if way != self.against]
        leads = {
            (row, way): summarize(values[row, way] - values[row, self.against])
            for row in found
            for way in others
            if (row, way) in values
        }
        header = (self.rows, *self.ways, *(f"{way}: ahead by" for way in others))
        body = [
            (
                str(row),
                *(self._mean(values.get((row, way))) for way in self.ways),
                *(_lead(leads.get((row, way))) for way in others),
            )
            for row in found
        ]
        notes = (
            f"{quantity.label}; ahead of {self.against}, on the same prompts, with a 95 % interval.",
            *(self._sentence(way, found, leads) for way in others),
            f"{means_over(results, measured)}.",
            *notes_on_failures(measured, places.values()),
        )
        data = pd.DataFrame(
            {self.rows: row, "way": way, "n": lead.n, "lead": lead.mean, "ci95_low": lead.low, "ci95_high": lead.high}
            for (row, way), lead in leads.items()
        )
        return Sheet(self.title, header, tuple(body), notes).write(data, folder, self.name, results.name)

    def _places(self, results: Results) -> dict[tuple[Any, str], str]:
        """(row, way) to its setting."""
        places: dict[tuple[Any, str], str] = {}
        for setting, method, fields in results.frame[["setting", "method", "fields"]].itertuples(index=False):
            known = {**fields, "method": method}
            for way, asked in self.ways.items():
                if self.rows not in fields or any(known.get(name) != value for name, value in asked.items()):
                    continue
                place = (fields[self.rows], way)
                if places.setdefault(place, setting) != setting:
                    raise UserError(
                        f"LeadTable: {places[place]!r} and {setting!r} are both {way!r} at {self.rows}={place[0]}; "
                        "give the way more fields"
                    )
        return places

    def _mean(self, values: pd.Series | None) -> str:
        mean = np.nan if values is None else summarize(values).mean
        return FAILED if np.isnan(mean) else f"{mean:.2f}"

    def _sentence(self, way: str, rows: list[Any], leads: Mapping[tuple[Any, str], Summary]) -> str:
        """Where the way is ahead, where behind, and where neither can be told."""
        said = {"ahead": [], "behind": [], "not to be told apart": []}
        for row in rows:
            lead = leads.get((row, way))
            if lead is None or lead.n == 0:
                continue
            sign = "ahead" if lead.low > 0 else "behind" if lead.high < 0 else "not to be told apart"
            said[sign].append(str(row))
        parts = [f"{verdict} at {self.rows} {', '.join(places)}" for verdict, places in said.items() if places]
        return f"{way} against {self.against}: {'; '.join(parts) or 'nothing was measured'}."


def _lead(lead: Summary | None) -> str:
    if lead is None or lead.n == 0:
        return FAILED
    return f"{lead.mean:+.2f} [{lead.low:+.2f}, {lead.high:+.2f}]"
