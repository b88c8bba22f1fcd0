"""Images without words: a row without a cache, and below it the same with one; the README's picture."""

from dataclasses import dataclass

from h2cache.eval.report.figures.output import Drawn, FigureOutput, row_of, select
from h2cache.eval.report.figures.sheet import GAP, Sheet, read_image
from h2cache.eval.report.figures.style import PAGE
from h2cache.eval.report.results import BASELINE, Results


@dataclass(frozen=True, kw_only=True)
class Banner(FigureOutput):
    """The first `count` prompts, each without a cache above and with `setting` below."""

    setting: str
    name: str = "banner"
    title: str = "Without a cache, and with one"
    count: int = 6

    def draw(self, results: Results) -> Drawn | None:
        (setting,) = select(results, "setting", (self.setting,))
        pairs = [
            [row_of(results, name, prompt) for name in (BASELINE, setting)]
            for prompt in select(results, "prompt_id", (), self.count)
        ]
        complete = [pair for pair in pairs if all(row is not None for row in pair)]
        if not complete:
            return None
        sheet = Sheet(PAGE)
        width, lefts = sheet.columns(len(complete))
        for rows in zip(*complete, strict=True):
            sheet.images([(x, width, read_image(row["image"]), None) for x, row in zip(lefts, rows, strict=True)])
            sheet.space(GAP)
        return Drawn(sheet.figure(), f"Above without a cache, below with {setting}, of the same seeds.")
