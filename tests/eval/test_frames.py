"""Videos in the harness: filmstrips keep every frame, and the metrics of videos say what one computes by hand."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.generation.records import Cell, Drawn, Store
from h2cache.eval.generation.videos import filmstrip, frames_of, notes_of
from h2cache.eval.metrics.frames import flicker, frame_psnrs
from h2cache.eval.metrics.registry import METRICS, Metrics, kind
from h2cache.eval.report.figures import FilmStrips
from tools.hunyuan_mini.clips import Clip, draw

PROMPT = "a red star moving right quickly on a blue background"
STAR = Clip("star", "red", "blue", "right", "quickly")
OF_A_PROMPT = ["clip_attributes", "direction"]


def frames(pixels: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame.astype(np.uint8)) for frame in pixels]


def noise(seed: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 200, (count, 8, 12, 3))


def strip(pixels: np.ndarray) -> Image.Image:
    return filmstrip(frames(pixels))


def test_a_filmstrip_gives_its_frames_back():
    video = frames(noise(0))
    for back in (frames_of(filmstrip(video)), frames_of(filmstrip(video).convert("RGB"))):
        assert [frame.tobytes() for frame in back] == [frame.tobytes() for frame in video]
        assert {frame.size for frame in back} == {(12, 8)}


def test_a_picture_is_a_single_frame():
    picture = Image.new("RGB", (30, 10), "red")
    assert [frame.tobytes() for frame in frames_of(picture)] == [picture.tobytes()]


def test_a_record_keeps_every_frame(tmp_path):
    """In the PNG that it has anyway; the PNG of an image says no more than before."""
    video = frames(noise(1))
    times = {"text_seconds": 0.0, "denoising_seconds": 1.0, "vae_seconds": 0.0, "overhead_seconds": 0.0}
    facts = {"peak_memory_bytes": None, "computed_fraction": 1.0, "machine": "abacus", "versions": "torch 2"}
    work = {"multiply_adds": 1, "calls": 1, "solver": "FlowMatchEulerDiscreteScheduler", "trace": None}
    store = Store(tmp_path, {"weights": "x"})
    record = store.write(Cell(Prompt("a", PROMPT), 0, 5, None), Drawn(filmstrip(video), **times, **facts, **work))
    with Image.open(record.image) as image:
        back = frames_of(image.convert("RGB"))
    assert [frame.tobytes() for frame in back] == [frame.tobytes() for frame in video]
    single = store.write(Cell(Prompt("b", PROMPT), 0, 5, None), Drawn(video[0], **times, **facts, **work))
    plain = io.BytesIO()
    video[0].save(plain, "PNG", compress_level=1)
    assert single.image.read_bytes() == plain.getvalue()


def test_psnr_is_of_each_frame():
    reference = noise(2)
    other = reference.copy()
    other[3] += 10
    values = frame_psnrs(strip(other), strip(reference))
    expected = 10 * math.log10(255**2 / 100)
    assert values == [math.inf, math.inf, math.inf, pytest.approx(expected), math.inf]
    assert METRICS["psnr_worst_frame"].lower_is_better is False
    metrics = Metrics(["psnr_worst_frame", "psnr_frames"])
    assert metrics.score("psnr_worst_frame", strip(other), strip(reference), PROMPT, None) == pytest.approx(expected)
    assert metrics.score("psnr_frames", strip(reference + 10), strip(reference), PROMPT, None) == pytest.approx(
        expected
    )


def test_flicker_is_what_changes_otherwise():
    """A picture that every frame is off by does not flicker; one frame that is off by 10 does so twice."""
    reference = noise(3)
    assert flicker(strip(reference + 20), strip(reference)) == 0
    other = reference.copy()
    other[2] += 10
    assert flicker(strip(other), strip(reference)) == pytest.approx(2 * 10 / 4)
    assert math.isnan(flicker(strip(reference[:1]), strip(reference[:1])))


def test_videos_of_different_length_are_refused():
    with pytest.raises(ValueError):
        frame_psnrs(strip(noise(4)), strip(noise(4, count=4)))


def test_a_video_is_held_against_its_prompt():
    metrics = Metrics(OF_A_PROMPT)
    right, frozen = draw(STAR), np.repeat(draw(STAR)[:1], 17, axis=0)
    scores = {name: metrics.score(name, strip(right), None, PROMPT, None) for name in OF_A_PROMPT}
    assert scores == {"clip_attributes": 1.0, "direction": 1.0}
    scores = {name: metrics.score(name, strip(frozen), None, PROMPT, None) for name in OF_A_PROMPT}
    assert scores == {"clip_attributes": pytest.approx(3 / 5), "direction": 0.0}


@pytest.mark.parametrize("name", OF_A_PROMPT)
def test_other_prompts_and_other_videos_are_not_judged(name):
    metrics = Metrics([name])
    assert math.isnan(metrics.score(name, strip(draw(STAR)), None, "a cat on a mat", None))
    assert math.isnan(metrics.score(name, strip(draw(STAR)[:9]), None, PROMPT, None))


def test_what_is_asked_to_stand_still_has_no_direction():
    still = "a red star standing still on a blue background"
    assert math.isnan(Metrics(["direction"]).score("direction", strip(draw(STAR)), None, still, None))


def test_what_a_metric_can_be_taken_of():
    assert kind("psnr_frames@converged").of_videos and not kind("psnr_frames").of_images
    assert kind("psnr").of_videos and kind("psnr").of_images
    assert kind("word_accuracy").of_images and not kind("word_accuracy").of_videos
    assert not kind("clipiqa").of_videos


def test_film_strips_show_evenly_spaced_frames_and_what_changed(tmp_path):
    video = np.zeros((17, 8, 8, 3)) + np.arange(17)[:, None, None, None] * 10
    strip(video).save(tmp_path / "video.png", pnginfo=notes_of(strip(video)))
    figure = FilmStrips(frames=9, gain=4)
    shown = figure._shown({"image": tmp_path / "video.png"})
    assert [frame.getpixel((3, 3))[0] for frame in shown] == [20 * k for k in range(9)]
    changed = Image.new("RGB", (8, 8), (51, 0, 0))
    np.testing.assert_allclose(figure._changes(changed, Image.new("RGB", (8, 8))), 4 * 51 / 3 / 255)
