"""Plans from formulas, where nothing is calibrated: fewer steps, reuse, Taylor, Hermite, Adams-Bashforth."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..policy.forecasts import Features, Forecast, advance_terms, extrapolate

Weights = Mapping[int, tuple[float, ...]]


def even_steps(steps: int, computed: int | Sequence[int]) -> tuple[int, ...]:
    """So many of `steps` steps, evenly spread from the first; a sequence of steps is taken as it is.

    Raises:
        ValueError: for a number that is not between 1 and `steps`.
    """
    if not isinstance(computed, int):
        return tuple(computed)
    if not 1 <= computed <= steps:
        raise ValueError(
            f"computed = {computed}: must be a number from 1 to the {steps} steps, or the steps themselves"
        )
    return tuple(round(index * steps / computed) for index in range(computed))


def forecast_weights(steps: int, computed: Sequence[int], forecast: Forecast) -> Weights:
    """By skipped step, the weights over computed outputs, newest first, that a forecast of these outputs amounts to.

    Follows the forecast's own arithmetic on unit vectors in the place of outputs.
    """
    units = torch.eye(len(computed), dtype=torch.float64)
    terms: list[Features] = []
    weights: dict[int, tuple[float, ...]] = {}
    index = -1
    for step in range(steps):
        if step in computed:
            index += 1
            elapsed = step - computed[index - 1] if index else 1
            terms = advance_terms(terms, (units[index],), elapsed, forecast.order)
        elif terms:
            (vector,) = extrapolate(terms, forecast.coefficients(step - computed[index]))
            weights[step] = _newest_first(vector.tolist(), index)
    return weights


def adams_bashforth_weights(sigmas: Sequence[float], order: int) -> Weights:
    """By step, the weights of the last `order` outputs, newest first, with which it integrates them exactly.

    The outputs are taken as a polynomial in the noise level through their values at the last `order` levels, however
    these are spaced; the first steps have fewer (Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I,
    III.5).

    Args:
        sigmas: noise levels at which the model is called, falling, and the last one, where the run ends.
    """
    weights = {}
    for step in range(1, len(sigmas) - 1):
        start, end = sigmas[step], sigmas[step + 1]
        known = np.asarray(sigmas[max(0, step - order + 1) : step + 1])[::-1]
        # Moments of the step in units of its length, so that the system is well scaled.
        places, powers = (known - start) / (end - start), np.arange(len(known))
        weights[step] = tuple(np.linalg.solve(places[None, :] ** powers[:, None], 1 / (powers + 1)).tolist())
    return weights


def _newest_first(vector: Sequence[float], index: int) -> tuple[float, ...]:
    """Without the outputs that have no say."""
    ordered = list(vector[: index + 1])[::-1]
    while len(ordered) > 1 and ordered[-1] == 0:
        ordered.pop()
    return tuple(ordered)
