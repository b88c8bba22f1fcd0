"""What every method's configuration shares: validation with one clear sentence, and the way to its stages."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .policy.stages import Stage

if TYPE_CHECKING:
    from .handle import Handle


@dataclass(frozen=True)
class CacheConfig:
    """Base of all method configurations: immutable, validated when made.

    `batch_decision="sample"` decides for every image of a batch as if it were alone; `"mean"` averages the metric
    over the batch and decides once for all, as the published code does.

    Class attributes:
        record_name: what stored records call the method, whatever module its class moves to; empty: where it is now.
        added_fields: fields that old records lack. They say nothing there while they have their default.
    """

    record_name: ClassVar[str] = ""
    added_fields: ClassVar[tuple[str, ...]] = ()

    _: KW_ONLY
    batch_decision: str = "sample"

    def __post_init__(self) -> None:
        self._one_of("batch_decision", ("sample", "mean"))

    @property
    def decides_together(self) -> bool:
        """Whether the images of a batch share one decision."""
        return self.batch_decision == "mean"

    @property
    def split_fraction(self) -> float:
        """The fraction of a lone block list that is structure; by default FLUX.1's share, 19 of 57 blocks."""
        return 1 / 3

    def handle_for(self, target: object) -> "Handle | None":
        """The handle, not yet attached, of a method that works on a whole pipeline; None for a method on blocks.

        Raises:
            TypeError: where `target` cannot have the method.
        """
        return None

    def compose(self) -> tuple[Stage, ...]:
        """The method as stages, in the order of the network."""
        raise TypeError(f"{type(self).__name__} describes no method; use one of the methods' configs")

    def identity(self) -> dict[str, Any]:
        """What an image depends on, for records: `{"method": name, "fields": values}`."""
        absent = [name for name in self.added_fields if getattr(self, name) == getattr(type(self), name)]
        values = {name: value for name, value in asdict(self).items() if name not in absent}
        return {"method": self.record_name or f"{type(self).__module__}.{type(self).__qualname__}", "fields": values}

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
