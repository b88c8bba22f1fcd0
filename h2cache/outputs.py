"""Skipping the whole model: what a call of it returns, computed or forecast from what earlier calls returned.

A rule that measures nothing decides for all samples alike, so that the outputs of a batch are kept together. What
ControlNet adds inside the model is part of the output, and forecast with it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .forecasts import WeightedHistory
from .graph import outside_graph
from .visit import Visit


def predict(call: Call, visit: Visit, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the call returns: computed and remembered, or forecast with nothing of the model running."""
    context = call.context
    if not visit.computed:
        return call.denoising.as_returned(context.forecasts.pop(context.step))
    output = proceed(*args, **kwargs)
    _remember(call, visit.stage.forecast, output[0])
    visit.remember(visit.anchor, context.step)
    return output


@outside_graph
def _remember(call: Call, forecast: WeightedHistory, output: Tensor) -> None:
    """Keep an output, and make the forecasts of all steps up to the next computed one."""
    context = call.context
    newest = output.detach().unsqueeze(0)
    before = newest[:0] if context.outputs is None else context.outputs[: forecast.order]
    context.outputs = torch.cat([newest, before])  # a copy: the output is the caller's, who may write to it
    skipped = forecast.skipped_after(context.step)
    if skipped:
        exact = torch.promote_types(output.dtype, torch.float32)
        (table,) = call.run.once(forecast, (), lambda: (forecast.table(exact, output.device),))
        made = weighted(context.outputs, table[skipped.start : skipped.stop])
        context.forecasts = dict(zip(skipped, made, strict=True))


def weighted(history: Tensor, rows: Tensor) -> Tensor:
    """(S, ...): `history` (K, ...), newest first, combined by each of the S `rows` of weights of its older members.

    `rows` is (S, K - 1) or wider, and its dtype is calculated in; the newest has what is missing to a sum of one. One
    matrix product on the changes since the older members, so that what it rounds, also where the caller allows TF32, is
    small as the changes are.
    """
    flat = history.flatten(1).to(rows.dtype)
    newest, older = flat[:1], flat[1:]
    made = flat.new_empty(len(rows), flat.shape[1])
    # Autocast leaves calls alone that are given a place for their result.
    torch.addmm(newest, rows[:, : len(older)], older - newest, out=made)
    return made.to(history.dtype).view(len(rows), *history.shape[1:])
