"""The figure that sets what a seed changes beside what a cache changes, on images whose distances are known."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from measured import SIZE, results, row

from h2cache.eval.errors import UserError
from h2cache.eval.report.figures import SeedScale
from h2cache.eval.report.figures.style import styled
from h2cache.eval.report.results import BASELINE

ATTRIBUTES = {"a": (1.0, 0.8, 0.6), "b": (1.0, 1.0, 1.0)}  # of the baseline's images, by seed


def distance(shift: int) -> float:
    """PSNR of two pictures that differ by `shift` in 4x4 pixels."""
    return 10 * math.log10(255**2 / (shift**2 * 16 / SIZE**2))


def seeds(folder, metrics=("psnr", "ssim", "attributes"), count=3):
    """Seeds are 30 apart; Near is 5 from its baseline and Far 40; Near changes an attribute of the first image."""
    rows = []
    for prompt, shares in ATTRIBUTES.items():
        for seed in range(count):
            about = (prompt, f"a picture of {prompt}", 4.0)
            share = {"seed": seed, "attributes": shares[seed]}
            rows.append(row(folder, BASELINE, BASELINE, *about, shift=30 * seed, **share))
            first = share | {"attributes": shares[seed] - 0.2 * (prompt == "a" and seed == 0)}
            rows.append(row(folder, "Near", "H2-Cache", *about, shift=30 * seed + 5, psnr=distance(5), **first))
            rows.append(row(folder, "Far", "TeaCache", *about, shift=30 * seed + 40, psnr=distance(40), **share))
    return results(rows, metrics=metrics)


def drawn(found, **fields) -> tuple[Figure, str]:
    with styled():
        made = SeedScale(**fields).draw(found)
    return made.figure, made.caption


def test_distances_are_between_seeds_and_to_the_image_of_the_same_seed(tmp_path):
    """Of three seeds, 30, 30 and 60 apart, each prompt has three pairs."""
    figure, caption = drawn(seeds(tmp_path))
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["another seed", "Near", "Far"]
    dots = [line.get_xdata() for line in left.lines if line.get_marker() == "."]
    for values, expected in zip(dots, ([60, 60, 30, 30, 30, 30], [5] * 6, [40] * 6), strict=True):
        assert np.allclose(values, [distance(shift) for shift in expected])
    assert f"at a median of {distance(30):.1f} dB, and the nearest two at {distance(30):.1f} dB" in caption
    assert "6 pairs of 2 prompts" in caption and f"is at {distance(40):.1f} dB (Far)" in caption
    assert "At the dashed line or beyond: 6 of 6 with Far." in caption
    points = {round(line.get_ydata()[0]): line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"}
    assert points == pytest.approx({0: (0.8 / 3) / 2, 1: (0.2 / 3) / 2, 2: 0})


def test_without_attributes_there_is_one_panel_and_ssim_is_another_scale(tmp_path):
    found = seeds(tmp_path, metrics=("psnr",))
    assert len(drawn(found)[0].axes) == 1
    assert SeedScale(quality="ssim").draw(found) is None, "not measured"
    with pytest.raises(UserError, match="quality='lpips' is not allowed: choose psnr or ssim"):
        SeedScale(quality="lpips")


def test_identical_images_are_told_and_one_seed_is_no_figure(tmp_path):
    found = seeds(tmp_path)
    frame = found.frame.copy()
    frame.loc[frame["setting"] == "Near", "psnr"] = math.inf
    figure, caption = drawn(results(frame.to_dict("records"), metrics=found.metrics))
    assert "6 pairs are identical and have no dot" in caption and len(figure.axes[0].get_yticklabels()) == 3
    assert SeedScale().draw(seeds(tmp_path, count=1)) is None


def test_the_pairs_are_beside_the_figure(tmp_path):
    """Each dot is a row: three pairs of seeds and twice three of an image with its baseline's, of each prompt."""
    files = SeedScale().make(seeds(tmp_path), tmp_path).files
    assert [file.name for file in files] == ["seeds.png", "seeds.pdf", "seeds.csv"]
    data = pd.read_csv(files[-1])
    assert list(data) == ["setting", "prompt_id", "seed", "other_seed", "psnr", "attributes_change"]
    assert dict(data["setting"].value_counts()) == {"another seed": 6, "Near": 6, "Far": 6}
    pairs = data[data["setting"] == "another seed"]
    assert set(zip(pairs["seed"], pairs["other_seed"], strict=True)) == {(0, 1), (0, 2), (1, 2)}
    others = data[data["setting"] == "Near"]
    assert (others["seed"] == others["other_seed"]).all() and np.allclose(others["psnr"], distance(5))
    assert np.allclose(pairs[pairs["prompt_id"] == "a"]["attributes_change"].sort_values(), [0.2, 0.2, 0.4])


def test_the_same_results_make_the_same_file(tmp_path):
    found = seeds(tmp_path)
    first, second = (SeedScale().make(found, tmp_path).files[0].read_bytes() for _ in range(2))
    assert first == second
