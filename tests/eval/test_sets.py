"""Metrics of sets of images: against formulas and pyiqa's own distance, and what tables say of them."""

import numpy as np
import pandas as pd
import pytest
import torch
from measured import results, row
from PIL import Image
from scipy.linalg import sqrtm

from h2cache.eval.errors import UserError
from h2cache.eval.experiments.harness import set_scores
from h2cache.eval.metrics import pyiqa_metrics
from h2cache.eval.metrics.registry import Metrics, set_metric
from h2cache.eval.metrics.sets import LOOK, SetMetric, SetScore, frechet, look, set_score
from h2cache.eval.report.results import BASELINE
from h2cache.eval.report.tables import SummaryTable

PLAIN = SetMetric("distance", lambda means: look)


def clouds(n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(n, width)) @ generator.normal(size=(width, width))
    return a, 0.5 * a[::-1] + generator.normal(1, 2, size=(n, width))


@pytest.mark.parametrize(("n", "width"), [(40, 3), (12, 5), (6, 30)])
def test_the_distance_is_the_formula_with_the_root_of_a_matrix(n, width):
    """With more features than images too, where covariances have no full rank."""
    a, b = clouds(n, width)
    first, second = (np.cov(each, rowvar=False) for each in (a, b))
    root = np.trace(sqrtm(first @ second).real)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root
    assert frechet(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a[::-1] + 2) == pytest.approx(4 * width)  # which image is where does not count


def test_an_interval_is_over_prompts_drawn_with_all_their_seeds():
    """Two seeds of a prompt are one draw: writing every image down twice changes nothing but the covariance's n - 1."""
    a, b = clouds(30, 2)
    prompts = [f"p{k}" for k in range(30)]
    once = set_score(PLAIN, a, b, prompts)
    assert (once.n, once.value) == (30, frechet(a, b)) and once.low < once.value < once.high
    twice = set_score(PLAIN, np.repeat(a, 2, 0), np.repeat(b, 2, 0), np.repeat(prompts, 2).tolist())
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), rel=0.05)
    assert set_score(PLAIN, a, b, prompts) == once
    few = set_score(PLAIN, a[:2], b[:2], prompts[:2])
    assert few.value > 0 and np.isnan([few.low, few.high]).all()
    assert np.isnan(set_score(PLAIN, a[:1], b[:1], prompts[:1]).value)


def test_looks_are_in_standard_deviations_of_the_baselines_images():
    a, b = clouds(30, 2)
    scale = b.std(axis=0, ddof=1)
    prompts = [f"p{k}" for k in range(30)]
    assert set_score(LOOK, a, b, prompts).value == pytest.approx(frechet(a / scale, b / scale))
    flat = np.c_[b, np.ones(30)]  # a feature that all images share
    assert np.isfinite(set_score(LOOK, np.c_[a, np.ones(30)], flat, prompts).value)


def test_what_a_picture_looks_like(tmp_path):
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "red.png")
    assert look(tmp_path / "red.png")[:6] == pytest.approx([1 / 3, 0, 1, 0, 0.5, 0])
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert look(tmp_path / "stripes.png") == pytest.approx(
        [0.5, 0.5, 0, 0, 0, 0, *np.log(np.array([1, 0, 0]) + 1 / 255)]
    )


def pictures(folder, blur: bool) -> pd.DataFrame:
    """A frame of a baseline and a method on twelve prompts; the method's images are blurred, or the same."""
    rows = []
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        original = Image.fromarray(pixels)
        for setting in (BASELINE, "H2-Cache"):
            file = folder / f"{setting}{k}.png"
            made = original.resize((8, 8)).resize((24, 24)) if blur and setting != BASELINE else original
            made.save(file)
            rows.append(row(folder, setting, setting, f"p{k}", "a sign", 1.0) | {"image": file})
    return pd.DataFrame(rows)


def test_a_column_says_how_far_the_set_is(tmp_path):
    blurred, same = (set_scores(pictures(tmp_path, blur), "look", look) for blur in (True, False))
    assert set(blurred) == {"H2-Cache"} and same["H2-Cache"].value == pytest.approx(0, abs=1e-9)
    assert blurred["H2-Cache"].low > 1 and blurred["H2-Cache"].n == 12
    fields = {"metrics": ("psnr",), "set_metrics": ("look", "fid"), "unavailable": {"fid": "no weights"}}
    given = {"look": {"H2-Cache": SetScore(12, 1.25, 1.0, 1.5)}}
    rows = pictures(tmp_path, True).to_dict("records")
    markdown, csv, _ = SummaryTable().make(results(rows, set_scores=given, **fields), tmp_path).files
    rows = [line.strip("| ").split(" | ") for line in markdown.read_text().splitlines() if line.startswith("| ")]
    column = rows[0].index("distance of looks")
    assert {cells[0]: cells[column] for cells in rows[1:]} == {BASELINE: "–", "H2-Cache": "1.250 (1.000 to 1.500)"}
    assert "n/a: FID (no weights)." in markdown.read_text()
    assert pd.read_csv(csv, index_col="setting").loc["H2-Cache", "look"] == 1.25


def test_fid_without_weights_says_why_and_other_names_are_refused():
    assert "no network" in Metrics([], sets=["fid", "look"]).unavailable["fid"]
    with pytest.raises(UserError, match="'inception' is no metric of a set of images: choose from look, fid"):
        set_metric("inception")


class Features(torch.nn.Module):
    """Stands in for Inception, whose weights are not at hand."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 100).flatten(1)


def test_pyiqas_distance_of_two_folders_is_ours(tmp_path, monkeypatch):
    """With its resizing, its statistics and its root of a matrix, on a network that is not Inception."""
    from pyiqa.archs.fid_arch import FID

    fid = FID.__new__(FID)
    torch.nn.Module.__init__(fid)
    fid.model, fid.test_img_size = Features(), (299, 299)
    monkeypatch.setattr(pyiqa_metrics, "load", lambda *_: type("Network", (), {"model": type("M", (), {"net": fid})}))
    pictures(tmp_path, True)
    folders = {}
    for setting in (BASELINE, "H2-Cache"):
        folders[setting] = tmp_path / setting
        folders[setting].mkdir()
        for k in range(12):
            (tmp_path / f"{setting}{k}.png").rename(folders[setting] / f"{k:02}.png")
    features = Metrics([], sets=["fid"]).features["fid"]
    ours, theirs = (np.stack([features(file) for file in sorted(each.iterdir())]) for each in folders.values())
    options = {"device": torch.device("cpu"), "num_workers": 0, "verbose": False}
    expected = fid(*map(str, folders.values()), **options)
    assert expected > 1 and frechet(ours, theirs) == pytest.approx(expected, rel=1e-3)
