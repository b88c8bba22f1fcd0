"""What a metric of images is: how it is called and shown, what loads it, and what it then looks at."""

from collections.abc import Callable
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
    """What metrics are loaded with."""

    device: torch.device
    online: bool
    clipiqa_checkpoint: Path | None


@dataclass(frozen=True)
class Metric:
    """A number for one image. `h2cache.eval.metrics.registry.METRICS` has ours by name; pyiqa has many more.

    Fields:
        label: its name in tables and figures, a unit after the comma.
        load: makes what scores. Unavailable, and OSError, say that it cannot be had.
        version: changes when its scores may; for the key under which they are kept.
        form: a format specification for tables, or "%" for percents.
        fetches: whether `load` may ask a network.
    """

    label: str
    load: Callable[[Means], Scorer]
    version: Callable[[Means], str] = lambda means: "1"
    needs_reference: bool = False
    lower_is_better: bool = False
    form: str = ".4f"
    fetches: bool = False
