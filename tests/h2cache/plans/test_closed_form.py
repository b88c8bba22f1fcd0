"""Plans from formulas: each integrates what its formula is exact for, and refuses what it cannot be."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from numpy.polynomial import Polynomial

import h2cache
from h2cache import Plan, PlanConfig, PlanScheduler
from h2cache.policy.forecasts import Hermite, Taylor

CALL = {"height": 32, "width": 32, "max_sequence_length": 24, "output_type": "latent"}


def end_of_run(plan: Plan, output, sigmas=None) -> float:
    """Where a run ends from 0 whose model returns `output(noise level)`, in float64."""
    scheduler = PlanScheduler(plan)
    levels = np.linspace(1, 1 / plan.steps, plan.steps) if sigmas is None else sigmas
    scheduler.set_timesteps(sigmas=list(levels))
    sample = torch.zeros(1, 1, 1, 1)
    for level, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        sample = scheduler.step(torch.full((1, 1, 1, 1), output(level)), timestep, sample, return_dict=False)[0]
    return sample.item()


def exact(polynomial: Polynomial) -> float:
    """The integral from noise level 1 to 0."""
    whole = polynomial.integ()
    return whole(0) - whole(1)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("spacing", ["even", "shifted"])
def test_adams_bashforth_is_exact_for_polynomials_once_it_has_its_outputs(order, spacing):
    steps = 12
    levels = np.linspace(1, 1 / steps, steps)
    levels = levels if spacing == "even" else 3 * levels / (1 + 2 * levels)
    plan = Plan.adams_bashforth(steps, order, None if spacing == "even" else levels)
    polynomial = Polynomial([0.3, -1.0, 0.7, 0.4][:order])
    # The first steps have fewer outputs to go by: what they miss is taken from the formula of each of them.
    missed, ends = 0.0, [*levels, 0.0]
    for step in range(order - 1):
        known = levels[max(0, step - order + 1) : step + 1]
        through = Polynomial.fit(known, polynomial(known), len(known) - 1).convert().integ()
        whole = polynomial.integ()
        missed += (through(ends[step + 1]) - through(ends[step])) - (whole(ends[step + 1]) - whole(ends[step]))
    assert end_of_run(plan, polynomial, levels) == pytest.approx(exact(polynomial) + missed, abs=2e-5)
    assert abs(missed) > 1e-4


def test_adams_bashforth_of_order_two_has_its_weights():
    assert Plan.adams_bashforth(5).weights == {step: (1.5, -0.5) for step in range(1, 5)}
    assert Plan.adams_bashforth(5, order=1).weights == {}


def test_euler_is_euler_bit_for_bit(tiny_pipe):
    def draw() -> torch.Tensor:
        return tiny_pipe("a sign", num_inference_steps=5, generator=torch.manual_seed(0), **CALL).images

    expected = draw()
    with h2cache.apply(tiny_pipe, PlanConfig(Plan.euler(5))):
        assert torch.equal(draw(), expected)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_of_outputs_is_the_formula_of_the_step(order):
    """Where the differences are those of a polynomial in the step, Taylor's weights are its divided differences."""
    computed = (0, 2, 4, 6)
    made = {0: Plan.reuse, 1: Plan.taylor, 2: lambda *steps: Plan.taylor(*steps, order=2)}[order](8, computed)
    outputs = np.array([1.0, 3.0, 2.0, 5.0])
    differences = [5.0, (5.0 - 2.0) / 2, ((5.0 - 2.0) / 2 - (2.0 - 3.0) / 2) / 2]
    expected = sum(c * d for c, d in zip(Taylor(order).coefficients(1), differences, strict=False))
    weights = made.weights[7]
    assert sum(w * v for w, v in zip(weights, outputs[::-1], strict=False)) == pytest.approx(expected, rel=1e-5)
    assert made.weights[1] == (1.0,) and len(weights) == order + 1


def test_hermite_scales_the_difference():
    plan = Plan.hermite(9, 3, order=1, sigma=0.6)
    assert plan.computed == (0, 3, 6)
    slope = Hermite(1, 0.6).coefficients(2)[1] / 3
    assert plan.weights[8] == pytest.approx((1 + slope, -slope), rel=1e-5)


def test_weights_at_computed_steps_are_kept_in_the_file(tmp_path):
    plan = Plan.adams_bashforth(6, 3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and plan.history == 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Plan.reuse(10, 11), "computed = 11: must be a number from 1 to the 10 steps"),
        (lambda: Plan.taylor(10, (1, 4)), "must be rising steps from 0"),
        (lambda: Plan.adams_bashforth(3, sigmas=[1.0, 0.5]), "must be 3 falling noise levels"),
        (lambda: Plan.adams_bashforth(2, sigmas=[0.5, 1.0]), "must be 2 falling noise levels"),
        (lambda: Plan.adams_bashforth(6).resampled(7), "right for 6 steps alone, not for 7"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_better_solver_is_nearer_to_the_converged_solution():
    """On dx/ds = x from 1, where Euler's method has an error of first order."""

    def error(plan: Plan) -> float:
        scheduler = PlanScheduler(plan, FlowMatchEulerDiscreteScheduler())
        scheduler.set_timesteps(sigmas=list(np.linspace(1, 1 / plan.steps, plan.steps)))
        sample = torch.ones(1, 1, 1, 1)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(sample, timestep, sample, return_dict=False)[0]
        return abs(sample.item() - np.exp(-1))

    assert error(Plan.adams_bashforth(20)) < error(Plan.euler(20)) / 5
    assert error(Plan.taylor(20, 10)) < 0.6 * error(Plan.reuse(20, 10))
