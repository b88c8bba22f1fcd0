"""The images that the page's slider compares: compressed, within a budget, each kept once."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from h2cache.eval.report.figures.measures import Measure, described, measures_of
from h2cache.eval.report.results import Results

QUALITY = 90  # of WebP
LONGEST = 768  # pixels of a side
WORTH_COMPARING = 2  # settings


@dataclass(frozen=True)
class Comparison:
    """What slider and ballot of one experiment offer: `prompts` of the experiment's `of`, as plain data for JSON."""

    experiment: str
    model: str
    settings: tuple[str, ...]
    prompts: tuple[dict[str, Any], ...]
    of: int

    @property
    def data(self) -> dict[str, Any]:
        names = {"experiment": self.experiment, "model": self.model}
        return {**names, "settings": list(self.settings), "prompts": list(self.prompts)}


def comparisons(results: Sequence[Results], budget: int) -> tuple[list[Comparison | None], dict[str, str]]:
    """(a comparison or None for each experiment, image key to data URI).

    Prompts are taken in turns, the first of every experiment, then the second, while the images stay below `budget`
    bytes in all; each experiment has one at least. An experiment without two settings' images has no comparison.
    """
    offers = [_prompts(each) for each in results]
    chosen: list[list[dict[str, Any]]] = [[] for _ in results]
    store = _Store({})
    full = False
    for turn in range(max(map(len, offers), default=0)):
        for prompts, kept in zip(offers, chosen, strict=True):
            if turn < len(prompts) and not (full and kept):
                kept.append(_entry(prompts[turn], store))
                full = store.size > budget
    compared = [
        Comparison(each.name, each.model, tuple(dict.fromkeys(each.frame["setting"])), tuple(kept), len(prompts))
        if kept
        else None
        for each, kept, prompts in zip(results, chosen, offers, strict=True)
    ]
    return compared, {key: uri for key, uri in store.images.values()}


@dataclass
class _Store:
    """Image files, each encoded once: path to (key, data URI)."""

    images: dict[Path, tuple[str, str]]
    size: int = 0

    def key(self, path: Path) -> str:
        if path not in self.images:
            encoded = _encoded(path)
            self.size += len(encoded)
            uri = f"data:image/webp;base64,{base64.b64encode(encoded).decode()}"
            self.images[path] = (str(len(self.images)), uri)
        return self.images[path][0]


def _prompts(results: Results) -> list[tuple[list[Measure], pd.DataFrame]]:
    """What is said about images, and the rows of each prompt that has some to compare."""
    there = results.frame[[Path(path).is_file() for path in results.frame["image"]]]
    groups = [rows for _, rows in there.groupby("prompt_id", sort=False)]
    measures = measures_of(results, [*results.metrics, "computed_fraction", "denoising_seconds"])
    return [(measures, rows) for rows in groups if rows["setting"].nunique() >= WORTH_COMPARING]


def _entry(prompt: tuple[list[Measure], pd.DataFrame], store: _Store) -> dict[str, Any]:
    measures, rows = prompt
    images = {
        row["setting"]: {"image": store.key(Path(row["image"])), "note": described(measures, row)}
        for _, row in rows.iterrows()
    }
    first = rows.iloc[0]
    return {"id": str(first["prompt_id"]), "text": str(first["prompt"]), "images": images}


def _encoded(path: Path) -> bytes:
    with Image.open(path) as image:
        shown = image.convert("RGB")
    shown.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    file = BytesIO()
    shown.save(file, "webp", quality=QUALITY)
    return file.getvalue()
