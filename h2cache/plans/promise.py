"""A promised quality: which of several plans keeps it on prompts that had no part in making them.

Fixed-sequence testing from the slowest plan, with exact binomial p-values: Learn-then-Test, arXiv 2110.01052.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]


def decibels(images: Tensor, references: Tensor) -> Tensor:
    """(B,): how near images in 0..1, (B, 3, H, W), are to references, in dB; 120 where they are the same."""
    return -10 * (images - references).square().flatten(1).mean(1).clamp_min(1e-12).log10()


@dataclass(frozen=True)
class AtLeast:
    """What is asked of a plan: at least so much quality on a fraction of all images.

    Fields:
        psnr: of an image, in dB, against the reference's. None where `measure` is given.
        fraction: of the images of new prompts, above 0 and below 1.
        confidence: over the draw of the calibration's prompts, above 0 and below 1.
        measure: another measure, `measure(images, references)` -> (B,) of images in 0..1, (B, 3, H, W); more is better.
        least: what that measure is to be.
    """

    psnr: float | None = None
    fraction: float = 0.95
    confidence: float = 0.9
    measure: Measure | None = None
    least: float | None = None

    def __post_init__(self) -> None:
        for name in ("fraction", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"AtLeast.{name} = {getattr(self, name)!r}: must be above 0 and below 1")
        if (self.psnr is None) == (self.measure is None) or (self.measure is None) != (self.least is None):
            raise ValueError("AtLeast needs psnr=, or measure= and least=")

    @property
    def level(self) -> float:
        """What the measure is to be."""
        level = self.least if self.psnr is None else self.psnr
        assert level is not None  # `__post_init__` has seen to it
        return level

    @property
    def name(self) -> str:
        """Of the measure."""
        return "PSNR" if self.measure is None else getattr(self.measure, "__name__", "the measure")

    @property
    def prompts_needed(self) -> int:
        """How many held-back prompts it takes, if none of them fails."""
        return math.ceil(math.log(1 - self.confidence) / math.log(self.fraction) - 1e-9)

    def scores(self, images: Tensor, references: Tensor) -> list[float]:
        """The measure of each image."""
        return (self.measure or decibels)(images, references).tolist()


@dataclass(frozen=True)
class Promise:
    """What a plan was certified to keep.

    Fields:
        measure, level, fraction, confidence: see `AtLeast`.
        reference: what images are compared with.
        prompts: held back, on which it was certified. `failures` of them are below the level.
    """

    measure: str
    level: float
    fraction: float
    confidence: float
    reference: str
    prompts: int
    failures: int

    def __str__(self) -> str:
        unit = " dB" if self.measure == "PSNR" else ""
        return (
            f"At least {self.fraction:.0%} of the images have a {self.measure} of {self.level:g}{unit} or more against "
            f"the {self.reference} image, with {self.confidence:.0%} confidence, for prompts like the {self.prompts} "
            f"that it was certified on ({self.failures} of these have less)."
        )

    def to_notes(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_notes(cls, notes: dict[str, Any] | None) -> Self | None:
        return None if notes is None else cls(**notes)


def allowed_failures(prompts: int, fraction: float, confidence: float) -> int:
    """How many of `prompts` images may fail for it to be certain enough that a fraction of all succeeds; -1: none may,
    and there are too few prompts all the same.

    The largest k for which so few failures have a probability of 1 - confidence at most where only `fraction` succeeds.
    """
    total, failures = 0.0, -1
    for k in range(prompts + 1):
        total += math.comb(prompts, k) * (1 - fraction) ** k * fraction ** (prompts - k)
        if total > 1 - confidence:
            break
        failures = k
    return failures


def certified(asked: AtLeast, scores: Sequence[Sequence[float]]) -> int | None:
    """Of plans from the slowest to the fastest, by their scores on held-back prompts, the last that can promise what is
    asked; None where the first cannot. A plan is tested only if all slower ones can, so that the confidence holds for
    the choice."""
    last = None
    for index, of_one in enumerate(scores):
        failures = sum(not score >= asked.level for score in of_one)
        if failures > allowed_failures(len(of_one), asked.fraction, asked.confidence):
            break
        last = index
    return last


def promisable(scores: Sequence[float], fraction: float, confidence: float) -> float | None:
    """The highest level that these scores certify; None where there are too few."""
    failures = allowed_failures(len(scores), fraction, confidence)
    return None if failures < 0 else sorted(scores)[failures]
