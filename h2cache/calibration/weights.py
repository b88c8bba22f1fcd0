"""Weights over earlier outputs that stand in for one that is not computed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fit_weights(history: Sequence[Tensor], target: Tensor, ridge: float) -> tuple[float, ...]:
    """The weights of `history`, newest first, whose sum of products is nearest to `target` in least squares.

    They sum to one, so that what does not change is forecast exactly. `ridge` is relative to the size of the changes
    between the outputs: it keeps weights of outputs that are nearly alike from growing.
    """
    if len(history) == 1:
        return (1.0,)
    newest = history[0].double().flatten()
    changes = torch.stack([output.double().flatten() - newest for output in history[1:]])
    gram = changes @ changes.T
    least = torch.finfo(torch.float32).eps ** 2 * newest.square().sum() + torch.finfo(torch.float32).tiny
    sizes = gram.diagonal().clamp_min(least.item())  # where nothing changed there is nothing to weigh, nor to divide by
    wanted = changes @ (target.double().flatten() - newest)
    weights = torch.linalg.solve(gram + ridge * torch.diag(sizes), wanted).tolist()
    return 1 - sum(weights), *weights


def combine(weights: Sequence[float], history: Sequence[Tensor]) -> Tensor:
    """`sum_k weights[k] * history[k]`."""
    total = history[0] * weights[0]
    for weight, output in zip(weights[1:], history[1:], strict=True):
        total = torch.add(total, output, alpha=weight)
    return total
