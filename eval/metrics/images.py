"""How far one image is from another."""

import math

import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

from h2cache.eval.metrics.metric import Metric


def psnr(image: Image.Image, reference: Image.Image, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio of two RGB images in dB; infinite when they are identical, higher is closer.

    Over the pixels in `mask`, (H, W) booleans; None: over all.
    """
    a, b = _pixels(image, reference)
    errors = (a - b) ** 2
    squared_error = np.mean(errors if mask is None else errors[mask])
    return math.inf if squared_error == 0 else float(10 * np.log10(255**2 / squared_error))


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity of two RGB images (Wang et al. 2004; 7x7 windows, mean of the channels), at most 1."""
    a, b = _pixels(image, reference)
    return float(structural_similarity(a, b, channel_axis=2, data_range=255))


def _pixels(image: Image.Image, reference: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Both images as (H, W, 3) float64 in 0..255."""
    if image.size != reference.size:
        raise ValueError(f"images of different size: {image.size} and {reference.size}")
    return tuple(np.asarray(each.convert("RGB"), dtype=np.float64) for each in (image, reference))


PSNR = Metric(
    "PSNR, dB",
    lambda means: lambda shown: psnr(shown.image, shown.reference),
    needs_reference=True,
    form=".2f",
    of_videos=True,
)
SSIM = Metric("SSIM", lambda means: lambda shown: ssim(shown.image, shown.reference), needs_reference=True)
