"""The plans of other papers, made from the recorded runs of a calibration: BudCache, L2P, DPCache, bespoke.

All skip the whole model by a schedule that is fixed beforehand, so each is a `Plan`. The docstrings say what each
paper does, and what is done otherwise here.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from h2cache import Plan
from h2cache.plans import Calibration
from h2cache.plans.closed_form import even_steps
from h2cache.plans.conditions import Conditions
from h2cache.plans.plan import normalized
from h2cache.plans.polish import polish
from h2cache.plans.search import climb
from h2cache.plans.simulate import Simulation

Steps = tuple[int, ...]


def budcache(calibration: Calibration, count: int) -> Plan:
    """BudCache (arXiv 2606.13496): a schedule is searched for at a fixed budget, and the last output is reused.

    Theirs anneals, then climbs, from random schedules. Here it climbs from the even schedule, with as many tries and as
    many prompts as the calibration's own plans.
    """
    steps = calibration.runs.steps
    quick = calibration.runs.first(calibration.few)
    simulation = Simulation(quick, calibration.history, calibration.ridge)

    def score(computed: Steps) -> float:
        return quick.decibels(simulation.follow(Plan.reuse(steps, computed)).latents).mean().item()

    # Neighbours in order of how evenly the outputs change between computed steps.
    gram = _mean_gram(calibration)
    chosen = climb(even_steps(steps, count), steps, score, lambda each: _reuse_cost(gram, each), calibration.tries)
    return _under(calibration, Plan.reuse(steps, chosen), "BudCache")


def l2p(calibration: Calibration, count: int) -> Plan:
    """L2P (arXiv 2604.26365): an even schedule; at each skipped step least-squares weights over computed outputs.

    As in the paper the weights forecast the uncached run's output, over outputs of the uncached run. Here they are over
    the last `history` outputs, and sum to one.
    """
    runs, gram = calibration.runs, _mean_gram(calibration)
    computed = even_steps(runs.steps, count)
    weights = {}
    for step in sorted(set(range(runs.steps)) - set(computed)):
        newest, *older = [each for each in computed if each < step][::-1][: calibration.history]
        changes = np.array([[_change(gram, a, b, newest) for b in older] for a in older]).reshape(
            len(older), len(older)
        )
        wanted = np.array([_change(gram, a, step, newest) for a in older])
        ridge = calibration.ridge * np.diag(changes.diagonal())
        fitted = np.linalg.solve(changes + ridge, wanted) if older else wanted
        weights[step] = normalized((1 - fitted.sum(), *fitted.tolist()))
    return _under(calibration, Plan(Conditions(steps=runs.steps), computed, weights), "L2P")


def dpcache(calibration: Calibration, count: int) -> Plan:
    """DPCache (arXiv 2602.22654): the schedule of the least path cost, by dynamic programming; Taylor's forecast.

    The cost of a step depends on the computed step before it: it is the squared error of what a forecast of order one
    makes of the skipped steps, on recorded runs. Theirs forecasts the features of all blocks; here it is the model's
    output.
    """
    runs, gram = calibration.runs, _mean_gram(calibration)
    chosen = _cheapest_pairs(runs.steps, count, lambda before, start, end: _taylor_cost(gram, before, start, end))
    return _under(calibration, Plan.taylor(runs.steps, chosen), "DPCache")


def bespoke(calibration: Calibration, count: int) -> Plan:
    """A bespoke non-stationary solver (arXiv 2403.01329): all coefficients of a multistep solver by gradient.

    Theirs learns the times as well, and starts from a solver of its own. Here the steps are even, and the start is
    Euler's method, with as many rounds of a plan's polish as the calibration has. Nothing is fitted beforehand, so it
    takes many more of them: 60 for the plans that ship.
    """
    runs = calibration.runs
    computed = even_steps(runs.steps, count)
    start = Plan.reuse(runs.steps, computed)
    weights = polish(runs, computed, start.weights, calibration.history, calibration.rounds)
    return _under(calibration, Plan(start.made_for, computed, weights), "bespoke")


def _under(calibration: Calibration, plan: Plan, name: str) -> Plan:
    return Plan(calibration.runs.conditions, plan.computed, plan.weights, {"method": name, **calibration.noted})


def _mean_gram(calibration: Calibration) -> np.ndarray:
    return calibration.runs.grams.mean(0).numpy()


def _change(gram: np.ndarray, a: int, b: int, origin: int) -> float:
    """The inner product of the changes of the output from step `origin` to a and to b."""
    return gram[a, b] - gram[a, origin] - gram[origin, b] + gram[origin, origin]


def _reuse_cost(gram: np.ndarray, computed: Sequence[int]) -> float:
    """By how much the reused outputs are off, squared."""
    steps = len(gram) // 2
    return sum(
        _change(gram, step, step, start) for start, end in pairwise((*computed, steps)) for step in range(start, end)
    )


def _taylor_cost(gram: np.ndarray, before: int, start: int, end: int) -> float:
    """By how much forecasts of order one from the outputs at `before` and `start` are off up to `end`, squared."""
    total = 0.0
    for step in range(start + 1, end):
        slope = (step - start) / (start - before) if start > before else 0.0
        to, back = _change(gram, step, step, start), _change(gram, before, before, start)
        total += to + slope**2 * back + 2 * slope * _change(gram, step, before, start)
    return total


def _cheapest_pairs(steps: int, count: int, cost: Callable[[int, int, int], float]) -> Steps:
    """The schedule of `count` steps from 0 whose steps, each with the computed step before it, cost least in all."""
    best: dict[tuple[int, int], tuple[float, Steps]] = {(0, 0): (0.0, (0,))}
    for number in range(count):
        longer: dict[tuple[int, int], tuple[float, Steps]] = {}
        is_last = number == count - 1
        for (before, start), (total, path) in best.items():
            for end in [steps] if is_last else range(start + 1, steps - count + number + 2):
                candidate = total + cost(before, start, end), path + (() if is_last else (end,))
                key = (start, end)
                if key not in longer or candidate < longer[key]:
                    longer[key] = candidate
        best = longer
    return min(best.values())[1]
