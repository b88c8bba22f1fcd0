"""How a video differs from another, frame by frame, and whether it shows what its prompt asks for.

A video is looked at as `h2cache.eval.generation.videos.filmstrip` keeps it.
"""

import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
from PIL import Image

from h2cache.eval.files import file_digest
from h2cache.eval.generation.videos import frames_of
from h2cache.eval.metrics.clips import ClipAttributes, pixels_of, told, watch
from h2cache.eval.metrics.images import psnr
from h2cache.eval.metrics.metric import Means, Metric, Scorer, Shown
from h2cache.eval.metrics.motions import DIRECTIONS
from h2cache.eval.metrics.reader import WEIGHTS, loaded_reader


def frame_psnrs(strip: Image.Image, reference: Image.Image) -> list[float]:
    """PSNR of each frame in dB; ValueError if the videos differ in length or size."""
    return [psnr(a, b) for a, b in zip(frames_of(strip), frames_of(reference), strict=True)]


def flicker(strip: Image.Image, reference: Image.Image) -> float:
    """Mean absolute difference between what changes from frame to frame in two videos, in levels of 255.

    0 for a video that is off by the same picture in every frame; NaN for a single frame.
    """
    videos = [np.stack([np.asarray(frame, np.float64) for frame in frames_of(each)]) for each in (strip, reference)]
    changes = [np.diff(video, axis=0) for video in videos]
    return float(np.abs(changes[0] - changes[1]).mean()) if len(changes[0]) else math.nan


def _compared(score: Callable[[Image.Image, Image.Image], float]) -> Callable[[Means], Scorer]:
    return lambda means: lambda shown: score(shown.image, shown.reference)


def _asked(score: Callable[[ClipAttributes, ClipAttributes], float]) -> Callable[[Means], Scorer]:
    """What scores a video against its prompt; NaN for prompts and videos that are not hunyuan-mini's."""

    def load(means: Means) -> Scorer:
        signs = loaded_reader().signs  # its palette is hunyuan-mini's too

        def scored(shown: Shown) -> float:
            try:
                asked, pixels = told(shown.prompt, signs.colours), pixels_of(frames_of(shown.image))
            except ValueError:
                return math.nan
            return score(asked, watch(pixels, signs.palette, signs.colours))

        return scored

    return load


def _attributes_right(asked: ClipAttributes, seen: ClipAttributes) -> float:
    names = [field.name for field in fields(ClipAttributes)]
    return float(np.mean([getattr(asked, name) == getattr(seen, name) for name in names]))


def _direction_right(asked: ClipAttributes, seen: ClipAttributes) -> float:
    return float(asked.motion == seen.motion) if asked.motion in DIRECTIONS else math.nan


_OF_VIDEOS = {"of_images": False, "of_videos": True}
_READER = {"version": lambda means: f"1-{file_digest(WEIGHTS)}", "form": "%", **_OF_VIDEOS}
_TO_REFERENCE = {"needs_reference": True, **_OF_VIDEOS}
FRAME_PSNR = Metric(
    "PSNR per frame, dB",
    _compared(lambda strip, reference: float(np.mean(frame_psnrs(strip, reference)))),
    form=".2f",
    **_TO_REFERENCE,
)
WORST_FRAME = Metric(
    "PSNR of the worst frame, dB",
    _compared(lambda strip, reference: min(frame_psnrs(strip, reference))),
    form=".2f",
    **_TO_REFERENCE,
)
FLICKER = Metric("flicker, levels", _compared(flicker), lower_is_better=True, form=".3f", **_TO_REFERENCE)
CLIP_ATTRIBUTES = Metric("attributes of the clip right", _asked(_attributes_right), **_READER)
DIRECTION = Metric("direction right", _asked(_direction_right), **_READER)
