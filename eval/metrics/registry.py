"""Image metrics by name: our own (`eval.metrics.images`, `eval.metrics.reader`), and every other one of pyiqa's.

    metrics = Metrics(["psnr", "clipiqa"], device="cpu")
    metrics.unavailable                                     # {"clipiqa": "its weights cannot be fetched (...)"} offline
    metrics.score("psnr", image, reference, prompt, word)   # NaN where a metric does not apply or cannot be had

`clipiqa` is CLIP-IQA as its paper defines it (Wang et al., AAAI 2023): CLIP's RN50 without positional embedding, and
one pair of prompts "Good photo." and "Bad photo."; pyiqa's own default is the mean over five other pairs. The code
published for H2-Cache gives pixels of 0 to 255 to a wrapper that expects 0 to 1, so that the paper's scores are on
another scale: compare changes in percent.
"""

import difflib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.errors import UserError
from eval.metrics import pyiqa_metrics
from eval.metrics.images import psnr, ssim
from eval.metrics.pyiqa_metrics import first_line
from eval.metrics.reader import WEIGHTS as READER
from eval.metrics.reader import WordReader, can_read
from eval.metrics.signs import SIZE

AGAINST_REFERENCE: dict[str, Callable[[Image.Image, Image.Image], float]] = {"psnr": psnr, "ssim": ssim}
WORD_ACCURACY = "word_accuracy"
LABELS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    WORD_ACCURACY: "words right",
    "clipiqa": "CLIP-IQA",
    "lpips": "LPIPS",
    "clipscore": "CLIPScore",
}


# What an image can be compared with, as `psnr@converged`; without `@`, with the baseline's.
BASELINE_IMAGE = "baseline"  # that of the model's own scheduler at the experiment's number of steps
UNCACHED_IMAGE = "uncached"  # that of the setting's own scheduler and steps
CONVERGED_IMAGE = "converged"  # that of very many steps: what all solvers approach
REFERENCES = {
    BASELINE_IMAGE: "to the baseline's image",
    UNCACHED_IMAGE: "to the uncached image of the same scheduler and steps",
    CONVERGED_IMAGE: "to the converged solution",
}


@dataclass(frozen=True)
class Kind:
    """What a metric needs and how to read it.

    Fields:
        name: as an experiment writes it; `metric` is the part before the `@`.
        label: its name in tables and figures.
        reference: one of REFERENCES; None for a metric of an image by itself.
    """

    name: str
    metric: str
    label: str
    reference: str | None
    lower_is_better: bool

    @property
    def needs_reference(self) -> bool:
        return self.reference is not None


def kind(name: str) -> Kind:
    """UserError for a name that is neither ours nor one that pyiqa can score single images with."""
    metric, at, reference = name.partition("@")
    label, needs_reference, lower_is_better = _described(metric)
    if at and (reference not in REFERENCES or not needs_reference):
        allowed = ", ".join(f"{metric}@{each}" for each in REFERENCES) if needs_reference else metric
        raise UserError(f"metrics: {name!r} is not allowed: choose {allowed}")
    reference = (reference or BASELINE_IMAGE) if needs_reference else None
    if reference not in (None, BASELINE_IMAGE):
        quantity, comma, unit = label.partition(", ")
        label = f"{quantity} {REFERENCES[reference]}{comma}{unit}"
    return Kind(name, metric, label, reference, lower_is_better)


def _described(name: str) -> tuple[str, bool, bool]:
    """Of a metric: its label, whether it needs a reference, and whether lower is better."""
    label = LABELS.get(name, name)
    if _is_ours(name):
        return label, name != WORD_ACCURACY, False
    found = pyiqa_metrics.describe(name)
    if found is None:
        known = [*AGAINST_REFERENCE, WORD_ACCURACY, *pyiqa_metrics.names()]
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or list(LABELS)
        raise UserError(f"metrics: {name!r} is no metric of a single image; did you mean {', '.join(near)}?")
    return label, found.needs_reference, found.lower_is_better


class Metrics:
    """Loads what each metric needs; `unavailable` says in a sentence why some cannot be had."""

    def __init__(
        self,
        names: Sequence[str],
        clipiqa_checkpoint: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`clipiqa_checkpoint`: OpenAI's RN50.pt, for machines that cannot fetch it; UserError if it does not load."""
        self.kinds = {name: kind(name) for name in dict.fromkeys(kind(name).metric for name in names)}
        self.unavailable: dict[str, str] = {}
        self._device = torch.device(device)
        self._checkpoint = _existing(clipiqa_checkpoint) if clipiqa_checkpoint else None
        self._reader: WordReader | None = None
        self._networks: dict[str, pyiqa_metrics.Network] = {}
        online = all(_is_ours(name) for name in self.kinds) or pyiqa_metrics.is_online()
        for name in self.kinds:
            self._load(name, online)

    def version(self, name: str) -> str:
        """Changes when the scores of this metric may: for the key under which they are cached."""
        if name in AGAINST_REFERENCE:
            return "1"
        if name == WORD_ACCURACY:
            return f"1-{_digest(READER)}"
        checkpoint = f"-{_digest(self._checkpoint)}" if name == "clipiqa" and self._checkpoint else ""
        return f"pyiqa-{pyiqa_metrics.version()}{checkpoint}"

    def score(
        self, name: str, image: Image.Image, reference: Image.Image | None, prompt: str, word: str | None
    ) -> float:
        """One image's score. NaN where the metric is unavailable, or needs a reference or word that is None.

        psnr is infinite for identical images. word_accuracy is 1.0 where the word is read exactly, else 0.0; it is NaN
        for pictures of another size than flux-mini's and for words with letters that the reader does not know.
        ValueError if image and reference differ in size.
        """
        if name in self.unavailable or (self.kinds[name].needs_reference and reference is None):
            return math.nan
        if name in AGAINST_REFERENCE:
            return AGAINST_REFERENCE[name](image, reference)
        if name == WORD_ACCURACY:
            return self._word_accuracy(image, word)
        pixels = to_tensor(image)
        reference_pixels = to_tensor(reference) if self.kinds[name].needs_reference else None
        if reference_pixels is not None and pixels.shape != reference_pixels.shape:
            raise ValueError(f"images of different size: {image.size} and {reference.size}")
        try:
            return self._networks[name].score(pixels, reference_pixels, prompt)
        except Exception as error:  # a metric may dislike a size or a prompt in as many ways as pyiqa has metrics
            self.unavailable[name] = f"it fails on an image of {image.width}x{image.height} ({first_line(error)})"
            return math.nan

    def _load(self, name: str, online: bool) -> None:
        given = self._checkpoint if name == "clipiqa" else None
        try:
            if name == WORD_ACCURACY:
                self._reader = WordReader.load(READER)
            elif not _is_ours(name):
                self._networks[name] = pyiqa_metrics.load(name, self._device, online, given)
        except Exception as error:  # hubs, archives and optional packages fail in more ways than can be listed
            if given and not isinstance(error, ImportError):
                raise UserError(
                    f"clipiqa_checkpoint={given} does not load as OpenAI's CLIP RN50.pt ({first_line(error)}); "
                    "fetch it again, or leave the option out"
                ) from error
            self.unavailable[name] = pyiqa_metrics.why_not_loaded(error, online)

    def _word_accuracy(self, image: Image.Image, word: str | None) -> float:
        if word is None or not can_read(word) or image.size != (SIZE, SIZE):
            return math.nan
        return float(self._reader.read(image.convert("RGB")) == word)


def to_tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) float32 RGB in [0, 1], as pyiqa wants it."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)


def _is_ours(name: str) -> bool:
    return name in AGAINST_REFERENCE or name == WORD_ACCURACY


def _existing(path: Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"clipiqa_checkpoint={path}: no such file; give OpenAI's CLIP RN50.pt, or leave the option out")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
