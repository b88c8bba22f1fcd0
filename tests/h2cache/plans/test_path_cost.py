"""The cheapest path: what a step costs, by least squares done directly, and the best of all schedules, by trial."""

import itertools

import numpy as np
import pytest

from h2cache.plans.path_cost import PathCosts

STEPS, PROMPTS, SIZE = 8, 3, 40
SIGMAS = np.linspace(1, 0, STEPS + 1) ** 1.5


@pytest.fixture(scope="module")
def run():
    """Outputs (steps, prompts * size) that change smoothly, and the latents of Euler's method along them."""
    draw = np.random.default_rng(0)
    powers = np.arange(STEPS)[:, None] / STEPS
    outputs = sum(powers**k * draw.normal(size=PROMPTS * SIZE) for k in range(4))
    outputs += 0.01 * draw.normal(size=outputs.shape)
    strides = np.diff(SIGMAS)[:, None] * outputs
    return outputs, np.concatenate([np.zeros((1, PROMPTS * SIZE)), strides.cumsum(0)])


@pytest.fixture(scope="module")
def costs(run):
    vectors = np.concatenate(run)
    return PathCosts(vectors @ vectors.T, SIGMAS, ridge=0)


def directly(run, schedule):
    """The sum of squares that weights over the last three outputs, which sum to one, leave of each step."""
    outputs, latents = run
    total = 0.0
    for index, (start, end) in enumerate(itertools.pairwise((*schedule, STEPS))):
        length = SIGMAS[end] - SIGMAS[start]
        target = latents[end] - latents[start] - length * outputs[start]
        changes = [outputs[earlier] - outputs[start] for earlier in schedule[max(index - 2, 0) : index]]
        if changes:
            target = target - np.array(changes).T @ np.linalg.lstsq(np.array(changes).T, target)[0]
        total += target @ target
    return total


def short_enough(schedule):
    return all(end - start <= 3 for start, end in itertools.pairwise((*schedule, STEPS)))


def test_a_schedule_costs_what_least_squares_leave(run, costs):
    for schedule in ((0, 1, 2, 5), (0, 3, 6), (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6)):
        assert costs.of(schedule) == pytest.approx(directly(run, schedule), rel=1e-4, abs=1e-8)
    assert costs.of((0, 6)) == np.inf, "a step of six of eight"


def test_the_cheapest_of_all_schedules_of_every_length(run, costs):
    found = costs.cheapest(STEPS)
    for count in range(3, STEPS):
        every = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), count - 1)]
        best = min((each for each in every if short_enough(each)), key=lambda each: directly(run, each))
        assert directly(run, found[count]) == pytest.approx(directly(run, best), rel=1e-3), count
    assert found[STEPS] == tuple(range(STEPS))
    assert 1 not in found and 2 not in found, "no two steps of at most three reach the end of eight"
