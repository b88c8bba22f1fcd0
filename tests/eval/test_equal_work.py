"""The table of equal work, by hand: what is on a frontier, between two settings, ahead by prompt, and faster."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from h2cache.eval.errors import UserError
from h2cache.eval.report.results import BASELINE, Results
from h2cache.eval.report.tables import EqualWork
from h2cache.eval.report.tables.equal_work import Curve, times_faster

PROMPTS = ("one", "two", "three")
OFFSETS = np.array([0.0, 2.0, 4.0])  # of the prompts' quality


def curve(*settings: tuple[float, float]) -> Curve:
    """Of settings (gain, quality of the first prompt), on three prompts that take the same work."""
    work = np.array([[24 / gain] * 3 for gain, _ in settings])
    return Curve.of(work, np.array([quality + OFFSETS for _, quality in settings]), np.full(3, 24.0))


def test_a_curve_is_what_nothing_beats():
    made = curve((2, 40), (2, 41), (4, 38), (10 / 3, 37), (10, 20))
    assert made.gains.tolist() == pytest.approx([2, 4, 10])
    assert made.quality[:, 0].tolist() == [41, 38, 20]


def test_between_settings_quality_is_linear_in_the_logarithm_of_work():
    made = curve((2, 40), (8, 30))
    assert made.at(4) == pytest.approx(35 + OFFSETS)
    assert made.at(2) == pytest.approx(40 + OFFSETS) and made.at(8.05) == pytest.approx(30 + OFFSETS)  # within 1 %
    assert made.at(1.5) == pytest.approx(40 + OFFSETS)  # faster than asked
    assert made.at(9) is None


def test_the_gain_at_a_quality_is_the_inverse():
    made = curve((2, 40), (8, 30))
    assert made.gain_at(37) == pytest.approx(4) and made.gain_at(42) == pytest.approx(2)  # means are 2 higher
    assert made.gain_at(20) == pytest.approx(8)  # all have more
    assert np.isnan(made.gain_at(43))


def test_how_much_faster_one_is_at_the_quality_of_another():
    """The champion has at 6x what the rival has at 4x."""
    rival, champion = curve((2, 42), (4, 38)), curve((4, 41), (6, 38))
    assert times_faster(champion, rival, 4) == pytest.approx(1.5)
    assert np.isnan(times_faster(champion, rival, 5)) and np.isnan(times_faster(rival, curve((4, 50)), 4))


def results(settings: dict[tuple[str, str], tuple[float, np.ndarray]], metrics: tuple[str, ...] = ("psnr",)) -> Results:
    """Of (method, setting) to (evaluations, PSNR of each prompt); the baseline has 24."""
    settings = {(BASELINE, BASELINE): (24.0, np.full(3, np.inf))} | settings
    rows = [
        {
            "setting": setting,
            "method": method,
            "prompt_id": prompt,
            "seed": 0,
            "evaluations": work,
            "denoising_seconds": work / 10,
            "total_seconds": work / 10,
            "solver": None,
            "steps": 24,
            "psnr": quality,
        }
        for (method, setting), (work, values) in settings.items()
        for prompt, quality in zip(PROMPTS, values, strict=True)
    ]
    return Results("x", "X", "", pd.DataFrame(rows), metrics, {}, "a model", "a machine", "a command", 400)


MADE = {
    ("Rival", "Rival, slow"): (12.0, 40 + OFFSETS),
    ("Rival", "Rival, fast"): (3.0, 25 + OFFSETS),
    ("Plan", "Plan, slow"): (12.0, 45 + OFFSETS),
    ("Plan", "Plan, fast"): (3.0, 30 + OFFSETS + [0, 0, 3]),
    ("Slow", "Slow"): (16.0, 50 + OFFSETS),
}
TABLE = EqualWork(name="equal")


def made(table: EqualWork, folder, settings=MADE) -> tuple[list[list[str]], pd.DataFrame]:
    """The rows of the Markdown, and the CSV by method."""
    artifact = table.make(results(settings), folder)
    lines = [line for line in artifact.files[0].read_text().splitlines() if line.startswith("| ")]
    data = pd.read_csv(artifact.files[1], index_col="method")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]], data


def test_the_best_comes_first_and_what_is_not_reached_is_empty(tmp_path):
    rows, _ = made(TABLE, tmp_path)
    assert [row[0] for row in rows] == ["Plan", "Rival", "Slow"]
    assert rows[2][1:] == ["–", "–", "–", "1.5x, 52.0", "–"]
    assert rows[0][4:] == ["8.0x, 33.0", "–"]
    assert rows[1][2].startswith("34.5 (-5.5, ") and rows[1][4] == "8.0x, 27.0"


def test_differences_are_by_prompt_and_their_interval_is_student_s(tmp_path):
    _, data = made(TABLE, tmp_path)
    ours, theirs = 37.5 + OFFSETS + np.array([0, 0, 1.5]), 32.5 + OFFSETS
    expected = ttest_rel(theirs, ours).confidence_interval(0.95)
    found = data.loc["Rival", ["psnr_at_4x", "difference_at_4x", "difference_at_4x_low", "difference_at_4x_high"]]
    assert found.astype(float).tolist() == pytest.approx([34.5, -5.5, expected.low, expected.high])


def test_how_much_faster_the_champion_is_has_a_bootstrapped_interval(tmp_path):
    """Of 47 dB at 2x and 33 at 8x, 34.5 are 12.5 / 14 of the way; which prompts are drawn moves that a little."""
    rows, data = made(TABLE, tmp_path)
    expected = 2 * 4 ** (12.5 / 14) / 4
    rival = data.loc["Rival"]
    assert rival["times_faster"] == pytest.approx(expected)
    assert rival["times_faster_low"] < expected < rival["times_faster_high"] < 2
    assert rows[1][5].startswith(f"{expected:.2f} (") and not rival["at_least"]


def test_what_is_only_known_to_be_faster_is_marked(tmp_path):
    weak = MADE | {("Rival", "Rival, slow"): (12.0, 30 + OFFSETS)}
    rows, data = made(TABLE, tmp_path, weak)
    assert rows[1][5].startswith("≥ 2.00 (2.00 to 2.00)") and data.loc["Rival"]["at_least"]


def test_time_instead_of_work_and_another_model_without_the_champion(tmp_path):
    only = {key: value for key, value in MADE.items() if key[0] == "Rival"}
    rows, _ = made(EqualWork(name="t", work="denoising_seconds"), tmp_path, only)
    assert rows == [["Rival", "37.6", "34.5", "30.1", "8.0x, 27.0", "–"]]


def test_a_setting_without_all_images_is_left_out(tmp_path):
    """An identical image has no finite PSNR, and a missing one has none."""
    lacking = MADE | {("Rival", "Rival, fast"): (3.0, np.array([np.nan, 27, 29]))}
    rows, _ = made(TABLE, tmp_path, lacking)
    assert next(row for row in rows if row[0] == "Rival")[4] == "2.0x, 42.0"
    assert "without a finite value on every prompt: Rival, fast." in (tmp_path / "equal.md").read_text()
    nothing = {("Rival", "Rival"): (3.0, np.full(3, np.inf))}
    assert TABLE.make(results(nothing), tmp_path) is None


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not measure ssim"):
        EqualWork(name="x", quality="ssim").make(results(MADE), tmp_path)
    with pytest.raises(UserError, match="work='seconds' is not allowed; choose evaluations"):
        EqualWork(name="x", work="seconds")
    with pytest.raises(UserError, match="compared_at=5"):
        EqualWork(name="x", compared_at=5)
