"""What can be asked of a method's setting, and what measuring one gives."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..config import CacheConfig


@dataclass(frozen=True)
class Trial:
    """What one setting gave, over the prompts.

    `computed_fraction` of all blocks; `psnr`, mean in dB against the uncached images (infinite where every image is the
    same); `wall_speedup`, median ratio of the times of whole pipeline calls, uncached to cached: of this machine, in
    this hour. With the target WallSpeedup an uncached call stands right before each cached one, else there is one for
    each prompt.
    """

    config: CacheConfig
    computed_fraction: float
    psnr: float
    wall_speedup: float = field(compare=False)

    @property
    def speedup(self) -> float:
        """In blocks: how many times fewer were computed."""
        return 1 / self.computed_fraction


class Target(Protocol):
    """What is asked of a method."""

    def met_by(self, trial: Trial) -> bool:
        """Whether the trial is an answer."""

    def beyond(self, trial: Trial) -> bool:
        """Whether the boundary lies at less skipping than in this trial."""

    def worth(self, trial: Trial) -> tuple[float, float]:
        """The best answer is the one with the largest."""

    def nearness(self, trial: Trial) -> float:
        """Where nothing is an answer: how near a trial came to it."""


@dataclass(frozen=True)
class Psnr:
    """Images at least so near to the uncached ones, in dB on average over the prompts; as fast as can be."""

    decibels: float

    def __post_init__(self) -> None:
        _require_positive(self, "decibels")

    def met_by(self, trial: Trial) -> bool:
        return trial.psnr >= self.decibels and trial.computed_fraction < 1

    def beyond(self, trial: Trial) -> bool:
        return trial.psnr < self.decibels

    def worth(self, trial: Trial) -> tuple[float, float]:
        return trial.speedup, trial.psnr

    def nearness(self, trial: Trial) -> float:
        return trial.psnr if trial.computed_fraction < 1 else -math.inf

    def __str__(self) -> str:
        return f"{self.decibels:g} dB with anything skipped"


@dataclass(frozen=True)
class Speedup:
    """At least so many times fewer blocks computed; images as near to the uncached ones as can be."""

    times: float

    def __post_init__(self) -> None:
        _require_positive(self, "times")

    def of(self, trial: Trial) -> float:
        """What is compared with `times`."""
        return trial.speedup

    def met_by(self, trial: Trial) -> bool:
        return self.of(trial) >= self.times * (1 - 1e-9)  # a fraction of blocks is not exact in floating point

    def beyond(self, trial: Trial) -> bool:
        return self.met_by(trial)

    def worth(self, trial: Trial) -> tuple[float, float]:
        return trial.psnr, self.of(trial)

    def nearness(self, trial: Trial) -> float:
        return self.of(trial)

    def __str__(self) -> str:
        return f"{self.times:g} times fewer blocks"


@dataclass(frozen=True)
class WallSpeedup(Speedup):
    """Pipeline calls at least so many times faster, as measured; images as near to the uncached ones as can be.

    Times are not the same twice: give three prompts or more, and expect a few percent of difference on others.
    """

    def of(self, trial: Trial) -> float:
        return trial.wall_speedup

    def __str__(self) -> str:
        return f"{self.times:g} times the speed"


def _require_positive(target: Any, name: str) -> None:
    value = getattr(target, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{type(target).__name__}.{name} = {value!r}: must be a finite number above 0")
