"""The images and videos that the page compares: compressed, within a budget, each kept once."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from h2cache.eval.generation.videos import frames_of
from h2cache.eval.report.figures.measures import Measure, described, measures_of
from h2cache.eval.report.figures.sheet import read_image
from h2cache.eval.report.results import Results

QUALITY = 90  # of WebP
LONGEST = 768  # pixels of a side
LONGEST_OF_FILM = 256  # pixels of a side of a video's frame
EXACT_PIXELS = 2**18  # of all frames together, up to which a video is on the page as it was drawn
WORTH_COMPARING = 2  # settings


@dataclass(frozen=True)
class Comparison:
    """What slider and ballot of one experiment offer, or the player of its videos.

    Fields:
        settings: name to method, in the experiment's order.
        prompts: of the experiment's `of`, as plain data for JSON.
        fps: frames a second; None for images.
        exact: whether every image and frame is there as it was drawn.
    """

    experiment: str
    model: str
    settings: dict[str, str]
    prompts: tuple[dict[str, Any], ...]
    of: int
    fps: int | None
    exact: bool

    @property
    def data(self) -> dict[str, Any]:
        """For the page's script."""
        names = {"experiment": self.experiment, "model": self.model, "fps": self.fps}
        return names | {"settings": list(self.settings), "methods": self.settings, "prompts": list(self.prompts)}


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
        Comparison(
            experiment=each.name,
            model=each.model,
            settings=dict(zip(each.frame["setting"], each.frame["method"], strict=True)),
            prompts=tuple(kept),
            of=len(prompts),
            fps=each.model_config.fps if each.model_config and each.model_config.makes_videos else None,
            exact=all(entry["exact"] for prompt in kept for entry in prompt["images"].values()),
        )
        if kept
        else None
        for each, kept, prompts in zip(results, chosen, offers, strict=True)
    ]
    return compared, {each["image"]: uri for each, uri in store.images.values()}


@dataclass
class _Store:
    """Image files, each encoded once: path to (what an entry says of it, data URI)."""

    images: dict[Path, tuple[dict[str, Any], str]]
    size: int = 0

    def entry(self, path: Path) -> dict[str, Any]:
        """Its key, how many frames it has, and whether it is exact."""
        if path not in self.images:
            frames = frames_of(read_image(path))
            sheet, exact = _film(frames) if len(frames) > 1 else _picture(frames[0])
            encoded = _encoded(sheet, exact)
            self.size += len(encoded)
            uri = f"data:image/webp;base64,{base64.b64encode(encoded).decode()}"
            self.images[path] = ({"image": str(len(self.images)), "frames": len(frames), "exact": exact}, uri)
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
        row["setting"]: {
            **store.entry(Path(row["image"])),
            "note": described(measures, row),
            "evaluations": row["evaluations"],
        }
        for _, row in rows.iterrows()
    }
    first = rows.iloc[0]
    return {"id": str(first["prompt_id"]), "text": str(first["prompt"]), "images": images}


def _picture(image: Image.Image) -> tuple[Image.Image, bool]:
    """(as large as the page shows it, False: it is compressed)."""
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image, False


def _film(frames: Sequence[Image.Image]) -> tuple[Image.Image, bool]:
    """(all frames on one sheet, row by row, as many in a row as the square root of their number, rounded up; exact)."""
    exact = sum(frame.width * frame.height for frame in frames) <= EXACT_PIXELS
    if not exact:
        for frame in frames:
            frame.thumbnail((LONGEST_OF_FILM, LONGEST_OF_FILM), Image.Resampling.LANCZOS)
    width, height = frames[0].size
    columns = math.ceil(math.sqrt(len(frames)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height))
    for index, frame in enumerate(frames):
        sheet.paste(frame, (index % columns * width, index // columns * height))
    return sheet, exact


def _encoded(image: Image.Image, exact: bool) -> bytes:
    file = BytesIO()
    image.save(file, "webp", quality=QUALITY, lossless=exact)
    return file.getvalue()
