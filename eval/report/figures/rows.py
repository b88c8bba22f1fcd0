"""Images of every method side by side, one row a prompt, with a close look at where they differ most."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from h2cache.eval.report.figures.images import ImageGrid, Strip, difference
from h2cache.eval.report.figures.sheet import GAP, Box, Sheet


@dataclass(frozen=True, kw_only=True)
class Rows(ImageGrid):
    """Images with crops beneath: the square, `crop` of the shorter side wide, where those of a prompt differ most."""

    name: str = "qualitative"
    title: str = "Images side by side"
    crop: float = 0.35

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 < self.crop <= 1, "crop", "a fraction of the shorter side in (0, 1]")

    @property
    def caption(self) -> str:
        return (
            "Each row is one prompt and one seed. The crop is where the images together differ most from the one "
            "without a cache, the same in the whole row."
        )

    def strip(self, sheet: Sheet, strip: Strip) -> None:
        box = most_different(strip.every[0], strip.every[1:], self.crop)
        sheet.images([(left, width, image, box) for left, width, image, _ in strip.columns(strip.images)])
        sheet.space(GAP / 2)
        sheet.images(strip.columns([image.crop(box) for image in strip.images]))


def most_different(reference: Image.Image, images: Sequence[Image.Image], fraction: float) -> Box:
    """The square, `fraction` of the shorter side wide, over which |image - reference| sums highest over all `images`.

    The one nearest to the centre where several do, as where nothing differs.
    """
    total = np.sum([difference(image, reference) for image in images], axis=0)
    side = max(1, round(fraction * min(total.shape)))
    sums = np.pad(total, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    windows = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    ties = np.argwhere(windows >= windows.max() - 1e-9)
    centre = (np.array(windows.shape) - 1) / 2
    top, left = ties[np.abs(ties - centre).sum(axis=1).argmin()]
    return int(left), int(top), int(left) + side, int(top) + side
