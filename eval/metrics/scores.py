"""Metrics of drawn images, each computed once: a file of lines that is only ever added to."""

import json
import math
from pathlib import Path

from PIL import Image

from eval.errors import UserError
from eval.generation.prompts import Prompt
from eval.generation.records import Record
from eval.metrics.registry import Metrics


class Scores:
    """Scores in `file`, one JSON line each: [key, value]. A line that was cut short counts for nothing.

    A key has the metric, its version, the prompt, its word, and the contents of image and reference, so that a score
    can only ever be found for what it was computed from.
    """

    def __init__(self, file: Path, metrics: Metrics):
        self._file = file
        self._metrics = metrics
        self._versions = {name: metrics.version(name) for name in metrics.kinds if name not in metrics.unavailable}
        self._known: dict[str, float] = {}
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            try:
                key, value = json.loads(line)
                self._known[key] = float(value)
            except (ValueError, TypeError):
                continue

    def of(self, record: Record, reference: Record | None, prompt: Prompt) -> dict[str, float]:
        """Every metric of an image, `reference` being the uncached one; NaN where a metric has none."""
        images: dict[Path, Image.Image] = {}
        return {name: self._score(name, record, reference, prompt, images) for name in self._metrics.kinds}

    def _score(
        self, name: str, record: Record, reference: Record | None, prompt: Prompt, images: dict[Path, Image.Image]
    ) -> float:
        if name in self._metrics.unavailable:
            return math.nan
        if not self._metrics.kinds[name].needs_reference:
            reference = None
        elif reference is None:
            return math.nan
        contents = [record.image_sha256, reference and reference.image_sha256]
        key = json.dumps([name, self._versions[name], prompt.text, prompt.word, *contents])
        if key not in self._known:
            pictures = [each and _opened(each.image, images) for each in (record, reference)]
            value = self._metrics.score(name, *pictures, prompt.text, prompt.word)
            if name in self._metrics.unavailable:  # since this image
                return math.nan
            self._known[key] = value
            self._keep(key, value)
        return self._known[key]

    def _keep(self, key: str, value: float) -> None:
        try:
            with self._file.open("ab") as file:
                file.write(b"\n" + json.dumps([key, value]).encode())  # a line that was cut short ends here
        except OSError as error:
            raise UserError(
                f"cannot write {self._file}: {error.strerror}; put that right and run the same command again"
            ) from error


def _opened(path: Path, images: dict[Path, Image.Image]) -> Image.Image:
    """The picture, read once."""
    if path not in images:
        with Image.open(path) as image:
            images[path] = image.convert("RGB")
    return images[path]
