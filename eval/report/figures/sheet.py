"""A sheet of images and lines of text at places given in inches, so that nothing overlaps whatever the text is."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from h2cache.eval.errors import UserError
from h2cache.eval.report.figures.style import DPI, LINE, wrap

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of an image; right and bottom excluded
MARGIN, GAP = 0.05, 0.08  # inches around the sheet, and between images
MOST_COLUMNS = 6


@dataclass
class Sheet:
    """Filled from the top; `y` is how far it is filled, in inches."""

    width: float
    y: float = MARGIN
    _texts: list[tuple] = field(default_factory=list)
    _images: list[tuple] = field(default_factory=list)

    def columns(self, count: int) -> tuple[float, list[float]]:
        """(width, left edges) of `count` columns of images."""
        width = (self.width - 2 * MARGIN - GAP * (count - 1)) / count
        return width, [MARGIN + number * (width + GAP) for number in range(count)]

    def bands(self, names: list[str]) -> list[list[str]]:
        """`names` in as few groups as possible, of nearly one size, that leave a column free beside them."""
        count = -(-len(names) // (MOST_COLUMNS - 1))
        size = -(-len(names) // count)
        return [names[start : start + size] for start in range(0, len(names), size)]

    def line(self, text: str, **style) -> None:
        """A text from the left edge, wrapped at the right one."""
        self.texts([(MARGIN, self.width - 2 * MARGIN, text)], align="left", **style)

    def texts(self, entries: list[tuple[float, float, str]], align: str = "center", **style) -> None:
        """Wrapped texts (left edge, width, text) side by side, standing on one line; the tallest sets the height."""
        size, weight = style.get("size", 8), style.get("weight", "normal")
        wrapped = [(left, width, wrap(text, width, size, weight)) for left, width, text in entries]
        tallest = max(len(lines) for _, _, lines in wrapped)
        anchor = {"left": 0.0, "center": 0.5}[align]
        for left, width, lines in wrapped:
            for number, line in enumerate(lines, tallest - len(lines)):
                self._texts.append((left + anchor * width, self.y + (number + 0.5) * LINE, line, align, style))
        self.y += tallest * LINE

    def images(self, entries: list[tuple[float, float, Image.Image | np.ndarray, Box | None]]) -> None:
        """Images (left edge, width, pixels, outlined box) side by side, their tops aligned; enlarged by Lanczos.

        Arrays are written as they are, without smoothing.
        """
        self._images += [(left, self.y, width, pixels, box) for left, width, pixels, box in entries]
        self.y += max(width * _shape(pixels)[1] / _shape(pixels)[0] for _, width, pixels, _ in entries)

    def space(self, inches: float) -> None:
        self.y += inches

    def figure(self) -> Figure:
        """The sheet as a figure as tall as what it holds."""
        height = self.y + MARGIN
        figure = Figure(figsize=(self.width, height))
        for x, y, text, align, style in self._texts:
            figure.text(x / self.width, 1 - y / height, text, ha=align, va="center", **style)
        for left, top, width, pixels, box in self._images:
            tall = width * _shape(pixels)[1] / _shape(pixels)[0]
            ax = figure.add_axes((left / self.width, 1 - (top + tall) / height, width / self.width, tall / height))
            ax.set_axis_off()
            ax.imshow(_sized(pixels, width), interpolation="nearest", aspect="auto", extent=(0, 1, 1, 0))
            if box is not None:
                ax.add_patch(_outline(box, _shape(pixels)))
        return figure


def read_image(path: Path) -> Image.Image:
    """The RGB image; UserError where it cannot be read."""
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error}; run the experiment again to draw it") from error


def _shape(pixels: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height)"""
    return pixels.size if isinstance(pixels, Image.Image) else pixels.shape[1::-1]


def _sized(pixels: Image.Image | np.ndarray, width: float) -> np.ndarray:
    if isinstance(pixels, np.ndarray):
        return pixels
    across, down = pixels.size
    target = round(width * DPI)
    return np.asarray(pixels.resize((target, round(target * down / across)), Image.Resampling.LANCZOS))


def _outline(box: Box, size: tuple[int, int]) -> Rectangle:
    left, top, right, bottom = box
    corner = (left / size[0], top / size[1])
    extent = ((right - left) / size[0], (bottom - top) / size[1])
    halo = [Stroke(linewidth=2.2, foreground="black"), Normal()]  # seen on dark images as on bright ones
    return Rectangle(corner, *extent, fill=False, edgecolor="white", linewidth=1, path_effects=halo, gid="crop")
