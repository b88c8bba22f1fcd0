"""The papers' numbers beside ours: the table `published`, of the claims in configs/published.yaml."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from h2cache.eval.files import CONFIGS
from h2cache.eval.report.figures.measures import best_setting
from h2cache.eval.report.results import BASELINE, KEY, Artifact, Results
from h2cache.eval.report.tables.quantities import CHANGE, MEANINGLESS, metric
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import ratio, summarize

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
    """What was measured on `n` prompts, with its 95 % interval over prompts; `form` is a format specification."""

    n: int
    value: float
    low: float
    high: float
    form: str
    unit: str

    def minus(self, number: float) -> "Ours":
        signed = "+" + self.form.removeprefix("+")
        return Ours(self.n, self.value - number, self.low - number, self.high - number, signed, self.unit)

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
    by_name = {each.name: each for each in results}
    rows = [_row(claim, claims, by_name) for claim in claims["claims"]]
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
    return "undecided"


def _row(claim: Mapping[str, Any], claims: Mapping[str, Any], results: Mapping[str, Results]) -> Row:
    if "not_testable" in claim:
        return Row(claim, None, f"not testable here: {claim['not_testable']}")
    experiment = claim["measured"]["experiment"]
    if experiment not in results:
        return Row(claim, None, f"not run: experiment=[{experiment}]")
    try:
        ours = _measured(results[experiment], claim["measured"])
    except NotTestable as reason:
        return Row(claim, None, f"not testable here: {reason}")
    if ours.n < claims["min_prompts"]:
        return Row(claim, ours, f"undecided: {ours.n} prompts, a verdict takes {claims['min_prompts']}")
    rule = claims["rules"][claim["rule"]]
    return Row(claim, ours, verdict(rule, ours.low, ours.high, claim["published"].get("value")))


def _measured(results: Results, measured: Mapping[str, Any]) -> Ours:
    """Raises NotTestable where the experiment lacks the setting or the metric."""
    quantity, against = measured["quantity"], measured.get("against")
    rows = _rows(results, measured["setting"])
    if quantity in RATIOS:
        column, _ = RATIOS[quantity]
        times = ratio(rows[column], _rows(results, against or BASELINE)[column])
        return Ours(times.n, *(1 / number for number in (times.value, times.high, times.low)), ".2f", "x")
    _require_metric(results, quantity)
    about = metric(quantity)
    unit = about.label.partition(", ")[2]
    form, unit = (".2f", f" {unit}") if unit else (".4f", "")
    values = rows[quantity].astype(np.float64)
    if against is not None:
        other = _rows(results, against)[quantity].astype(np.float64)
        if about.comparison is CHANGE:
            share = ratio(values, other)
            return Ours(share.n, *(CHANGE.of(number) for number in (share.value, share.low, share.high)), "+.2f", " %")
        values, form = values - other, f"+{form}"  # NaN where either lacks the image
    found = summarize(values.groupby(level=0).mean())
    return Ours(found.n, found.mean, found.low, found.high, form, unit)


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


def _cells(row: Row, claims: Mapping[str, Any]) -> tuple[str, ...]:
    claim, ours = row.claim, row.ours
    published = claim["published"]
    difference = MEANINGLESS
    if ours and "value" in published:
        difference = str(ours.minus(published["value"]))
    return (
        claim["claim"],
        f"{claims['sources'][claim['source']]['name']}, {claim['where']}",
        published["text"],
        str(ours) if ours else MEANINGLESS,
        difference,
        _measured_as(claim["measured"]) if "measured" in claim else MEANINGLESS,
        claims["rules"][claim["rule"]]["tests"] if "rule" in claim else MEANINGLESS,
        row.verdict,
    )


def _measured_as(measured: Mapping[str, Any]) -> str:
    """In words: 'table1: HiCache against Taylor-Scaled, PSNR, dB'."""
    quantity = measured["quantity"]
    label = RATIOS[quantity][1] if quantity in RATIOS else metric(quantity).label
    settings = [_setting(measured[each]) for each in ("setting", "against") if each in measured]
    return f"{measured['experiment']}: {' against '.join(settings)}; {label}"


def _setting(setting: str | Mapping[str, str]) -> str:
    if isinstance(setting, str):
        return setting
    return f"best {metric(setting['best']).label.partition(',')[0]} at the speed of {setting['as_fast_as']} or above"


def _notes(results: Sequence[Results], claims: Mapping[str, Any]) -> list[str]:
    models = " and ".join(dict.fromkeys(f"{each.model}, {each.machine}" for each in results))
    conditions = (f"{source['name']}: {source['conditions']}" for source in claims["sources"].values())
    rules = (f"{rule['tests']}: {rule['text']}" for rule in claims["rules"].values())
    return [
        f"Ours: on {models}; means with their 95 % intervals over prompts. A verdict on a magnitude is about this "
        "model and machine, not about those of the paper.",
        f"Verdicts. {'; '.join(dict.fromkeys(rules))}. Else undecided.",
        f"Published under these conditions. {'; '.join(conditions)}.",
    ]


def _numbers(row: Row) -> dict[str, Any]:
    """All of it under the names of a CSV."""
    claim, ours = row.claim, row.ours
    told = {name: claim[name] for name in ("id", "source", "where", "claim")}
    told["published"] = claim["published"].get("value")
    for name, field in (("n", "n"), ("ours", "value"), ("ours_ci95_low", "low"), ("ours_ci95_high", "high")):
        told[name] = getattr(ours, field, None)
    return told | {"rule": claim.get("rule"), "verdict": row.verdict}
