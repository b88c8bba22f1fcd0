"""A plan for programs that are not diffusers: as numbers, or as a sampler of k-diffusion's kind."""

import inspect
import json
from typing import Any

from . import reference_sampler
from .plan import DIGITS, Plan


def table(plan: Plan) -> dict[str, Any]:
    """`sigmas`, the noise levels at which the model is called, and where the run ends; `strides`, for each of these
    calls, by how much the sample goes along its output and the ones before, newest first.

    Raises:
        ValueError: for a plan that does not know its noise levels, or was not made for flow matching.
    """
    levels, scheduler = plan.made_for.sigmas, plan.made_for.scheduler
    if levels is None:
        raise ValueError("this plan does not know its noise levels: calibrate it again")
    if scheduler is not None and not scheduler.startswith("FlowMatch") and '"use_flow_sigmas": true' not in scheduler:
        raise ValueError(
            f"this plan was made for {scheduler.split()[0]}: only a plan for flow matching can be exported"
        )
    levels = (*levels, 0.0)
    strides = [
        [float(f"{stride:.{DIGITS}g}") for stride in plan.strides(index, levels, index + 1)]
        for index in range(len(plan.computed))
    ]
    return {"sigmas": [levels[step] for step in (*plan.computed, plan.steps)], "strides": strides}


def as_json(plan: Plan) -> str:
    """The table as JSON, and what the plan was made for."""
    return json.dumps({"made_for": plan.made_for.model, **table(plan)}, indent=1) + "\n"


def as_sigmas(plan: Plan) -> str:
    """The noise levels alone, for `sigmas=` of a pipeline. Their last, where the run ends, is left out, as there.

    They are the plan's choice of steps, without its weights: with Euler's method they give other images.
    """
    return json.dumps(table(plan)["sigmas"][:-1]) + "\n"


def as_sampler(plan: Plan) -> str:
    """A Python file with `sample_plan(model, x, ...)`, to be called as the samplers of k-diffusion are."""
    own = table(plan)
    return (
        inspect.getsource(reference_sampler)
        + f"\n\nSIGMAS = {tuple(own['sigmas'])}\nSTRIDES = {tuple(map(tuple, own['strides']))}\n"
    )


FORMATS = (("sigmas", as_sigmas), ("k-diffusion", as_sampler), ("json", as_json))
