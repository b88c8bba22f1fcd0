"""What was made of small pictures, beside the picture given and the ground truth, with a crop beneath each."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from h2cache.eval.report.figures.measures import described, measures_of
from h2cache.eval.report.figures.output import Drawn, FigureOutput, row_of, select
from h2cache.eval.report.figures.rows import most_different
from h2cache.eval.report.figures.sheet import GAP, Sheet, read_image
from h2cache.eval.report.figures.style import PAGE
from h2cache.eval.report.results import BASELINE, Results

GIVEN, BICUBIC, TRUTH = "given", "bicubic", "ground truth"


@dataclass(frozen=True, kw_only=True)
class Crops(FigureOutput):
    """`settings` beside the baseline, on the first `count` prompts or on `prompt_ids` that have a picture and a truth.

    The crop, `crop` of the shorter side wide, is where the bicubic enlargement is furthest from the truth.
    """

    name: str = "crops"
    title: str = "Small pictures, what was made of them, and the truth"
    settings: tuple[str, ...] = ()
    prompt_ids: tuple[str, ...] = ()
    count: int = 4
    crop: float = 0.4
    metrics: tuple[str, ...] = ("psnr@truth",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.count >= 1, "count", "a whole number from 1")
        self._require(0 < self.crop <= 1, "crop", "a fraction of the shorter side in (0, 1]")

    def draw(self, results: Results) -> Drawn | None:
        settings = [BASELINE, *(name for name in select(results, "setting", self.settings) if name != BASELINE)]
        measures = measures_of(results, self.metrics)
        columns = [GIVEN, BICUBIC, *settings, TRUTH]
        sheet = Sheet(PAGE)
        width, lefts = sheet.columns(len(columns))
        shown = 0
        for prompt_id in select(results, "prompt_id", self.prompt_ids, self.count):
            prompt = results.prompts.get(prompt_id)
            rows = [row_of(results, name, prompt_id) for name in settings]
            if prompt is None or not (prompt.picture and prompt.truth) or any(row is None for row in rows):
                continue
            if not shown:
                sheet.texts([(left, width, name) for left, name in zip(lefts, columns, strict=True)], weight="bold")
            shown += 1
            given, truth = (read_image(each.image) for each in (prompt.picture, prompt.truth))
            enlarged = given.resize(truth.size, Image.Resampling.BICUBIC)
            box = most_different(truth, [enlarged], self.crop)
            images = [enlarged, *(read_image(row["image"]) for row in rows), truth]
            pixels = np.asarray(given)
            sheet.space(GAP)
            sheet.line(prompt.text, size=7)
            whole = [(left, width, image, box) for left, image in zip(lefts[1:], images, strict=True)]
            sheet.images([(lefts[0], width, pixels, None), *whole])
            sheet.space(GAP / 2)
            part = _matching(pixels, box, truth.size)
            crops = [(left, width, image.crop(box), None) for left, image in zip(lefts[1:], images, strict=True)]
            sheet.images([(lefts[0], width, part, None), *crops])
            notes = ["", "", *(described(measures, row) for row in rows), ""]
            sheet.space(0.02)
            sheet.texts([(left, width, note) for left, note in zip(lefts, notes, strict=True)], size=7)
        if not shown:
            return None
        return Drawn(
            sheet.figure(),
            "Each row is one picture and one seed: as it was given, enlarged by a bicubic filter, by the model without "
            "and with caches, and the picture that it was made from. The crop is where the bicubic enlargement is "
            "furthest from the truth.",
        )


def _matching(given: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """The pixels of the small picture that a box of the large one, of this size, covers in whole or in part."""
    height, width = given.shape[:2]
    left, right = box[0] * width // size[0], -(-box[2] * width // size[0])
    top, bottom = box[1] * height // size[1], -(-box[3] * height // size[1])
    return given[top:bottom, left:right]
