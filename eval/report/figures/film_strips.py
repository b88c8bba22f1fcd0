"""Videos frame by frame, one setting beneath the other, with what a cache changed in each frame."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from h2cache.eval.generation.videos import frames_of
from h2cache.eval.report.figures.images import difference
from h2cache.eval.report.figures.measures import described, measures_of
from h2cache.eval.report.figures.output import Drawn, FigureOutput, row_of, select
from h2cache.eval.report.figures.sheet import Sheet, read_image
from h2cache.eval.report.figures.style import PAGE
from h2cache.eval.report.results import BASELINE, Results


@dataclass(frozen=True, kw_only=True)
class FilmStrips(FigureOutput):
    """`settings` (none given: all) beneath the baseline, on the first `count` prompts or on `prompt_ids`.

    Of each video `frames` frames, evenly spaced, the first and the last among them; beneath those of a cache how far
    each is from the baseline's, `gain` times. Prompts of which a setting has no video are left out.
    """

    name: str = "film_strips"
    title: str = "Videos frame by frame"
    settings: tuple[str, ...] = ()
    prompt_ids: tuple[str, ...] = ()
    count: int = 2
    frames: int = 9
    gain: float = 4.0
    metrics: tuple[str, ...] = ("psnr_frames", "flicker")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("count", "frames"):
            self._require(getattr(self, field) >= 1, field, "a whole number from 1")
        self._require(self.gain > 0, "gain", "a number above 0")

    def draw(self, results: Results) -> Drawn | None:
        others = [name for name in select(results, "setting", self.settings) if name != BASELINE]
        prompts = select(results, "prompt_id", self.prompt_ids, self.count)
        table = [{name: row_of(results, name, prompt) for name in (BASELINE, *others)} for prompt in prompts]
        complete = [rows for rows in table if all(row is not None for row in rows.values())]
        if not (others and complete):
            return None
        sheet, measures = Sheet(PAGE), measures_of(results, self.metrics)
        for rows in complete:
            sheet.space(0.08)
            sheet.line(rows[BASELINE]["prompt"], size=8, weight="bold")
            baseline = self._shown(rows[BASELINE])
            for name, row in rows.items():
                sheet.space(0.03)
                sheet.line(": ".join(filter(None, (name, described(measures, row)))), size=7)
                shown = self._shown(row)
                self._put(sheet, shown)
                if name != BASELINE:
                    self._put(sheet, [self._changes(*pair) for pair in zip(shown, baseline, strict=True)])
        return Drawn(
            sheet.figure(),
            "Frames of a video from left to right. The gray row beneath a setting is the mean absolute difference of "
            f"each frame from that of the baseline, {self.gain:g} times.",
        )

    def _shown(self, row: pd.Series) -> list[Image.Image]:
        every = frames_of(read_image(row["image"]))
        places = np.linspace(0, len(every) - 1, min(self.frames, len(every)))
        return [every[round(place)] for place in places]

    def _changes(self, frame: Image.Image, reference: Image.Image) -> np.ndarray:
        """(H, W, 3) in 0..1, black where nothing differs."""
        return np.repeat((self.gain * difference(frame, reference)).clip(0, 1)[..., None], 3, axis=2)

    @staticmethod
    def _put(sheet: Sheet, frames: list) -> None:
        width, lefts = sheet.columns(len(frames))
        sheet.images([(left, width, frame, None) for left, frame in zip(lefts, frames, strict=True)])
