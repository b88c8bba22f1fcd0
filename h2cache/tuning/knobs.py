"""The knobs of methods: fields that skip more or less, in an order that a search can follow.

A knob is found by the names of its fields, so that a new method with a threshold or an interval has it as well. It has
positions in ascending order of skipping, up to `most`, at which everything is skipped that can be. `start` is the one
that a method has, `setting` gives the fields that a position sets. `smaller` and `larger` lead to another position, and
`between` to one between two; None where there is none.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from ..config import CacheConfig


@dataclass(frozen=True)
class Thresholds:
    """Thresholds at fixed `ratios` to the first of them; the position is that first one."""

    fields: tuple[str, ...]
    ratios: tuple[float, ...] = (1.0,)
    most = 1e9  # relative changes are of order one; not infinite, since a ratio may be zero

    def start(self, method: CacheConfig) -> float:
        value = getattr(method, self.fields[0])
        return value if 0 < value < self.most else 0.1

    def setting(self, position: float) -> dict[str, Any]:
        return {name: position * ratio for name, ratio in zip(self.fields, self.ratios, strict=True)}

    def smaller(self, position: float) -> float | None:
        return position / 2

    def larger(self, position: float) -> float:
        return position * 2

    def between(self, low: float, high: float) -> float | None:
        return math.sqrt(low * high) if high / low > 1.01 else None


@dataclass(frozen=True)
class Every:
    """A whole number of steps from one computed step to the next: its positions are integers."""

    fields: tuple[str, ...]
    most: float = 10**9

    def start(self, method: CacheConfig) -> float:
        return max(2, getattr(method, self.fields[0]))

    def setting(self, position: float) -> dict[str, Any]:
        return {self.fields[0]: position}

    def smaller(self, position: float) -> float | None:
        return position // 2 or None

    def larger(self, position: float) -> float:
        return position * 2

    def between(self, low: float, high: float) -> float | None:
        return (low + high) // 2 if high - low > 1 else None


Knob = Thresholds | Every

# Ratio 0: the second threshold is never met, so that its stage is skipped only along with the first.
RATIOS = (0.0, 0.75, 1.5, 3.0)
KNOBS: tuple[Knob, ...] = (
    Thresholds(("threshold",)),
    *(Thresholds(("tau1", "tau2"), (1.0, ratio)) for ratio in RATIOS),
    Every(("interval",)),
)


def knobs_of(method: CacheConfig) -> list[Knob]:
    """Those of KNOBS whose fields the method has."""
    names = {each.name for each in fields(method)}
    return [knob for knob in KNOBS if names.issuperset(knob.fields)]


def as_written(method: CacheConfig) -> Knob | None:
    """The one knob that keeps the ratios of the method's own thresholds; None where it has nothing to turn."""
    knobs = knobs_of(method)
    if not knobs:
        return None
    first, *others = (getattr(method, name) for name in knobs[0].fields)
    if not others or first <= 0:
        return knobs[0]
    return Thresholds(knobs[0].fields, (1.0, *(other / first for other in others)))
