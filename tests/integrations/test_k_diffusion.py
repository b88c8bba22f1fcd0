"""The sampler of the ComfyUI nodes beside the samplers of k-diffusion, whose calling convention it has."""

import inspect
import sys

import pytest
import torch
from repository import REPOSITORY
from standins import comfyui

from h2cache import Plan
from h2cache.plans.export import as_json

SIGMAS = [1.0, 0.9, 0.75, 0.55, 0.3, 0.1]
CONVENTION = ["model", "x", "sigmas", "extra_args", "callback", "disable"]


@pytest.fixture(scope="module")
def plan_sampler():
    package = comfyui.load_custom_node(REPOSITORY / "integrations" / "comfyui")
    return sys.modules[f"{package.__name__}.plan_sampler"]


@pytest.fixture(scope="module")
def sampling():
    return pytest.importorskip("k_diffusion.sampling", reason="k-diffusion is not installed; no requirement names it")


def denoiser(x, sigma, factor):
    """A model of k-diffusion's kind: (x, sigma of shape (B,), **extra_args) to the denoised sample."""
    assert sigma.shape == x.shape[:1]
    return x * (1 - factor * sigma.view(-1, 1, 1)) + torch.sin(3 * x) * sigma.view(-1, 1, 1) ** 2


def drawn(sample, sigmas=None, **options):
    """(final sample, what the callback was told)."""
    x, said = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), []
    sigmas = torch.tensor([*SIGMAS, 0.0]) if sigmas is None else sigmas
    made = sample(denoiser, x, sigmas, extra_args={"factor": 0.7}, callback=said.append, disable=True, **options)
    return made, said


def table_of(plan_sampler, plan):
    return plan_sampler.PlanTable.from_json(as_json(plan))


def test_the_parameters_are_those_of_the_convention(plan_sampler):
    parameters = list(inspect.signature(plan_sampler.sample_plan).parameters.values())
    assert [each.name for each in parameters[:6]] == CONVENTION
    assert [each.default for each in parameters[3:6]] == [None] * 3
    assert all(each.kind is each.KEYWORD_ONLY for each in parameters[6:])


def test_the_parameters_are_those_of_its_samplers(plan_sampler, sampling):
    for theirs in (sampling.sample_euler, sampling.sample_lms, sampling.sample_dpmpp_2m):
        first = list(inspect.signature(theirs).parameters.values())[:6]
        own = list(inspect.signature(plan_sampler.sample_plan).parameters.values())[:6]
        assert [(each.name, each.default) for each in first] == [(each.name, each.default) for each in own]


def test_a_plan_that_computes_every_step_is_its_euler(plan_sampler, sampling):
    plan = Plan.adams_bashforth(len(SIGMAS), order=1, sigmas=SIGMAS)
    own, told = drawn(plan_sampler.sample_plan, plan=table_of(plan_sampler, plan))
    theirs, expected = drawn(sampling.sample_euler)
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)
    assert len(told) == len(expected) == len(SIGMAS)
    for mine, other in zip(told, expected, strict=True):
        assert mine.keys() == other.keys() and mine["i"] == other["i"]
        for name in ("x", "sigma", "sigma_hat", "denoised"):
            torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_plan_of_adams_bashforth_is_its_linear_multistep_method(plan_sampler, sampling, order):
    """k-diffusion integrates the polynomial through the last outputs numerically, to a relative 1e-4."""
    plan = Plan.adams_bashforth(len(SIGMAS), order=order, sigmas=SIGMAS)
    own, _ = drawn(plan_sampler.sample_plan, plan=table_of(plan_sampler, plan))
    theirs, _ = drawn(sampling.sample_lms, order=order)
    euler, _ = drawn(sampling.sample_euler)
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-4)
    assert (own - euler).abs().max() > 1e-2


def test_a_part_of_the_run_is_its_part(plan_sampler, sampling):
    plan = Plan.adams_bashforth(len(SIGMAS), order=1, sigmas=SIGMAS)
    part = torch.tensor(SIGMAS[2:5])
    own, _ = drawn(plan_sampler.sample_plan, part, plan=table_of(plan_sampler, plan))
    torch.testing.assert_close(own, drawn(sampling.sample_euler, part)[0], rtol=1e-5, atol=1e-6)
