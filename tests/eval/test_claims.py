"""What the papers claim, measured: spectra of errors, jitter of metrics, features that are normal or not, stability."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from measured import SIZE, results, row
from PIL import Image

from h2cache.eval.errors import UserError
from h2cache.eval.generation.features import Features, forecast_errors, recorded
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.models.pipelines import ModelConfig
from h2cache.eval.report.figures import Gaussianity, Stability
from h2cache.eval.report.figures.gaussianity import excess_kurtosis, rank_correlation
from h2cache.eval.report.results import Results
from h2cache.eval.report.tables import ErrorSpectrum, JitterTable
from h2cache.eval.report.tables.jitter import jitter
from h2cache.eval.report.tables.spectrum import low_share
from h2cache.policy.forecasts import Hermite, Taylor


def wave(period: int) -> np.ndarray:
    """(32, 32, 3) pixels that go up and down along x."""
    return np.tile(np.cos(2 * np.pi * np.arange(SIZE) / period), (SIZE, 1))[:, :, None].repeat(3, axis=2)


def test_the_share_of_low_frequencies():
    coarse, fine = wave(32), wave(4)
    assert low_share(coarse, 1 / 16) == pytest.approx(1) and low_share(fine, 1 / 16) == pytest.approx(0, abs=1e-12)
    assert low_share(2 * coarse + fine, 1 / 16) == pytest.approx(4 / 5)
    assert low_share(np.ones((SIZE, SIZE, 3)), 1 / 16) == pytest.approx(1)  # a change of the mean level
    assert math.isnan(low_share(np.zeros((SIZE, SIZE, 3)), 1 / 16))


def spectra(folder: Path, waves: dict[str, np.ndarray]) -> Results:
    """The baseline is grey; each setting adds its wave, a little stronger on every prompt."""
    rows = []
    for number, prompt in enumerate("abc"):
        for setting, pixels in {"Baseline": np.zeros((SIZE, SIZE, 3)), **waves}.items():
            rows.append(row(folder, setting, setting, prompt, "a sign", 1.0))
            Image.fromarray((128 + (20 + number) * pixels).round().astype(np.uint8)).save(rows[-1]["image"])
    return results(rows)


def test_a_coarse_and_a_fine_error_are_told_apart(tmp_path):
    measured = spectra(tmp_path, {"Coarse": wave(32), "Fine": wave(4)})
    table = ErrorSpectrum(compared=("Coarse", "Fine")).make(measured, tmp_path)
    assert table.caption.startswith("Coarse and Fine differ: the error of Coarse is the coarser one (+100.0 points")
    swapped = ErrorSpectrum(compared=("Fine", "Coarse")).make(measured, tmp_path)
    assert swapped.caption.startswith("Fine and Coarse differ: the error of Coarse is the coarser one (-100.0 points")
    alike = spectra(tmp_path, {"One": wave(32), "Other": wave(32)})
    told = ErrorSpectrum(compared=("One", "Other")).make(alike, tmp_path)
    assert told.caption.startswith("One and Other cannot be told apart")


def test_a_spectrum_needs_an_error_a_cut_and_two_settings(tmp_path):
    exact = spectra(tmp_path, {"One": 0 * wave(4), "Other": 0 * wave(4)})
    assert ErrorSpectrum(compared=("One", "Other")).make(exact, tmp_path) is None
    for wrong in (dict(cut=0.5), dict(cut=0), dict(compared=("One",))):
        with pytest.raises(UserError, match="ErrorSpectrum"):
            ErrorSpectrum(**dict(compared=("One", "Other")) | wrong)


def steps(metric: list[float], decisions: list[str], stage: str = "structure") -> pd.DataFrame:
    known = {"run": 0, "context": "None", "sample": 0, "stage": stage}
    each = zip(range(len(metric)), metric, decisions, strict=True)
    return pd.DataFrame([known | {"step": step, "diff": diff, "decision": decision} for step, diff, decision in each])


def test_jitter_is_how_much_the_metric_bends_while_its_reference_stays():
    """0.1, 0.2, 0.4: bent by 0.1 at a mean level of 7/30; what follows a computed step has another reference."""
    trace = steps([math.nan, 0.1, 0.2, 0.4, 0.1, 0.9], ["warmup", "hit", "hit", "compute", "hit", "compute"])
    assert jitter(trace) == {"structure": pytest.approx(3 / 7)}
    straight = steps([math.nan, 0.1, 0.2, 0.3], ["warmup", "hit", "hit", "hit"], "detail")
    assert jitter(pd.concat([trace, straight]))["detail"] == pytest.approx(0, abs=1e-12)
    assert math.isnan(jitter(steps([0.1, 0.2, 0.3], ["hit", "compute", "hit"]))["structure"])


def test_pooling_at_equal_work(tmp_path):
    rows = []
    for number, prompt in enumerate("abc"):
        rows.append(row(tmp_path, "Baseline", "Baseline", prompt, "a sign", 1.0))
        for setting, psnr, bent in (("none", 30.0, 0.5), ("small", 28.0 + 0.1 * number, 0.3), ("tiny", 30.0, 0.5)):
            trace = steps([math.nan, 0.1, 0.2, bent], ["warmup", "hit", "hit", "hit"])
            rows.append(row(tmp_path, setting, "H2-Cache", prompt, "a sign", 0.5, psnr=psnr, trace=trace))
    table = JitterTable().make(results(rows), tmp_path)
    assert table.caption.startswith(
        "Against none, at equal work, images are further from it with small; the metric has less jitter in 1 of 2 in "
        "structure."
    )
    lines = (tmp_path / "equal_work.md").read_text().splitlines()
    (small,) = (line for line in lines if line.startswith("| small"))
    assert "28.10" in small and "-1.90" in small and "0.000 (n = 3)" in small


def random_features(draw, blocks: int = 3) -> Features:
    """Whose differences of order 1 are independent draws."""
    return Features(tuple(f"structure {i}" for i in range(blocks)), torch.from_numpy(np.cumsum(draw, axis=0)).float())


def test_kurtosis_of_normal_differences_is_none():
    generator = np.random.default_rng(0)
    normal = random_features(generator.normal(size=(8, 3, 100_000)))
    heavy = random_features(generator.laplace(size=(8, 3, 100_000)))
    assert excess_kurtosis(normal, 1).shape == (7, 3)
    assert abs(excess_kurtosis(normal, 1)).max() < 0.1 > abs(excess_kurtosis(normal, 3)).max()
    assert excess_kurtosis(heavy, 1).mean() == pytest.approx(3, abs=0.2)  # Laplace's


def test_a_rank_correlation_has_an_interval():
    ranks = np.arange(20.0)
    assert rank_correlation(ranks, np.exp(ranks)) == pytest.approx((1, 1, 1))
    rho, low, high = rank_correlation(ranks, np.random.default_rng(1).permutation(ranks))
    assert -1 < low < rho < high < 1


def test_a_forecast_is_exact_where_its_basis_is():
    """A straight line by order 1 of Taylor, and of Hermite at sigma = sqrt(1/2); a parabola by neither."""
    line = torch.arange(20.0)[:, None, None] * torch.tensor([[1.0], [2.0]]) + 1
    for basis in (Taylor(1), Hermite(1, math.sqrt(0.5))):
        assert forecast_errors(line, basis, interval=5) == pytest.approx([0, 0], abs=1e-6)
        assert (forecast_errors(line.square(), basis, interval=5) > 0.01).all()
    assert (forecast_errors(line, Taylor(0), interval=5) > 0.05).all()
    assert (forecast_errors(line * 1.001, Taylor(1), interval=5, dtype=torch.bfloat16) > 1e-4).all()


def test_reuse_errs_by_hand():
    """Computed are steps 0 and 2 of 0, 1, 2, 3: 0 stands for 1, and 2 for 3."""
    values = torch.arange(4.0)[:, None, None]
    assert forecast_errors(values, Taylor(0), interval=2, first=1) == pytest.approx([math.sqrt(2 / 10)])


def test_the_first_difference_is_of_the_last_two_of_the_first_steps():
    """Of squares, computed at 0, 1, 2 and 4: 4 + (4 - 1) stands for 9, and 16 + (16 - 4) / 2 for 25."""
    values = torch.arange(6.0).square()[:, None, None]
    expected = math.sqrt((2**2 + 3**2) / (9**2 + 25**2))
    assert forecast_errors(values, Taylor(1), interval=2) == pytest.approx([expected])


@pytest.fixture
def model(tiny_pipe_folder) -> ModelConfig:
    return ModelConfig(str(tiny_pipe_folder), None, "float32", "cpu", "none", 32, 32, 6, 3.5, 24)


def test_the_residuals_of_every_block_are_recorded(model):
    """Of all prompts, one after the other; each run by itself gives the same."""
    features = recorded(model, [(Prompt("0", "a sign"), 0), (Prompt("1", "a cat"), 1)], steps=6)
    assert len(features.values) == 6 and features.values.shape[1] == len(features.blocks)
    assert features.blocks[0] == "structure 1" and features.blocks[-1].startswith("detail")
    alone = recorded(model, [(Prompt("1", "a cat"), 1)], steps=6).values
    assert torch.equal(features.values[:, :, -alone.shape[2] :], alone) and alone.std(dim=2).min() > 0


@pytest.mark.parametrize("figure", [Gaussianity(count=1, interval=2), Stability(count=1, intervals=(2, 3))])
def test_a_figure_of_features_ends_in_a_sentence_of_what_it_found(figure, model, tmp_path):
    rows = [row(tmp_path, "Baseline", "Baseline", "a", "a sign", 1.0, steps=12)]
    made = figure.make(results(rows, model_config=model), tmp_path)
    assert {file.suffix for file in made.files} == {".png", ".pdf"}
    assert ("rank correlation" if isinstance(figure, Gaussianity) else "bfloat16 makes it at most") in made.caption
    assert figure.make(results(rows), tmp_path) is None
