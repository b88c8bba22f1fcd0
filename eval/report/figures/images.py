"""What figures of images share: the baseline first, settings beside it, in bands where they are many."""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from h2cache.eval.report.figures.measures import Measure, described, measures_of
from h2cache.eval.report.figures.output import Drawn, FigureOutput, row_of, select
from h2cache.eval.report.figures.sheet import Sheet, read_image
from h2cache.eval.report.figures.style import PAGE
from h2cache.eval.report.results import BASELINE, Results


@dataclass(frozen=True)
class Strip:
    """One prompt's images in the columns of one band, the baseline's first, and those of `every` setting."""

    images: list[Image.Image]
    notes: list[str]
    every: list[Image.Image]
    lefts: list[float]
    width: float

    def columns(self, pixels: list) -> list[tuple]:
        """Entries of `Sheet.images`: these in their columns, the last ones where they are fewer."""
        lefts = self.lefts[len(self.lefts) - len(pixels) :]
        return [(left, self.width, each, None) for left, each in zip(lefts, pixels, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ImageGrid(FigureOutput):
    """`settings` (none given: all) beside the baseline, on the first `count` prompts or on `prompt_ids`.

    Prompts of which a setting has no image are left out. `metrics` stand under each image.
    """

    settings: tuple[str, ...] = ()
    prompt_ids: tuple[str, ...] = ()
    count: int = 3
    metrics: tuple[str, ...] = ("psnr",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.count >= 1, "count", "a whole number from 1")

    @property
    @abstractmethod
    def caption(self) -> str:
        """What the figure shows."""

    @abstractmethod
    def strip(self, sheet: Sheet, strip: Strip) -> None:
        """Put one prompt's images on the sheet, beneath the line with the prompt."""

    def draw(self, results: Results) -> Drawn | None:
        others = [name for name in select(results, "setting", self.settings) if name != BASELINE]
        prompts = select(results, "prompt_id", self.prompt_ids, self.count)
        table = [{name: row_of(results, name, prompt) for name in (BASELINE, *others)} for prompt in prompts]
        complete = [rows for rows in table if all(row is not None for row in rows.values())]
        if not (others and complete):
            return None
        sheet, measures = Sheet(PAGE), measures_of(results, self.metrics)
        bands = sheet.bands(others)
        width, places = sheet.columns(len(bands[0]) + 1)
        for band in bands:
            columns = [BASELINE, *band]
            lefts = places[: len(columns)]
            sheet.space(0.08)
            sheet.texts([(left, width, name) for left, name in zip(lefts, columns, strict=True)], weight="bold")
            for rows in complete:
                sheet.space(0.08)
                sheet.line(rows[BASELINE]["prompt"], size=7)
                sheet.space(0.03)
                strip = _strip(rows, columns, measures, lefts, width)
                self.strip(sheet, strip)
                self._notes(sheet, strip)
        return Drawn(sheet.figure(), self.caption)

    def _notes(self, sheet: Sheet, strip: Strip) -> None:
        if any(strip.notes):
            sheet.space(0.02)
            texts = [(left, strip.width, text) for left, text in zip(strip.lefts[1:], strip.notes, strict=True)]
            sheet.texts(texts, size=7)


def _strip(
    rows: dict[str, pd.Series], columns: list[str], measures: list[Measure], lefts: list[float], width: float
) -> Strip:
    images = {name: read_image(row["image"]) for name, row in rows.items()}
    notes = [described(measures, rows[name]) for name in columns[1:]]
    shown = [images[name] for name in columns]
    return Strip(shown, notes, list(images.values()), lefts, width)


def difference(image: Image.Image, reference: Image.Image) -> np.ndarray:
    """(H, W) float64 in 0..1: mean absolute difference over the channels."""
    a, b = (np.asarray(each, dtype=np.float64) for each in (image, reference))
    return np.abs(a - b).mean(axis=2) / 255
