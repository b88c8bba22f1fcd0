"""Hit or compute? The rules of stages, and the reasons that the trace records."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from .memory import Context, Moment, SampleMemory


class Decision(StrEnum):
    """Why a stage was computed or skipped for one sample."""

    WARMUP = "warmup"  # computed: too early in the run to have anything to compare with
    COMPUTE = "compute"  # computed: changed too much, not finite, skipped too often in a row, or the schedule says so
    HIT = "hit"  # skipped: changed less than the threshold, or the schedule says so
    FORCED = "forced"  # skipped: an earlier stage of this call was skipped for this sample

    def __init__(self, reason: str):
        self.skips = reason in ("hit", "forced")


class Rule(Protocol):
    """Decides for one sample of one stage.

    `threshold` is for the trace: NaN where nothing is measured. `follows`: whether the probe of every step becomes the
    next reference, or only that of a computed step.
    """

    threshold: float
    follows: bool

    def without_measuring(self, memory: SampleMemory, step: int, parent_skipped: bool) -> Decision | None:
        """The decision where no comparison is needed, else None."""


class MeasuringRule(Rule, Protocol):
    """A rule that compares a probe with its reference where it must."""

    def measured(
        self, memory: SampleMemory, difference: float | None, context: Context, moment: Moment
    ) -> tuple[Decision, float | None]:
        """The decision at a measured relL1 (None: there was nothing sound to compare with), and the number that was
        compared with the threshold."""


@dataclass(frozen=True)
class Threshold:
    """Skip while relL1 between the probe at the last computed step and now is strictly below `threshold`.

    A negative threshold never hits; NaN is below nothing. The first `warmup_steps` calls of a run always compute, and
    after `max_consecutive_hits` skips in a row (forced ones count) the stage computes.
    """

    threshold: float
    warmup_steps: int = 1
    max_consecutive_hits: int | None = None
    follows = False

    def without_measuring(self, memory: SampleMemory, step: int, parent_skipped: bool) -> Decision | None:
        if step < self.warmup_steps:
            return Decision.WARMUP
        if memory.reference is None:
            return Decision.COMPUTE
        if self.max_consecutive_hits is not None and memory.consecutive_hits >= self.max_consecutive_hits:
            return Decision.COMPUTE
        return Decision.FORCED if parent_skipped else None

    def measured(
        self, memory: SampleMemory, difference: float | None, context: Context, moment: Moment
    ) -> tuple[Decision, float | None]:
        hit = difference is not None and difference < self.threshold
        return Decision.HIT if hit else Decision.COMPUTE, difference


@dataclass(frozen=True)
class Accumulated:
    """Skip until the rescaled changes since the last computed step add up to `threshold` (TeaCache, arXiv 2411.19108).

    Each step adds the polynomial of relL1 between the probes of the previous step and now. The first and the last of
    `num_steps` steps always compute; None finds the last one out (`Context.ends_with`). A negative threshold never
    hits, whatever the polynomial says; a sum that is NaN computes.
    """

    threshold: float
    coefficients: tuple[float, ...]  # highest power first
    num_steps: int | None = None
    follows = True

    def without_measuring(self, memory: SampleMemory, step: int, parent_skipped: bool) -> Decision | None:
        if step == 0:
            return Decision.WARMUP
        is_last = self.num_steps is not None and step == self.num_steps - 1
        return Decision.COMPUTE if is_last or memory.reference is None else None

    def measured(
        self, memory: SampleMemory, difference: float | None, context: Context, moment: Moment
    ) -> tuple[Decision, float | None]:
        if difference is None:
            return Decision.COMPUTE, None
        memory.accumulated += self.rescaled(difference)
        hit = memory.accumulated < self.threshold and self.threshold >= 0
        if hit and self.num_steps is None and context.ends_with(moment):
            hit = False
        return Decision.HIT if hit else Decision.COMPUTE, memory.accumulated

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
    follows = False

    def without_measuring(self, memory: SampleMemory, step: int, parent_skipped: bool) -> Decision:
        if step < self.first_enhance:
            return Decision.WARMUP
        return Decision.COMPUTE if memory.consecutive_hits >= self.interval - 1 else Decision.HIT


@dataclass(frozen=True)
class StepMask:
    """Compute the steps `computed` of a run of `steps`; after its end compute, or raise unless it is `open_ended`."""

    computed: tuple[int, ...]
    steps: int
    open_ended: bool = False
    threshold = math.nan
    follows = False

    def without_measuring(self, memory: SampleMemory, step: int, parent_skipped: bool) -> Decision:
        if step == 0:
            return Decision.WARMUP
        if step < self.steps:
            return Decision.COMPUTE if step in self.computed else Decision.HIT
        if not self.open_ended:
            raise ValueError(
                f"this plan was made for steps {self.steps} and is run with more: resample it with "
                "plan.resampled(steps), and allow that with PlanConfig(plan, allow_transfer=True)"
            )
        return Decision.COMPUTE
