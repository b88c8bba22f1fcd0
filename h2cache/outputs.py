"""Skipping the whole model: what a call of it returns, computed or forecast from what earlier calls returned.

A rule that measures nothing decides for all samples alike, so that the outputs of a batch are kept together. What
ControlNet adds inside the model is part of the output, and forecast with it.
"""

from collections.abc import Callable
from typing import Any

import torch

from .call import Call
from .forecasts import advance_terms, extrapolate
from .visit import Visit


def predict(call: Call, visit: Visit, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the call returns: computed and remembered, or forecast with nothing of the model running."""
    if visit.computed:
        output = proceed(*args, **kwargs)
        _remember(call, visit, output[0])
        return output
    return call.denoising.as_returned(_forecast(call, visit))


@torch.no_grad()
def _remember(call: Call, visit: Visit, output: torch.Tensor) -> None:
    step, context = call.context.step, call.context
    elapsed = step - visit.memories[0].computed_step
    # A copy: the output is the caller's, who may write to it.
    kept = (output.detach().clone(),)
    context.outputs = advance_terms(context.outputs, kept, elapsed, visit.stage.order_at(step))
    visit.remember(visit.anchor, step)


@torch.no_grad()
def _forecast(call: Call, visit: Visit) -> torch.Tensor:
    terms = call.context.outputs
    (output,) = extrapolate(terms, visit.coefficients(call.context.step, sample=0))
    return output.clone() if output is terms[0][0] else output
