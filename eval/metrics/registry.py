"""Metrics of images, of videos and of sets of images by name: our own, an entry of METRICS or SET_METRICS each, and
every other one of pyiqa's.

metrics = Metrics(["psnr", "clipiqa"], device="cpu")
metrics.unavailable                                     # {"clipiqa": "its weights cannot be fetched (...)"} offline
metrics.score("psnr", image, reference, prompt, word)   # NaN where a metric does not apply or cannot be had
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from h2cache.eval.errors import UserError
from h2cache.eval.metrics import preference, pyiqa_metrics
from h2cache.eval.metrics.attributes import ADHERENCE
from h2cache.eval.metrics.frames import CLIP_ATTRIBUTES, DIRECTION, FLICKER, FRAME_PSNR, WORST_FRAME
from h2cache.eval.metrics.images import PSNR, SSIM
from h2cache.eval.metrics.metric import Means, Metric, Scorer, Shown, Unavailable
from h2cache.eval.metrics.reader import WORD_ACCURACY
from h2cache.eval.metrics.sets import LOOK, Features, SetMetric
from h2cache.eval.metrics.vbench import VBENCH
from h2cache.eval.metrics.weights import is_online
from h2cache.eval.models.identity import content_hash

METRICS: dict[str, Metric] = {
    "psnr": PSNR,
    "ssim": SSIM,
    "word_accuracy": WORD_ACCURACY,
    "attributes": ADHERENCE,
    "pickscore": preference.PICKSCORE,
    "hpsv2": preference.HPSV2,
    "imagereward": preference.IMAGEREWARD,
    "clipiqa_published": preference.CLIPIQA_PUBLISHED,
    "psnr_frames": FRAME_PSNR,
    "psnr_worst_frame": WORST_FRAME,
    "flicker": FLICKER,
    "clip_attributes": CLIP_ATTRIBUTES,
    "direction": DIRECTION,
    **VBENCH,
}

SET_METRICS: dict[str, SetMetric] = {"look": LOOK}

# What an image can be compared with, as `psnr@converged`; without `@`, with the baseline's.
BASELINE_IMAGE = "baseline"  # that of the model's own scheduler at the experiment's number of steps
UNCACHED_IMAGE = "uncached"  # that of the setting's own scheduler and steps
CONVERGED_IMAGE = "converged"  # that of very many steps: what all solvers approach
TRUTH_IMAGE = "truth"  # the prompt set's: what a perfect result shows
REFERENCES = {
    BASELINE_IMAGE: "to the baseline's image",
    UNCACHED_IMAGE: "to the uncached image of the same scheduler and steps",
    CONVERGED_IMAGE: "to the converged solution",
    TRUTH_IMAGE: "to the ground truth",
}


@dataclass(frozen=True)
class Kind:
    """A metric as an experiment writes it.

    Fields:
        name: as it is written; `metric` is the part before the `@`.
        label: its name in tables and figures; `short` says nothing of the reference.
        reference: one of REFERENCES; None for a metric of an image by itself.
        has_zero: whether a change can be told in percent.
        form: a format specification for tables, or "%" for percents.
        of_images, of_videos: what it can be taken of.
    """

    name: str
    metric: str
    label: str
    short: str
    reference: str | None
    lower_is_better: bool
    has_zero: bool
    form: str
    of_images: bool
    of_videos: bool

    @property
    def needs_reference(self) -> bool:
        return self.reference is not None


def kind(name: str) -> Kind:
    """UserError for a name that is neither ours nor one that pyiqa can score single images with."""
    metric, at, reference = name.partition("@")
    found = _metric(metric)
    if at and (reference not in REFERENCES or not found.needs_reference):
        allowed = ", ".join(f"{metric}@{each}" for each in REFERENCES) if found.needs_reference else metric
        raise UserError(f"metrics: {name!r} is not allowed: choose {allowed}")
    reference = (reference or BASELINE_IMAGE) if found.needs_reference else None
    quantity, comma, unit = found.label.partition(", ")
    to = f" {REFERENCES[reference]}" if reference not in (None, BASELINE_IMAGE) else ""
    facts = (found.lower_is_better, found.has_zero, found.form, found.of_images, found.of_videos)
    return Kind(name, metric, f"{quantity}{to}{comma}{unit}", quantity, reference, *facts)


class Metrics:
    """Loads what each metric needs; `unavailable` says in a sentence why some cannot be had."""

    def __init__(
        self,
        names: Sequence[str],
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        sets: Sequence[str] = (),
    ) -> None:
        """Load the metrics `names` of images or videos, and `sets`, those of sets.

        `weights`: a folder for machines that cannot fetch them (docs/metrics.md); UserError if one does not load.
        """
        self.metrics = {metric: _metric(metric) for metric in dict.fromkeys(kind(name).metric for name in names)}
        of_sets = {name: set_metric(name) for name in sets}
        fetches = any(metric.fetches for metric in (*self.metrics.values(), *of_sets.values()))
        self._means = Means(torch.device(device), not fetches or is_online(), weights)
        self.unavailable: dict[str, str] = {}
        self._scorers: dict[str, Scorer] = {}
        self.features: dict[str, Features] = {}  # of the metrics of sets that can be had
        for loaded, metrics in ((self._scorers, self.metrics), (self.features, of_sets)):
            for name, metric in metrics.items():
                try:
                    loaded[name] = metric.load(self._means)
                except Unavailable as error:
                    self.unavailable[name] = str(error)

    def version(self, name: str) -> str:
        """Changes when the scores of this metric may: for the key under which they are kept."""
        metric = self.metrics[name]
        contents = (content_hash(path) for path in self._means.local(metric.files))
        return "-".join([metric.version(self._means), *contents])

    def score(
        self, name: str, image: Image.Image, reference: Image.Image | None, prompt: str, word: str | None
    ) -> float:
        """One image's score. NaN where the metric is unavailable, does not apply, or needs a reference that is None.

        ValueError if image and reference differ in size.
        """
        compares = self.metrics[name].needs_reference
        if name in self.unavailable or (compares and reference is None):
            return math.nan
        if compares and image.size != reference.size:
            raise ValueError(f"images of different size: {image.size} and {reference.size}")
        try:
            return self._scorers[name](Shown(image, reference, prompt, word))
        except Unavailable as error:
            self.unavailable[name] = str(error)
            return math.nan


def set_metric(name: str) -> SetMetric:
    """UserError for a name that is neither ours nor one that pyiqa can compare sets with."""
    found = SET_METRICS.get(name) or pyiqa_metrics.set_metric(name)
    if found is None:
        known = ", ".join([*SET_METRICS, *pyiqa_metrics.OF_SETS])
        raise UserError(f"set_metrics: {name!r} is no metric of a set of images: choose from {known}")
    return found


def _metric(name: str) -> Metric:
    found = METRICS.get(name) or pyiqa_metrics.metric(name)
    if found is None:
        known = [*METRICS, *pyiqa_metrics.names()]
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or [*METRICS, *pyiqa_metrics.LABELS]
        raise UserError(f"metrics: {name!r} is no metric of a single image; did you mean {', '.join(near)}?")
    return found
