"""Hit or compute? The rules of stages, and the reasons that the trace records."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class Decision(StrEnum):
    """Why a stage was computed or skipped for one sample."""

    WARMUP = "warmup"  # computed: too early in the run to have anything to compare with
    COMPUTE = "compute"  # computed: changed too much, not finite, skipped too often in a row, or the schedule says so
    HIT = "hit"  # skipped: changed less than the threshold, or the schedule says so
    FORCED = "forced"  # skipped: an earlier stage of this call was skipped for this sample

    def __init__(self, reason: str):
        self.skips = reason in ("hit", "forced")


@dataclass
class RuleState:
    """What a rule may know of one sample of one stage.

    Fields:
        reference: the probe that the next one is compared with, (1, tokens', channels') float32; None: there is none.
        consecutive_hits: skips since the last computed step.
        accumulated: what the rule has summed up since then.
    """

    reference: Tensor | None = None
    consecutive_hits: int = 0
    accumulated: float = 0.0


class Rule(Protocol):
    """Decides for one sample of one stage.

    Attributes:
        threshold: for the trace; NaN where nothing is measured.
        reference_every_step: the probe of every step becomes the next reference, not only that of a computed step.
    """

    @property
    def threshold(self) -> float: ...

    @property
    def reference_every_step(self) -> bool: ...

    def without_measuring(self, state: RuleState, step: int, parent_skipped: bool) -> Decision | None:
        """The decision where no comparison is needed, else None."""


class MeasuringRule(Rule, Protocol):
    """A rule that compares a probe with its reference where it must."""

    def measured(
        self, state: RuleState, difference: float | None, is_last_step: Callable[[], bool]
    ) -> tuple[Decision, float | None]:
        """The decision at a measured difference.

        Args:
            state: of the sample; a rule may add to `accumulated`.
            difference: relL1 of reference and probe; None where there was nothing sound to compare with.
            is_last_step: whether the step is known to be the last of its run.

        Returns:
            The decision, and the number that was compared with the threshold.
        """


@dataclass(frozen=True)
class Threshold:
    """Skip while relL1 between the probe at the last computed step and now is strictly below `threshold`.

    A negative threshold never hits; NaN is below nothing. The first `warmup_steps` calls of a run always compute, and
    after `max_consecutive_hits` skips in a row (forced ones count) the stage computes.
    """

    threshold: float
    warmup_steps: int = 1
    max_consecutive_hits: int | None = None
    reference_every_step = False

    def without_measuring(self, state: RuleState, step: int, parent_skipped: bool) -> Decision | None:
        if step < self.warmup_steps:
            return Decision.WARMUP
        if state.reference is None:
            return Decision.COMPUTE
        if self.max_consecutive_hits is not None and state.consecutive_hits >= self.max_consecutive_hits:
            return Decision.COMPUTE
        return Decision.FORCED if parent_skipped else None

    def measured(
        self, state: RuleState, difference: float | None, is_last_step: Callable[[], bool]
    ) -> tuple[Decision, float | None]:
        hit = difference is not None and difference < self.threshold
        return Decision.HIT if hit else Decision.COMPUTE, difference


@dataclass(frozen=True)
class Accumulated:
    """Skip until the rescaled changes since the last computed step add up to `threshold` (TeaCache, arXiv 2411.19108).

    Each step adds the polynomial of relL1 between the probes of the previous step and now. The first and the last of
    `num_steps` steps always compute; None finds the last one out
    (`runtime.layout.Call.is_last_step`). A negative threshold never hits, whatever the polynomial says; a sum
    that is NaN computes.
    """

    threshold: float
    coefficients: tuple[float, ...]  # highest power first
    num_steps: int | None = None
    reference_every_step = True

    def without_measuring(self, state: RuleState, step: int, parent_skipped: bool) -> Decision | None:
        if step == 0:
            return Decision.WARMUP
        is_last = self.num_steps is not None and step == self.num_steps - 1
        return Decision.COMPUTE if is_last or state.reference is None else None

    def measured(
        self, state: RuleState, difference: float | None, is_last_step: Callable[[], bool]
    ) -> tuple[Decision, float | None]:
        if difference is None:
            return Decision.COMPUTE, None
        state.accumulated += self.rescaled(difference)
        hit = state.accumulated < self.threshold and self.threshold >= 0
        if hit and self.num_steps is None and is_last_step():
            hit = False
        return Decision.HIT if hit else Decision.COMPUTE, state.accumulated

    def rescaled(self, difference: float) -> float:
        """The polynomial at `difference`, by Horner's rule."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * difference + coefficient
        return value


@dataclass(frozen=True)
class Interval:
    """Compute the first `first_enhance` steps and then one step in `interval`, counted from the last computed one."""

    interval: int
    first_enhance: int
    threshold = math.nan
    reference_every_step = False

    def without_measuring(self, state: RuleState, step: int, parent_skipped: bool) -> Decision:
        if step < self.first_enhance:
            return Decision.WARMUP
        return Decision.COMPUTE if state.consecutive_hits >= self.interval - 1 else Decision.HIT
