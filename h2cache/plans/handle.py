"""A plan at work on a pipeline: `h2cache.apply` swaps the scheduler, the handle keeps the record and puts it back."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..adapters import adapter_of, transformers_of
from ..handle import Handle
from ..policy.rules import Decision
from ..trace import Row
from .conditions import Conditions, digest, model_of
from .plan import PlanConfig
from .scheduler import PlanScheduler

logger = logging.getLogger("h2cache")

STAGE, CONTEXT = "model", "cond"  # a scheduler sees one output a step, after guidance


class PlanHandle(Handle):
    """A plan that a pipeline follows."""

    def __init__(self, pipe: Any, config: PlanConfig):
        """Make the scheduler. The pipeline is left as it is until `attach`.

        Raises:
            TypeError: for anything but a pipeline with a scheduler that a plan can follow.
        """
        super().__init__()
        if isinstance(pipe, nn.Module) or not hasattr(pipe, "scheduler"):
            raise TypeError(
                f"h2cache.apply got a {type(pipe).__name__}: a plan skips steps of a pipeline, so pass the pipeline, "
                "h2cache.apply(pipe, PlanConfig(plan)); in a loop of your own use h2cache.PlanScheduler"
            )
        self.pipe = pipe
        self.replaced = False  # by a later `h2cache.apply`
        self.scheduler = PlanScheduler(config.plan, pipe.scheduler, config.allow_transfer)
        self.scheduler.watcher = self
        self._config = config
        self._blocks = blocks_in(pipe)
        self._run = 0
        self._attached = False
        self._trace.expect([STAGE])

    def attach(self) -> None:
        """Give the pipeline the scheduler."""
        self._earlier = self.pipe.scheduler
        self.pipe.scheduler = self.scheduler
        self._attached = True

    @property
    def config(self) -> PlanConfig:
        """The settings in force."""
        return self._config

    def update(self, **changes: Any) -> None:
        """Change settings from the next run on; the run in progress keeps its timesteps.

        Raises:
            ValueError: for an unknown field or a value out of range; nothing is changed.
            RuntimeError: if the plan was removed or replaced.
        """
        if not self._attached or self.pipe.scheduler is not self.scheduler:
            raise RuntimeError("this plan was removed or replaced by another: call h2cache.apply again")
        self._config = self._config.updated(**changes)
        self.scheduler.use(self._config.plan, self._config.allow_transfer)

    def reset(self) -> None:
        """Forget the outputs of the run in progress."""
        self.scheduler.reset()

    def summary(self) -> dict[str, Any]:
        """See `Trace.summary`; and `promise`, in a sentence, where the plan has one and no transfer is allowed."""
        promise = None if self._config.allow_transfer else self._config.plan.promise
        return super().summary() | ({} if promise is None else {"promise": str(promise)})

    def held_bytes(self) -> int:
        """Bytes of the outputs that the scheduler holds at this moment; zero once the denoising loop is over."""
        return self.scheduler.held_bytes()

    def remove(self) -> None:
        """Give the pipeline the scheduler back that it had before `apply`. The trace stays readable. Idempotent.

        A scheduler that was put in its place meanwhile stays, and a warning says so.
        """
        if self.replaced:
            logger.warning(
                "handle.remove(): this plan was already replaced by a later h2cache.apply, which stays: remove it by "
                "the handle that this later call returned"
            )
        elif self._attached and self.pipe.scheduler is not self.scheduler:
            logger.warning("handle.remove(): the pipeline has another scheduler by now, which stays")
        self._detach()

    def replace(self) -> None:
        """Detach in favour of another method."""
        self._detach()
        self.replaced = True

    def _detach(self) -> None:
        if self._attached and self.pipe.scheduler is self.scheduler:
            self.pipe.scheduler = self._earlier
        self._attached = False
        self.scheduler.reset()

    # What the scheduler asks and tells.

    def conditions(self) -> Conditions:
        """Model and guidance, as the pipeline has them now."""
        model, guidance = model_of(self.pipe), getattr(self.pipe, "guidance_scale", None)
        return Conditions(
            model=None if model is None else digest(model),
            guidance=None if guidance is None else float(guidance),
        )

    def note(self, steps: range, timesteps: Sequence[float], batch: int, is_first: bool) -> None:
        """Add a row for each step and sample to the trace; called after each step of the scheduler.

        Args:
            steps: of the run, the computed one and the skipped ones after it.
            timesteps: theirs.
            batch: samples.
            is_first: whether it is the first step of its run.
        """
        if is_first:
            self._run = self._trace.begin_run({STAGE: self._blocks}, self._blocks)
        rows = self._trace.rows_of(self._run)
        for step, timestep in zip(steps, timesteps, strict=True):
            decision = Decision.HIT
            if step == steps.start:
                decision = Decision.WARMUP if is_first else Decision.COMPUTE
            blocks = 0 if decision.skips else self._blocks
            for sample in range(batch):
                rows.append(Row(self._run, step, timestep, CONTEXT, sample, STAGE, None, math.nan, decision, blocks))


def blocks_in(pipe: Any) -> int:
    """How many blocks the pipeline's model has; 1 where it is of a class that no adapter knows."""
    model = transformers_of(pipe)[0]
    try:
        return sum(map(len, adapter_of(model).blocks(model).values()))
    except TypeError:
        return 1
