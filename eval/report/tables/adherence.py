"""Whether images still show what their prompts ask for: a change that nobody would call one costs nothing here.

Of flux-mini alone, whose prompts have a grammar and whose pictures can be read (`h2cache.eval.metrics.attributes`).
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from h2cache.eval.metrics.attributes import Attributes, look, told
from h2cache.eval.metrics.metric import Unavailable
from h2cache.eval.metrics.reader import WordReader, can_read, loaded_reader
from h2cache.eval.report.figures.sheet import read_image
from h2cache.eval.report.results import BASELINE, KEY, Artifact, Results
from h2cache.eval.report.tables.quantities import MEANINGLESS
from h2cache.eval.report.tables.sheet import Sheet
from h2cache.eval.report.tables.statistics import McNemar, mcnemar, summarize

PARTS = [field.name for field in fields(Attributes)]
LEVEL = 0.05  # of significance, of all the tests of a table together


@dataclass(frozen=True)
class Adherence:
    """Per setting: the images that show all that is asked for, and what was lost and gained against the baseline.

    The word is counted apart: flux-mini misspells many, with and without a cache.
    """

    name: str = "adherence"
    title: str = "What the prompts ask for"

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None where nothing can be read, and without a baseline."""
        groups = _by_setting(results)
        if BASELINE not in groups:
            return None
        tests = {
            name: (mcnemar(rows["right"], groups[BASELINE]["right"]), mcnemar(rows["word"], groups[BASELINE]["word"]))
            for name, rows in groups.items()
            if name != BASELINE
        }
        header = ("setting", "all right", "95 % interval", "lost", "gained", "p")
        header += ("words right", "95 % interval", "lost", "gained", "p")
        untested = [MEANINGLESS] * 3
        rows = tuple(
            (
                name,
                *_share(rows["right"]),
                *(_texts(tests[name][0]) if name in tests else untested),
                *_share(rows["word"]),
                *(_texts(tests[name][1]) if name in tests else untested),
            )
            for name, rows in groups.items()
        )
        notes = (
            _verdict("all that is asked for", {name: attributes for name, (attributes, _) in tests.items()}),
            _verdict("the right word", {name: word for name, (_, word) in tests.items()}),
            "All right: shape, layout and the colours of sign, wall and letters as the prompt tells. Lost: right in "
            "the baseline's image alone; gained: right in this one alone; p: exact McNemar test of the two.",
        )
        data = pd.concat({name: rows for name, rows in groups.items()}, names=["setting"]).reset_index()
        return Sheet(self.title, header, rows, notes).write(data, folder, self.name, results.name)


@dataclass(frozen=True)
class AttributeChanges:
    """Per setting: in how many images another shape, colour, layout or word is read than in the baseline's."""

    name: str = "attribute_changes"
    title: str = "What is read otherwise than without a cache"

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None where nothing can be read, and without a baseline."""
        groups = _by_setting(results)
        if BASELINE not in groups:
            return None
        baseline = groups.pop(BASELINE)
        columns = [f"seen_{part}" for part in (*PARTS, "word")]
        changes = {
            name: (rows[columns] != baseline[columns].reindex(rows.index))[rows.index.isin(baseline.index)]
            for name, rows in groups.items()
        }
        rows = tuple((name, *map(str, each.sum()), str(len(each))) for name, each in changes.items())
        most = max(changes, key=lambda name: changes[name].any(axis=1).mean(), default=None)
        if most is None:
            return None
        otherwise = changes[most].any(axis=1)
        notes = (
            f"Most is read otherwise with {most}: something in {otherwise.sum()} of {len(otherwise)} images.",
            "Read by rules and, the word, by a small network; a reader errs alike on both images of a pair.",
        )
        header = ("setting", *(column.removeprefix("seen_").replace("_", " ") for column in columns), "images")
        data = pd.concat(changes, names=["setting"]).reset_index()
        return Sheet(self.title, header, rows, notes).write(data, folder, self.name, results.name)


def _by_setting(results: Results) -> dict[str, pd.DataFrame]:
    """What is seen in every image, and whether it is right, by setting; empty where there is nothing to read."""
    try:
        reader = loaded_reader()
    except Unavailable:
        return {}
    frame = results.frame
    readings = pd.DataFrame([_reading(row, reader) for row in frame.itertuples()], frame.index)
    readings = readings.join(frame[["setting", *KEY]]).dropna(subset=["right"]) if len(readings.columns) else readings
    if readings.empty:
        return {}
    groups = readings.groupby("setting", sort=False, observed=True)
    return {name: rows.drop(columns="setting").set_index(KEY) for name, rows in groups}


def _reading(row: Any, reader: WordReader) -> dict[str, Any]:
    """Of one image; empty where its prompt or its size is not flux-mini's.

    right, word: 1.0, 0.0, or NaN for a word that cannot be read. seen_shape, ..., seen_word.
    """
    try:
        asked = told(row.prompt, reader.signs)
        image = read_image(row.image).convert("RGB")
        seen = look(image, reader.signs).attributes
    except ValueError:
        return {}
    word = reader.read(image)
    right = float(word == row.word) if isinstance(row.word, str) and can_read(row.word) else np.nan
    return {
        "right": float(seen == asked),
        "word": right,
        **{f"seen_{part}": value for part, value in asdict(seen).items()},
        "seen_word": word,
    }


def _share(right: pd.Series) -> tuple[str, str]:
    share = summarize(right)
    if not share.n:
        return MEANINGLESS, MEANINGLESS
    interval = f"{100 * max(0, share.low):.0f} to {100 * min(1, share.high):.0f} %"
    return f"{100 * share.mean:.0f} %", MEANINGLESS if np.isnan(share.low) else interval


def _texts(test: McNemar) -> tuple[str, str, str]:
    return str(test.lost), str(test.gained), f"{test.p:.3f}"


def _verdict(what: str, tests: dict[str, McNemar]) -> str:
    """Who differs from the baseline beyond chance, though so many tests are made."""
    changed = [name for name, test in tests.items() if test.p * len(tests) < LEVEL]
    level = f"p < {LEVEL:g} over {len(tests)} tests, Bonferroni"
    if not changed:
        return f"No setting shows {what} more or less often than the baseline beyond chance ({level})."
    fewer = [name for name in changed if tests[name].lost > tests[name].gained]
    more = [name for name in changed if tests[name].lost < tests[name].gained]
    said = [f"less often: {', '.join(fewer)}"] * bool(fewer) + [f"more often: {', '.join(more)}"] * bool(more)
    return f"Beyond chance ({level}) these show {what} {'; '.join(said)}."
