"""Tables of times: their spread, the first drawing beside the later ones, and images a second over the batch."""

import math

import pandas as pd
import pytest
from measured import results, row

from h2cache.eval.errors import UserError
from h2cache.eval.report.results import BASELINE, Results
from h2cache.eval.report.tables import SpreadTable, SummaryTable, ThroughputTable


def rows_of(markdown: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {first: others for first, *others in lines}


def test_the_spread_of_times_and_the_first_drawing(tmp_path):
    """1, 2 and 3 s of denoising, 0.5 s more in all; the first prompt's was drawn before in 4 s."""
    times = ((1.0, 4.0), (2.0, math.nan), (3.0, math.nan))
    rows = [
        row(tmp_path, BASELINE, BASELINE, f"p{k}", "a sign", seconds, cold_seconds=cold)
        for k, (seconds, cold) in enumerate(times)
    ]
    markdown, csv, _ = SpreadTable().make(results(rows), tmp_path).files
    assert rows_of(markdown.read_text())[BASELINE] == ["2.500", "1.000", "3.400", "2.000", "1.000", "2.900", "4.000"]
    numbers = pd.read_csv(csv).iloc[0]
    assert (numbers["cold_seconds_mean"], numbers["cold_seconds_n"]) == (4.0, 1)
    assert numbers["denoising_seconds_std"] == 1.0


def batches(folder, names: dict[str, tuple[str, int, float]]) -> Results:
    """A setting by name: (backend, images, seconds of denoising), on two prompts of the same time."""
    rows = [
        row(folder, name, "Baseline" if name == BASELINE else name.partition(",")[0], f"p{k}", "a sign", seconds)
        | {"backend": backend, "images": images}
        for k in range(2)
        for name, (backend, images, seconds) in names.items()
    ]
    return results(rows)


def test_throughput_is_images_a_second_against_no_cache_at_the_same_batch(tmp_path):
    """4 images in 8 s are 0.5 a second; with the cache in 2 s, 2 a second: four times as many."""
    found = batches(
        tmp_path,
        {
            BASELINE: ("none", 1, 4.0),
            "No cache, 4": ("none", 4, 8.0),
            "H2-Cache, 1": ("h2cache", 1, 2.0),
            "H2-Cache, 4": ("h2cache", 4, 2.0),
            "H2-Cache, 8": ("h2cache", 8, 2.0),
        },
    )
    markdown, csv, _ = ThroughputTable().make(found, tmp_path).files
    assert rows_of(markdown.read_text()) == {
        "images at a time": ["1", "4", "8"],
        BASELINE: ["0.25 (1.00x)", "0.50 (1.00x)", "–"],
        "H2-Cache": ["0.50 (2.00x)", "2.00 (4.00x)", "4.00"],
    }
    numbers = pd.read_csv(csv).set_index("setting")
    assert numbers["images_per_second"]["H2-Cache, 4"] == 2 and numbers["speedup"]["H2-Cache, 4"] == 4


def test_one_image_at_a_time_is_no_table_of_batches(tmp_path):
    assert ThroughputTable().make(batches(tmp_path, {BASELINE: ("none", 1, 4.0)}), tmp_path) is None


def test_two_settings_of_one_batch_are_named(tmp_path):
    twice = {"No cache, 4": ("none", 4, 8.0), "None, 4": ("none", 4, 8.0)}
    with pytest.raises(UserError, match="'No cache, 4' and 'None, 4' both draw 4 images at a time"):
        ThroughputTable().make(batches(tmp_path, twice), tmp_path)


def test_metrics_with_values_lead(tmp_path):
    """`clipiqa` is first in the experiment and has no value, so that it has no column; asked for by name it has."""
    rows = [row(tmp_path, BASELINE, BASELINE, "p", "a sign", 4.0, psnr=math.inf, ssim=1.0)]
    rows += [row(tmp_path, "H2-Cache", "H2-Cache", "p", "a sign", 2.0, psnr=30.0, ssim=0.9)]
    found = results(rows, metrics=("clipiqa", "psnr", "ssim"))
    led, asked = (
        table.make(found, tmp_path).files[0].read_text()
        for table in (SummaryTable(), SummaryTable(metrics=found.metrics))
    )
    assert rows_of(led)["setting"][1:3] == ["PSNR, dB", "SSIM"] and "CLIP-IQA" not in rows_of(led)["setting"]
    assert rows_of(asked)["setting"][1:4] == ["CLIP-IQA", "PSNR, dB", "SSIM"]
