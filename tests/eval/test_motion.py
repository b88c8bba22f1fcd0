"""The figures of what caching does to a video: the error of each frame, when caches hit, and flicker beside PSNR."""

import math

import numpy as np
import pytest
import torch
from measured import results, row, trace

from h2cache.eval.generation.video_latents import frame_errors
from h2cache.eval.report.figures import Motion
from h2cache.eval.report.figures.frame_errors import _sentence
from h2cache.eval.report.figures.motion import discordant, hits_by_step
from h2cache.eval.report.figures.style import styled
from h2cache.eval.report.results import BASELINE


def test_errors_are_relative_and_of_each_frame():
    uncached = torch.full((3, 2, 4), 2.0)
    cached = uncached.clone()
    cached[2, 1] += 1.0
    assert frame_errors(cached, uncached).tolist() == [[0, 0], [0, 0], [0, 0.5]]


def test_the_sentence_names_the_worst_frame():
    words = _sentence({"A": np.array([[9.0, 9.0], [0.1, 0.2]]), "B": np.array([[0.0, 0.0], [0.3, 0.9]])})
    assert "0.15 with A; 0.6 with B" in words and "frame 2 in every panel" in words
    assert "2.00 to 3.00 times" in words
    assert "frames 2, 1" in _sentence({"A": np.array([[0.1, 0.2]]), "B": np.array([[0.2, 0.1]])})


def measured(folder, flickers, hits=None):
    rows = []
    for prompt in range(2):
        about = {"prompt_id": f"p{prompt}", "prompt": "a star"}
        rows.append(row(folder, BASELINE, BASELINE, seconds=1.0, psnr_frames=math.inf, flicker=0.0, **about))
        for k, flicker in enumerate(flickers):
            values = {
                "psnr_frames": 40.0 - k + 20 * prompt,
                "flicker": flicker,
                "trace": trace() if hits is None else hits,
            }
            rows.append(row(folder, f"H2-Cache, {k}", "H2-Cache", seconds=1.0, **values, **about))
    return results(rows)


def test_hits_are_counted_where_a_cache_measures(tmp_path):
    frame = measured(tmp_path, [0.1]).frame
    # Of the six steps of `trace`: structure hits at 1, 3 and 5, detail at 4.
    assert hits_by_step(frame)["H2-Cache"].tolist() == [0, 1, 0, 1, 1, 1]
    forecast = measured(tmp_path, [0.1], trace().assign(diff=math.nan)).frame
    assert hits_by_step(forecast) == {}, "an interval is no decision"


def test_pairs_that_flicker_more_at_a_higher_psnr_are_counted_within_a_prompt(tmp_path):
    frame = measured(tmp_path, [0.1, 0.3, 0.2]).frame
    assert discordant(frame[frame["setting"] != BASELINE]) == (2, 6)


@pytest.mark.parametrize(
    ("flickers", "verdict"),
    [([0.1, 0.2, 0.3, 0.4, 0.5], "Flicker rises as PSNR falls"), ([0.3, 0.1, 0.5, 0.2, 0.4], "PSNR does not tell")],
)
def test_what_is_said_follows_the_data(tmp_path, flickers, verdict):
    with styled():
        drawn = Motion().draw(measured(tmp_path, flickers))
    assert verdict in drawn.caption
    late = trace()
    late.loc[late["step"] < 4, "decision"] = "compute"
    with styled():
        clustered = Motion().draw(measured(tmp_path, flickers, late))
    assert "Hits of H2-Cache cluster in time" in clustered.caption
    assert "H2-Cache 0, 0, 100 %" in clustered.caption


def test_images_have_no_such_figure(tmp_path):
    images = results([row(tmp_path, "H2-Cache", "H2-Cache", "p", "a sign", 1.0)])
    with styled():
        assert Motion().draw(images) is None
