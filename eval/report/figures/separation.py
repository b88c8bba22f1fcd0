"""Functional separation: what caching one stage alone does to an image, beside what caching both does."""

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps

from h2cache.eval.report.figures.images import ImageGrid, Strip, difference
from h2cache.eval.report.figures.sheet import Sheet

COLOURS = "magma"  # monotone in greyscale


@dataclass(frozen=True, kw_only=True)
class Separation(ImageGrid):
    """Images, and beneath each its mean absolute difference from the baseline's over the channels, `amplify` times."""

    name: str = "separation"
    title: str = "Structure and detail cached apart"
    amplify: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.amplify > 0, "amplify", "a number above 0")

    @property
    def caption(self) -> str:
        return (
            "Above, the images; beneath, how far each pixel is from the image without a cache (mean absolute "
            f"difference over the channels, {self.amplify:g} times)."
        )

    def strip(self, sheet: Sheet, strip: Strip) -> None:
        sheet.images(strip.columns(strip.images))
        sheet.space(0.03)
        top = sheet.y
        maps = [difference(image, strip.images[0]) for image in strip.images[1:]]
        sheet.images(strip.columns([_coloured(self.amplify * each) for each in maps]))
        bottom = sheet.y
        sheet.y = top
        self._scale(sheet, strip.lefts[0], strip.width)
        sheet.y = bottom

    def _scale(self, sheet: Sheet, left: float, width: float) -> None:
        """What the colours mean, in the place beneath the baseline."""
        sheet.space(0.3 * width)
        sheet.texts([(left, width, f"difference × {self.amplify:g}")], size=7)
        sheet.space(0.04)
        sheet.images([(left + 0.1 * width, 0.8 * width, _coloured(np.tile(np.linspace(0, 1, 128), (10, 1))), None)])
        sheet.space(0.03)
        sheet.texts([(left, width, f"0 to {255 / self.amplify:.0f} of 255")], size=7)


def _coloured(values: np.ndarray) -> np.ndarray:
    """(H, W) in 0..1, clipped, as (H, W, 3)."""
    return colormaps[COLOURS](np.clip(values, 0, 1))[:, :, :3]
