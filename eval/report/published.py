"""The papers' numbers beside ours: the table `published`, of the claims in configs/published.yaml."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from eval.files import CONFIGS
from eval.report.figures.measures import best_setting
from eval.report.results import BASELINE, KEY, Artifact, Results
from eval.report.tables.quantities import CHANGE, MEANINGLESS, SPEEDUP, metric
from eval.report.tables.sheet import Sheet
from eval.report.tables.statistics import ratio, summarize

CLAIMS = CONFIGS / "published.yaml"
RATIOS = {
    "speedup": ("total_seconds", "speedup"),
    "denoising_speedup": ("denoising_seconds", "speedup of denoising"),
    "fewer_evaluations": ("evaluations", "fewer evaluations"),
}  # to the column that is compared, and its name
RELATIONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
HEADER = ("claim", "source", "published", "ours", "ours - published", "measured as", "tests", "verdict")
WORDS = (0, 1, 2, 5, 6, 7)  # columns of text


@dataclass(frozen=True)
class Ours:
    """What was measured, with its 95 % interval over prompts; `form` is a format specification with a sign if need be."""

    value: float
    low: float
    high: float
    form: str
    unit: str

    def minus(self, number: float) -> "Ours":
        signed = "+" + self.form.removeprefix("+")
        return Ours(self.value - number, self.low - number, self.high - number, signed, self.unit)

    def __str__(self) -> str:
        value, *ends = (f"{number:{self.form}}" for number in (self.value, self.low, self.high))
        return f"{value}{self.unit} [{', '.join(ends)}]"


@dataclass(frozen=True)
class Row:
    """A claim with what became of it; `ours` is None where nothing was measured."""

    claim: Mapping[str, Any]
    ours: Ours | None
    verdict: str


class NotTestable(Exception):
    """Says why."""


def read_claims(path: Path = CLAIMS) -> dict[str, Any]:
    """The data file: `rules`, `sources` and `claims`."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def make(results: Sequence[Results], folder: Path, claims: Mapping[str, Any]) -> Artifact:
    """`published`.md, .csv and .tex: every claim with its verdict, from whichever experiments there are."""
    rows = [_row(claim, claims["rules"], {each.name: each for each in results}) for claim in claims["claims"]]
    cells = tuple(_cells(row, claims) for row in rows)
    sheet = Sheet("Published beside made", HEADER, cells, tuple(_notes(results, claims)), WORDS)
    return sheet.write(pd.DataFrame([_numbers(row) for row in rows]), folder, "published", "published")


def verdict(rule: Mapping[str, Any], low: float, high: float, published: float | None) -> str:
    """What the rule says of our interval: `reproduced`, `contradicted`, or `undecided`."""
    ends = {"low": low, "high": high}
    for word in ("reproduced", "contradicted"):
        end, relation, number = rule[word]
        if RELATIONS[relation](ends[end], published if number == "published" else number):
            return word
    return "undecided"  # NaN, without an interval, is neither


def _row(claim: Mapping[str, Any], rules: Mapping[str, Any], results: Mapping[str, Results]) -> Row:
    if "not_testable" in claim:
        return Row(claim, None, f"not testable here: {claim['not_testable']}")
    experiment = claim["measured"]["experiment"]
    if experiment not in results:
        return Row(claim, None, f"not run: experiment=[{experiment}]")
    try:
        ours = _measured(results[experiment], claim["measured"])
    except NotTestable as reason:
        return Row(claim, None, f"not testable here: {reason}")
    return Row(claim, ours, verdict(rules[claim["rule"]], ours.low, ours.high, claim["published"].get("value")))


def _measured(results: Results, measured: Mapping[str, Any]) -> Ours:
    """Raises NotTestable where the experiment lacks the setting or the metric."""
    quantity, against = measured["quantity"], measured.get("against")
    rows = _rows(results, measured["setting"])
    if quantity in RATIOS:
        column, _ = RATIOS[quantity]
        times = ratio(rows[column], _rows(results, against or BASELINE)[column])
        return Ours(*(1 / number for number in (times.value, times.high, times.low)), ".2f", SPEEDUP.unit)
    _require_metric(results, quantity)
    about = metric(quantity)
    unit = about.label.partition(", ")[2]
    form, unit = (".2f", f" {unit}") if unit else (".4f", "")
    if against is None:
        found = summarize(rows[quantity])
        return Ours(found.mean, found.low, found.high, form, unit)
    other = _rows(results, against)[quantity]
    if about.comparison is CHANGE:
        share = ratio(rows[quantity], other)
        return Ours(*(CHANGE.of(number) for number in (share.value, share.low, share.high)), "+.2f", " %")
    pairs = pd.concat([rows[quantity], other], axis=1, join="inner").astype(np.float64)
    found = summarize(pairs.iloc[:, 0] - pairs.iloc[:, 1])
    return Ours(found.mean, found.low, found.high, f"+{form}", unit)


def _rows(results: Results, setting: str | Mapping[str, str]) -> pd.DataFrame:
    if not isinstance(setting, str):
        _require_metric(results, setting["best"])
        frame = _rows(results, setting["as_fast_as"]).reset_index()
        groups = {name: rows for name, rows in results.frame.groupby("setting", sort=False, observed=True)}
        fields = set(frame["fields"].iloc[0])
        groups = {name: rows for name, rows in groups.items() if set(rows["fields"].iloc[0]) == fields}
        setting = best_setting(results, groups, setting["best"], setting["as_fast_as"])
    rows = results.frame[results.frame["setting"] == setting]
    if not len(rows):
        raise NotTestable(f"{results.name} has no images of {setting} on {results.model}")
    return rows.set_index(KEY)


def _require_metric(results: Results, name: str) -> None:
    if name in results.unavailable:
        raise NotTestable(f"{metric(name).label} is n/a ({results.unavailable[name]})")
    if name not in results.metrics:
        raise NotTestable(f"{results.name} does not measure {name} on {results.model}")
