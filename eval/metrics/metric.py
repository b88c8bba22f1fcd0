"""What a metric of images is: how it is called and shown, what loads it, and what it then looks at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image


class Unavailable(Exception):
    """A metric cannot be had, or not of this image; the message says why."""


@dataclass(frozen=True)
class Shown:
    """A drawn image, and what a metric may hold it against.

    Fields:
        reference: None for a metric of an image by itself.
        word: that the prompt asks for in writing; None where it asks for none.
    """

    image: Image.Image
    reference: Image.Image | None
    prompt: str
    word: str | None


Scorer = Callable[[Shown], float]  # NaN where the metric does not apply


@dataclass(frozen=True)
class Means:
    """What metrics are loaded with.

    Fields:
        weights: a folder of the user's with some of `Metric.files`.
    """

    device: torch.device
    online: bool
    weights: Path | None

    def local(self, files: Sequence[str]) -> tuple[Path, ...]:
        """These files of the folder `weights`; none unless all are there."""
        found = tuple(self.weights / name for name in files) if self.weights else ()
        return found if all(path.exists() for path in found) else ()


@dataclass(frozen=True)
class Metric:
    """A number for one image. `h2cache.eval.metrics.registry.METRICS` has ours by name; pyiqa has many more.

    Fields:
        label: its name in tables and figures, a unit after the comma.
        load: makes what scores. Unavailable, and OSError, say that it cannot be had.
        version: changes when its scores may; for the key under which they are kept, with the content of local `files`.
        has_zero: whether 0 means nothing, so that a change can be told in percent.
        form: a format specification for tables, or "%" for percents.
        fetches: whether `load` may ask a network.
        files: what it loads from the user's folder of weights, if all are there.
        of_images, of_videos: what it can be taken of.
    """

    label: str
    load: Callable[[Means], Scorer]
    version: Callable[[Means], str] = lambda means: "1"
    needs_reference: bool = False
    lower_is_better: bool = False
    has_zero: bool = True
    form: str = ".4f"
    fetches: bool = False
    files: tuple[str, ...] = ()
    of_images: bool = True
    of_videos: bool = False
