"""Weights over earlier outputs that stand in for one that is not computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 4  # of reweighted least squares; the images change by less than 0.1 dB after that


def fit_weights(history: Sequence[Tensor], target: Tensor, ridge: float) -> tuple[float, ...]:
    """The weights of `history`, newest first, whose sum of products is nearest to `target`; each (prompts, ...).

    Nearest in the sum of the prompts' distances, not of their squares: one run that has gone astray, and is far from
    where anything could lead it back, would else have more say than all others. Weights sum to one, so that what does
    not change is forecast exactly. `ridge` is relative to the size of the changes between the outputs: it keeps weights
    of outputs that are nearly alike from growing.
    """
    if len(history) == 1:
        return (1.0,)
    newest = history[0].double().flatten(1)
    changes = torch.stack([output.double().flatten(1) - newest for output in history[1:]], dim=1)
    wanted = target.double().flatten(1) - newest
    grams = changes @ changes.mT  # (prompts, K, K), as all that follows is small
    products = (changes @ wanted.unsqueeze(2)).squeeze(2)
    squares = wanted.square().sum(1)
    precision = torch.finfo(torch.float32)
    least = precision.eps**2 * newest.square().sum().item() + precision.tiny
    say = torch.ones_like(squares)
    for _ in range(ROUNDS):
        gram = torch.einsum("p,pkl->kl", say, grams)
        sizes = gram.diagonal().clamp_min(least)  # where nothing changed there is nothing to weigh or divide by
        weights = torch.linalg.solve(gram + ridge * torch.diag(sizes), say @ products)
        missed = squares - 2 * products @ weights + (grams @ weights) @ weights
        say = missed.clamp_min(least).rsqrt()
        say = say / say.mean()
    older = weights.tolist()
    return 1 - sum(older), *older


def combine(weights: Sequence[float], history: Sequence[Tensor]) -> Tensor:
    """`sum_k weights[k] * history[k]`, over as many as there are weights."""
    total = history[0] * weights[0]
    for weight, output in zip(weights[1:], history[1:], strict=False):
        total = torch.add(total, output, alpha=weight)
    return total
