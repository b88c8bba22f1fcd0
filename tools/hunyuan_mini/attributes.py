"""What a clip itself shows, as `h2cache.eval.metrics.clips` reads it off a video."""

import numpy as np

from h2cache.eval.metrics.clips import ClipAttributes, watch
from tools.flux_mini.attributes import PALETTE
from tools.flux_mini.scenes import COLOURS

from .clips import Clip


def attributes_of(clip: Clip) -> ClipAttributes:
    return ClipAttributes(clip.shape, clip.colour, clip.background, clip.motion, clip.speed)


def seen_in(pixels: np.ndarray) -> ClipAttributes:
    """What is seen in (17, 64, 64, 3) pixels from 0 to 255."""
    return watch(np.asarray(pixels, np.float32), PALETTE, tuple(COLOURS))
