"""Which steps to compute, for every budget at once and without a call of the model: the cheapest path through a run.

A step of the plan, from one computed step to the next, misses the reference by what no weights over the last outputs
can make good. How far it misses, squared, is its cost, and is known from the recorded runs alone. A schedule costs the
sum over its steps; dynamic programming finds the cheapest schedule of each length. After DPCache (arXiv 2602.22654),
whose cost is another one: an error of features under a forecast by formula.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

REACH = 0.34  # of all steps, that one step of a plan spans at most
HISTORY = 3  # outputs that the miss is measured with, whatever the plan looks back on
TINY = 1e-30


class PathCosts:
    """Costs of all steps that a plan may make."""

    def __init__(self, gram: np.ndarray, sigmas: Sequence[float], ridge: float):
        """Measure how far each step misses.

        Args:
            gram: (2 * steps + 1, 2 * steps + 1), inner products of the reference's outputs at all steps and its latents
                before all steps and after the last, less the first; a mean over prompts.
            sigmas: noise levels, one more than steps.
            ridge: see `fit_weights`.
        """
        self.steps = steps = len(sigmas) - 1
        reach = max(2, int(REACH * steps + 1))
        self._outputs, self._mixed, self._latents = gram[:steps, :steps], gram[:steps, steps:], gram[steps:, steps:]
        self._ridge = 1 + ridge
        self._costs: dict[tuple[int, int], np.ndarray] = {}  # of a step: by the two outputs before its own
        for start in range(steps):
            for end in range(start + 1, min(steps, start + reach) + 1):
                self._costs[start, end] = self._missed(start, end, sigmas[end] - sigmas[start])

    def of(self, schedule: Sequence[int]) -> float:
        """What a schedule costs; infinite where one of its steps is too long."""
        total = 0.0
        for index, (start, end) in enumerate(pairwise((*schedule, self.steps))):
            known = schedule[max(index - 2, 0) : index]
            cost = self._costs.get((start, end))
            total += np.inf if cost is None else float(cost[(0,) * (2 - len(known)) + tuple(known)])
        return total

    def cheapest(self, longest: int) -> Mapping[int, tuple[int, ...]]:
        """By number of computed steps, up to `longest`, the schedule that costs least."""
        steps, found = self.steps, {}
        # Of all schedules that end with the computed steps a, b and c: what they cost before the step from c. Where
        # there are only two or one, the first step stands for what is not there.
        costs = np.full((steps, steps, steps), np.inf, dtype=np.float32)
        costs[0, 0, 0] = 0
        before: list[np.ndarray] = []
        for count in range(1, longest + 1):
            at_end = np.full_like(costs, np.inf)
            following, chosen = np.full_like(costs, np.inf), np.zeros(costs.shape, dtype=np.int16)
            for (start, end), cost in self._costs.items():
                known = slice(0, max(start, 1))
                reached = costs[known, known, start] + cost
                if end == steps:
                    at_end[known, known, start] = reached
                else:
                    chosen[known, start, end] = reached.argmin(0)
                    following[known, start, end] = reached.min(0)
            last = np.unravel_index(at_end.argmin(), at_end.shape)
            if np.isfinite(at_end[last]):
                found[count] = self._traced([int(step) for step in last], before, count)
            before.append(chosen)
            costs = following
        return found

    def _traced(self, last: Sequence[int], before: Sequence[np.ndarray], count: int) -> tuple[int, ...]:
        path = list(last)
        for chosen in reversed(before):
            path.insert(0, int(chosen[path[0], path[1], path[2]]))
        return tuple(path[-count:])

    def _missed(self, start: int, end: int, length: float) -> np.ndarray:
        """By outputs a < b < start, (start, start): the least square of what a step misses, with the output at start.

        Entries in which b is 0 are without a. Where there is no output before, (1, 1).
        """
        outputs, mixed, latents = self._outputs, self._mixed, self._latents
        # What is to be reached beyond the newest output's own direction, and what the changes between outputs give.
        square = latents[end, end] - 2 * latents[start, end] + latents[start, start]
        square += length**2 * outputs[start, start] - 2 * length * (mixed[start, end] - mixed[start, start])
        if start == 0:
            return np.full((1, 1), square)
        wanted = mixed[:, end] - mixed[:, start] - length * outputs[:, start]
        wanted = (wanted - wanted[start])[:start]
        changes = outputs - outputs[:, [start]] - outputs[[start], :] + outputs[start, start]
        changes = changes[:start, :start]
        sizes = changes.diagonal() * self._ridge
        alone = wanted**2 / (sizes + TINY)
        determinant = np.maximum(np.outer(sizes, sizes) - changes**2, TINY)
        both = np.outer(sizes, wanted**2) + np.outer(wanted**2, sizes) - 2 * changes * np.outer(wanted, wanted)
        # (a, b): of a pair that is in order, what both take off; the first output alone, where there is one.
        gained = np.where(np.arange(start)[:, None] < np.arange(start)[None, :], both / determinant, -np.inf)
        gained[0, 0] = alone[0]
        return np.maximum(square - gained, 0)
