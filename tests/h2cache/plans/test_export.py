"""An exported plan gives other programs the images that our own pipeline draws with it."""

import json
from types import ModuleType

import pytest
import torch
from pictures import own_pipeline
from plans import PLAN
from tiny import TEXT_TOKENS

import h2cache
from h2cache import Plan, PlanConfig
from h2cache.plans import export
from h2cache.plans.conditions import Conditions
from h2cache.plans.reference_sampler import sample

STEPS = 9
CALL = dict(height=32, width=64, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS, num_inference_steps=STEPS)


@pytest.fixture
def drawn(tiny_pipe):
    """(plan, noise, final latents of the pipeline with the plan, the model as a velocity)."""
    pipe, seen = own_pipeline(tiny_pipe), []
    plan = calibrated(pipe)
    hook = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with h2cache.apply(pipe, PlanConfig(plan)):
        latents = pipe("a red sign", generator=torch.Generator().manual_seed(0), output_type="latent", **CALL).images
    hook.remove()

    def velocity(x, sigma):
        call = {**seen[0], "hidden_states": x, "timestep": torch.full((1,), sigma)}
        with torch.no_grad():
            return pipe.transformer(**call)[0]

    return plan, seen[0]["hidden_states"], latents, velocity


def calibrated(pipe):
    call = {name: value for name, value in CALL.items() if name != "num_inference_steps"}
    return h2cache.calibrate(pipe, ["a red sign", "TEA"], 3, STEPS, **call)


def test_the_table_draws_what_the_pipeline_draws(drawn):
    plan, noise, latents, velocity = drawn
    table = json.loads(export.as_json(plan))
    assert len(table["sigmas"]) == len(table["strides"]) + 1 == len(plan.computed) + 1
    made = sample(velocity, noise, table["sigmas"], table["strides"])
    torch.testing.assert_close(made, latents, atol=1e-4, rtol=0)


def test_the_sampler_s_file_needs_nothing_of_ours(drawn, tmp_path):
    """k-diffusion's models return the denoised sample."""
    plan, noise, latents, velocity = drawn
    text = export.as_sampler(plan)
    assert "h2cache" not in text and "diffusers" not in text
    module, seen = ModuleType("exported"), []
    exec(compile(text, "exported.py", "exec"), vars(module))

    def denoiser(x, sigma, factor):
        assert factor == 1
        return x - sigma.view(-1, 1, 1) * velocity(x, sigma.item())

    made = module.sample_plan(denoiser, noise, extra_args={"factor": 1}, callback=seen.append)
    torch.testing.assert_close(made, latents, atol=1e-4, rtol=0)
    assert [each["i"] for each in seen] == [0, 1, 2] and seen[0]["sigma"] == 1.0


def test_the_noise_levels_alone(drawn):
    plan = drawn[0]
    assert json.loads(export.as_sigmas(plan)) == [plan.made_for.sigmas[step] for step in plan.computed]


def test_a_plan_without_noise_levels_cannot_be_exported():
    for _, form in export.FORMATS:
        with pytest.raises(ValueError, match="noise levels"):
            form(PLAN)
    for_sdxl = Plan(Conditions(steps=1, scheduler='EulerDiscreteScheduler {"beta_end": 0.02}', sigmas=(0.9,)), (0,), {})
    with pytest.raises(ValueError, match="made for EulerDiscreteScheduler: only a plan for flow matching"):
        export.table(for_sdxl)
    euler = Plan.adams_bashforth(4, order=1)
    assert export.table(euler) == {"sigmas": [1.0, 0.75, 0.5, 0.25, 0.0], "strides": [[-0.25]] * 4}
