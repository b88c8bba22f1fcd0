"""What every method's configuration shares: validation with one clear sentence, and the way to its stages."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Self

from .conditions import Conditions
from .stages import Stage


@dataclass(frozen=True)
class CacheConfig:
    """Base of all method configurations: immutable, validated when made.

    `batch_decision="sample"` decides for every image of a batch as if it were alone; `"mean"` averages the metric
    over the batch and decides once for all, as the published code does.
    """

    depends_on_run = False  # a class of methods says so, if they are made for certain conditions

    _: KW_ONLY
    batch_decision: str = "sample"

    def __post_init__(self) -> None:
        self._one_of("batch_decision", ("sample", "mean"))

    @property
    def decides_together(self) -> bool:
        """Whether the images of a batch share one decision."""
        return self.batch_decision == "mean"

    def for_run(self, conditions: Conditions) -> Self:
        """The configuration for a run under these conditions; asked where `depends_on_run`. ValueError where there is
        none."""
        return self

    def compose(self) -> tuple[Stage, ...]:
        """The method as stages, in the order of the network."""
        raise TypeError(f"{type(self).__name__} describes no method; use one of the methods' configs")

    def updated(self, **changes: Any) -> Self:
        """A copy with the given fields changed. ValueError for an unknown field or a value out of range."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"{type(self).__name__} has no field {name!r}; its fields are {', '.join(known)}")
        return replace(self, **changes)

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{type(self).__name__}.{name} = {getattr(self, name)!r}: must be {allowed}")

    def _one_of(self, name: str, choices: Sequence[str]) -> None:
        if getattr(self, name) not in choices:
            self._refuse(name, "one of " + ", ".join(repr(choice) for choice in choices))

    def _threshold(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            self._refuse(name, "a number (relL1 below it is a hit; negative: never hit)")

    def _integer(self, name: str, low: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self._refuse(name, f"an integer >= {low}" + (" or None" if optional else ""))

    def _fraction(self, name: str, closed: bool = False, or_else: str = "") -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 <= value <= 1 if closed else 0 < value < 1):
            self._refuse(name, ("a number in [0, 1]" if closed else "a number in (0, 1)") + or_else)

    def _flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            self._refuse(name, "True or False")
