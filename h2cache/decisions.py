"""Hit or compute? The rule of a stage, and the reasons that the trace records."""

from dataclasses import dataclass
from enum import StrEnum

from .memory import SampleMemory


class Decision(StrEnum):
    """Why a stage was computed or skipped for one sample."""

    WARMUP = "warmup"  # computed: too early in the run to have anything to compare with
    COMPUTE = "compute"  # computed: the probe changed too much, was not finite, or had hit too often in a row
    HIT = "hit"  # skipped: the probe changed less than the threshold
    FORCED = "forced"  # skipped: an earlier stage of this call was skipped for this sample

    @property
    def skips(self) -> bool:
        return self in (Decision.HIT, Decision.FORCED)


@dataclass(frozen=True)
class Threshold:
    """Skip while relL1 between the probe at the last computed step and now is strictly below `threshold`.

    A negative threshold never hits; NaN is below nothing. The first `warmup_steps` calls of a run always compute, and
    after `max_consecutive_hits` skips in a row (forced ones count) the stage computes.
    """

    threshold: float
    warmup_steps: int = 1
    max_consecutive_hits: int | None = None

    def without_measuring(self, memory: SampleMemory, step: int, parent_skipped: bool) -> Decision | None:
        """The decision where no comparison is needed, else None."""
        if step < self.warmup_steps:
            return Decision.WARMUP
        if memory.reference is None:
            return Decision.COMPUTE
        if self.max_consecutive_hits is not None and memory.consecutive_hits >= self.max_consecutive_hits:
            return Decision.COMPUTE
        return Decision.FORCED if parent_skipped else None

    def measured(self, difference: float | None) -> Decision:
        """The decision at a measured relL1; None: there was nothing sound to compare with."""
        return Decision.HIT if difference is not None and difference < self.threshold else Decision.COMPUTE
