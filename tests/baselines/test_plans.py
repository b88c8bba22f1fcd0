"""The plans of other papers: their weights and schedules by direct computation, on the runs of the tiny pipeline."""

from itertools import combinations, pairwise

import pytest
import torch
from tiny import TEXT_TOKENS

from h2cache import Plan
from h2cache.baselines.plans import bespoke, budcache, dpcache, l2p
from h2cache.plans import Calibration
from h2cache.plans.closed_form import even_steps
from h2cache.plans.simulate import Simulation

STEPS = 9
CALL = dict(height=32, width=64, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS)


@pytest.fixture
def calibration(tiny_pipe):
    search = dict(history=3, ridge=0.0, tries=12, few=1, batch_size=1, rounds=12)
    return Calibration(tiny_pipe, ["a red sign", "TEA"], STEPS, **search, **CALL)


@pytest.fixture
def outputs(calibration):
    """(steps, values): of the model along the uncached runs."""
    runs = calibration.runs
    return torch.stack([runs.compute(step, runs.latents[step]).double().flatten() for step in range(STEPS)])


def test_l2p_forecasts_the_uncached_outputs_by_least_squares(calibration, outputs):
    plan = l2p(calibration, 4)
    assert plan.computed == even_steps(STEPS, 4) == (0, 2, 4, 7)
    for step, (newest, *older) in {1: (0,), 3: (2, 0), 5: (4, 2, 0), 8: (7, 4, 2)}.items():
        changes = torch.stack([outputs[each] - outputs[newest] for each in older] or [outputs[0]], dim=1)
        fitted = torch.linalg.lstsq(changes, outputs[step] - outputs[newest]).solution.tolist() if older else []
        assert plan.weights[step] == pytest.approx((1 - sum(fitted), *fitted), rel=1e-3, abs=1e-4)


def test_dpcache_has_the_schedule_whose_forecasts_are_best(calibration, outputs):
    def error(computed):
        plan, total = Plan.taylor(STEPS, computed), 0.0
        for start, end in pairwise((*computed, STEPS)):
            for step in range(start + 1, end):
                known = [each for each in computed if each <= start][::-1]
                made = sum(w * outputs[k] for w, k in zip(plan.weights[step], known, strict=False))
                total += (made - outputs[step]).square().sum().item()
        return total

    every = [(0, *rest) for rest in combinations(range(1, STEPS), 3)]
    plan = dpcache(calibration, 4)
    assert error(plan.computed) == pytest.approx(min(map(error, every)), rel=1e-3)
    assert plan.weights == Plan.taylor(STEPS, plan.computed).weights


def test_budcache_is_no_worse_than_the_even_schedule_and_reuses(calibration):
    """On what it was searched with, one prompt."""
    plan, runs = budcache(calibration, 4), calibration.runs.first(1)

    def score(followed):
        return runs.decibels(Simulation(runs, 3, 0.0).follow(followed).latents).mean().item()

    assert score(plan) >= score(Plan.reuse(STEPS, 4)) - 1e-3
    assert set(plan.weights.values()) == {(1.0,)} and plan.notes["method"] == "BudCache"


def test_bespoke_weights_are_nearer_than_euler_s(calibration):
    """Learnt on one image, and kept only where they help another."""
    plan, runs = bespoke(calibration, 4), calibration.runs

    def score(followed):
        return runs.decibels(Simulation(runs, 3, 0.0).follow(followed).latents).mean().item()

    assert plan.computed == even_steps(STEPS, 4) and score(plan) > score(Plan.reuse(STEPS, 4)) + 0.5


def test_they_are_for_the_run_that_was_recorded(calibration):
    for make in (budcache, l2p, dpcache, bespoke):
        assert make(calibration, 3).made_for == calibration.runs.conditions
