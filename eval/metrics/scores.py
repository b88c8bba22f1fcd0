"""Metrics of drawn images, each computed once: a file of lines that is only ever added to."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from h2cache.eval.errors import UserError
from h2cache.eval.generation.prompts import Picture, Prompt
from h2cache.eval.generation.records import Record
from h2cache.eval.metrics.registry import Kind, Metrics, kind


class Scores:
    """Scores in `file`, one JSON line each: [key, value]. A line that was cut short counts for nothing.

    A key has the metric, its version, the prompt, its word, and the contents of image and reference, so that a score
    can only ever be found for what it was computed from.
    """

    def __init__(self, file: Path, metrics: Metrics):
        self._file = file
        self._metrics = metrics
        self._versions = {name: metrics.version(name) for name in metrics.metrics if name not in metrics.unavailable}
        self._known: dict[str, float] = {}
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            try:
                key, value = json.loads(line)
                self._known[key] = float(value)
            except (ValueError, TypeError):
                continue

    def of(
        self, names: Sequence[str], record: Record, references: Mapping[str, Record | Picture], prompt: Prompt
    ) -> dict[str, float]:
        """The metrics `names` of an image, each with its own one of `references`; NaN where it has none."""
        images: dict[Path, Image.Image] = {}
        kinds = [kind(name) for name in names]
        return {each.name: self._score(each, record, references, prompt, images) for each in kinds}

    def _score(
        self,
        of: Kind,
        record: Record,
        references: Mapping[str, Record | Picture],
        prompt: Prompt,
        images: dict[Path, Image.Image],
    ) -> float:
        name, reference = of.metric, references.get(of.reference)
        if name in self._metrics.unavailable or (of.needs_reference and reference is None):
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
