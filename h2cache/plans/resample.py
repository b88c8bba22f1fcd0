"""A plan for another number of steps."""

import logging
import math
from dataclasses import replace

from .plan import Plan, normalized

logger = logging.getLogger("h2cache")


def resampled(plan: Plan, steps: int) -> Plan:
    """Computed steps and weights at the same parts of the run; see `Plan.resampled`.

    Between the steps that weights were fitted for they are interpolated; where the plan had no step in between they
    carry on the last change, as a line does. Weights at computed steps are not carried over.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"Plan.resampled got steps = {steps!r}: must be an integer >= 1")
    if steps != plan.steps and plan.weights and len(plan.computed) == plan.steps:
        raise ValueError(
            f"this plan skips no step: its weights are right for {plan.steps} steps alone, not for {steps}"
        )
    nearest: dict[int, int] = {}  # of the new steps, the computed step that it stands for
    for step in plan.computed:
        nearest.setdefault(min(round(step * steps / plan.steps), steps - 1), step)
    computed = sorted(nearest)
    weights = {}
    for step in sorted(set(range(steps)) - set(computed)):
        index = max(i for i, earlier in enumerate(computed) if earlier < step)
        end = computed[index + 1] if index + 1 < len(computed) else steps
        part = (step - computed[index]) / (end - computed[index])
        weights[step] = _between(plan, nearest[computed[index]], part)[: index + 1]
        weights[step] = normalized(weights[step])
    if len(computed) == steps > 1 and len(plan.computed) < plan.steps:
        logger.warning("a plan of %d of %d steps skips none of %d steps", len(plan.computed), plan.steps, steps)
    sigmas = plan.made_for.sigmas if steps == plan.steps else None
    notes = {name: value for name, value in plan.notes.items() if name != "promise"}  # it was for the other run
    return Plan(replace(plan.made_for, steps=steps, sigmas=sigmas), tuple(computed), weights, notes)


def _between(plan: Plan, start: int, part: float) -> tuple[float, ...]:
    """The weights at a part (0 to 1) of the way from the computed step `start` to the next one."""
    index = plan.computed.index(start)
    end = plan.computed[index + 1] if index + 1 < len(plan.computed) else plan.steps
    if end - start == 1:
        if index == 0:
            return (1.0,)
        slope = part / (start - plan.computed[index - 1])
        return 1 + slope, -slope
    place = start + part * (end - start)
    low = min(math.floor(place), end - 2)
    near, far = (plan.weights[step] if step != start else (1.0,) for step in (low, low + 1))
    length = max(len(near), len(far))
    near, far = (tuple(each) + (0.0,) * (length - len(each)) for each in (near, far))
    share = min(place - low, 1.0)
    return tuple((1 - share) * a + share * b for a, b in zip(near, far, strict=True))
