"""A plan as other programs read it, made from the definition: noise levels, and steps along the outputs."""

import json
from collections.abc import Sequence
from dataclasses import replace

from h2cache import Plan
from h2cache.plans.plan import normalized


def with_sigmas(plan: Plan, sigmas: Sequence[float]) -> Plan:
    """The plan for the noise levels of its steps."""
    return replace(plan, made_for=replace(plan.made_for, sigmas=tuple(sigmas)))


def exported(plan: Plan) -> str:
    """JSON with `sigmas` at the computed steps and at the end, and `strides`: `(next sigma - sigma) * weight`, summed
    over a computed step and the skipped ones after it, by output, the newest first."""
    levels = (*plan.made_for.sigmas, 0.0)
    strides = []
    for index in range(len(plan.computed)):
        sums = [0.0] * (index + 1)
        for step in plan.segment(index):
            for k, weight in enumerate(normalized(plan.weights.get(step, (1.0,)))):
                sums[k] += (levels[step + 1] - levels[step]) * weight
        strides.append(sums)
    return json.dumps({"sigmas": [levels[step] for step in (*plan.computed, plan.steps)], "strides": strides})
