"""How near to the ground truth each setting takes small pictures, beside a bicubic enlargement."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from h2cache.eval.errors import UserError
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.metrics.registry import TRUTH_IMAGE, Metrics, kind
from h2cache.eval.report.figures.sheet import read_image
from h2cache.eval.report.results import Artifact, Results
from h2cache.eval.report.tables.quantities import Measured, metric
from h2cache.eval.report.tables.sheet import Sheet

BICUBIC = "bicubic"


@dataclass(frozen=True)
class EnlargementTable:
    """The metrics against the truth and those of an image by itself, and what the first gains over bicubic."""

    name: str = "enlargement"
    title: str = "Against the ground truth"

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """`name`.md, .csv and .tex; None where no prompt of the results has a picture and a truth."""
        kinds = [each for name in results.metrics if (each := kind(name)).reference in (None, TRUTH_IMAGE)]
        kinds = [each for each in kinds if each.name not in results.unavailable]
        prompts = {name: prompt for name in results.frame["prompt_id"] if (prompt := _paired(results, name))}
        if not prompts:
            return None
        if not any(each.reference == TRUTH_IMAGE for each in kinds):
            raise UserError(f"EnlargementTable: {results.name} measures nothing against the truth; add psnr@truth")
        kinds.sort(key=lambda each: each.reference is None)
        quantities, measured = [metric(each.name) for each in kinds], Measured.of(results)
        bicubic = {each.name: value for each, value in zip(kinds, self._bicubic(kinds, prompts), strict=True)}
        rows, data = [(BICUBIC, "", *(_text(q, bicubic[q.name]) for q in quantities))], [{"setting": BICUBIC} | bicubic]
        for setting in measured:
            if measured.failed(setting):
                continue
            cells = {q.name: measured.cell(setting, q) for q in quantities}
            gain = cells[kinds[0].name].summary.mean - bicubic[kinds[0].name]
            rows.append((setting, f"{gain:+{kinds[0].form}}", *(cell.text for cell in cells.values())))
            means = {name: cell.summary.mean for name, cell in cells.items()}
            data.append({"setting": setting, f"{kinds[0].name}_gain": gain} | means)
        header = ("setting", f"{kinds[0].short} gained over bicubic", *(q.label for q in quantities))
        notes = (f"Means over {len(prompts)} pictures on {results.model}; bicubic: Pillow's filter, without a model.",)
        return Sheet(self.title, header, tuple(rows), notes).write(pd.DataFrame(data), folder, self.name, results.name)

    def _bicubic(self, kinds: list, prompts: Mapping[str, Prompt]) -> list[float]:
        """The mean of each metric over the enlarged pictures."""
        metrics = Metrics([each.name for each in kinds])
        values = []
        for prompt in prompts.values():
            truth = read_image(prompt.truth.image)
            image = read_image(prompt.picture.image).resize(truth.size, Image.Resampling.BICUBIC)
            scores = [metrics.score(each.metric, image, truth, prompt.text, prompt.word) for each in kinds]
            values.append(scores)
        return pd.DataFrame(values).mean().tolist()


def _paired(results: Results, prompt_id: str) -> Prompt | None:
    prompt = results.prompts.get(prompt_id)
    return prompt if prompt and prompt.picture and prompt.truth else None


def _text(quantity, value: float) -> str:
    return quantity.absent if math.isnan(value) else quantity.text(value)
