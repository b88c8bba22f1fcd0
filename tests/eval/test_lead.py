"""How far ahead a way of caching is: paired differences, their interval, and the sentence they make."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from measured import results, row
from scipy import stats

from h2cache.eval.errors import UserError
from h2cache.eval.report.results import BASELINE
from h2cache.eval.report.tables import LeadTable

WAYS = {
    "TaylorSeer": {"method": "TaylorSeer", "order": 1},
    "HiCache": {"method": "HiCache", "order": 1, "sigma": 0.5},
}
# PSNR by interval, of four prompts: HiCache is clearly ahead, clearly behind, and neither.
PSNR = {
    3: ([40.0, 41.0, 44.0, 46.0], [41.0, 42.1, 44.9, 47.0]),
    5: ([36.0, 38.0, 39.0, 40.0], [35.0, 36.8, 38.1, 39.0]),
    7: ([33.0, 34.0, 35.0, 36.0], [32.0, 35.0, 34.1, 37.0]),
}


@pytest.fixture
def measured(tmp_path):
    rows = []
    for number in range(4):
        prompt = {"prompt_id": f"p{number}", "prompt": f"prompt {number}"}
        rows.append(row(tmp_path, BASELINE, BASELINE, seconds=4.0, psnr=math.inf, **prompt))
        for interval, (taylor, hermite) in PSNR.items():
            for method, values, own in (("TaylorSeer", taylor, {}), ("HiCache", hermite, {"sigma": 0.5})):
                fields = {"order": 1, "interval": interval, **own}
                about = {"fields": fields, "psnr": values[number], **prompt}
                rows.append(row(tmp_path, f"{method}, interval = {interval}", method, seconds=2.0, **about))
    return results(rows)


def table(measured, folder, **changes) -> tuple[str, pd.DataFrame] | None:
    made = LeadTable(**{"value": "psnr", "ways": WAYS, "against": "TaylorSeer", **changes}).make(measured, folder)
    return made and (made.files[0].read_text().replace("\\", ""), pd.read_csv(made.files[1]))


def test_differences_are_of_the_same_prompts(measured, tmp_path):
    markdown, data = table(measured, tmp_path / "out")
    for interval, (taylor, hermite) in PSNR.items():
        differences = np.subtract(hermite, taylor)
        low, high = stats.t.interval(0.95, 3, differences.mean(), stats.sem(differences))
        (found,) = data[data["interval"] == interval].itertuples()
        assert (found.n, found.lead, found.ci95_low, found.ci95_high) == pytest.approx(
            (4, differences.mean(), low, high)
        )
        ahead = f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        line = f"| {interval} | {np.mean(taylor):.2f} | {np.mean(hermite):.2f} | {ahead} |"
        assert line in markdown
    assert (
        "HiCache against TaylorSeer: ahead at interval 3; behind at interval 5; not to be told apart at interval 7."
    ) in markdown


def test_a_way_that_lacks_an_interval_says_so(measured, tmp_path):
    kept = measured.frame[measured.frame["setting"] != "HiCache, interval = 5"]
    markdown, data = table(replace(measured, frame=kept), tmp_path / "out")
    assert "| 5 | 38.25 | failed | failed |" in markdown and set(data["interval"]) == {3, 7}


def test_what_is_ambiguous_or_unknown_is_refused(measured, tmp_path):
    with pytest.raises(UserError, match="against='Nothing' is not allowed: choose TaylorSeer, HiCache"):
        table(measured, tmp_path, against="Nothing")
    with pytest.raises(UserError, match="both 'All' at interval=3; give the way more fields"):
        table(measured, tmp_path, ways={**WAYS, "All": {"order": 1}})
    assert table(measured, tmp_path, ways={**WAYS, "TaylorSeer": {"order": 9}}) is None
