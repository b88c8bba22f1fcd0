"""Solvers by name: made from the pipeline's scheduler, exact on a flow that is known, and put back afterwards."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from h2cache.eval.models.schedulers import NAMES, denoised_with, solver

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
SHIFTED = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)  # as FLUX.1's: the pipeline gives mu
EVALUATIONS = {"euler": 12, "heun": 23, "dpm++2m": 12, "unipc": 12}  # of twelve steps


def integrate(scheduler, steps: int, mu: float | None = None) -> tuple[float, int]:
    """From 1 at noise level 1 along dx/ds = x, whose value at level 0 is 1/e; and how often the flow was asked."""
    chosen = {} if mu is None else {"mu": mu}
    if getattr(scheduler.config, "use_flow_sigmas", False):
        scheduler.set_timesteps(steps, **chosen)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), **chosen)
    x, asked = torch.ones(1, 1, 4, 4, dtype=torch.float64), 0
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, return_dict=False)[0]
        asked += 1
    return float(x.mean()), asked


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", [FLOW, SHIFTED], ids=["shift", "dynamic-shift"])
def test_it_solves_a_flow_that_is_known(name, own):
    mu = 0.8 if own is SHIFTED else None
    coarse, asked = integrate(solver(name, own), 12, mu)
    fine, _ = integrate(solver(name, own), 96, mu)
    assert asked == EVALUATIONS[name]
    assert abs(fine - np.exp(-1)) < 0.01
    assert abs(coarse - np.exp(-1)) < (0.08 if name == "euler" else 0.03)
    assert abs(fine - np.exp(-1)) < abs(coarse - np.exp(-1))


def test_heun_has_the_noise_levels_of_euler():
    heun, euler = solver("heun", SHIFTED), solver("euler", SHIFTED)
    for each in (heun, euler):
        each.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=0.8)
    assert torch.equal(heun.timesteps.unique(), euler.timesteps.unique())
    assert torch.equal(heun.sigmas.unique(), euler.sigmas.unique())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_predicts_noise_gets_a_solver_for_noise(name):
    own = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    made = solver(name, own)
    assert made.config.prediction_type == "v_prediction" and made.config.beta_schedule == "scaled_linear"
    assert not getattr(made.config, "use_flow_sigmas", False)


def test_the_pipeline_gets_its_own_back(tiny_pipe):
    own = tiny_pipe.scheduler
    with pytest.raises(KeyboardInterrupt), denoised_with(tiny_pipe, "unipc"):
        assert type(tiny_pipe.scheduler).__name__ == "UniPCMultistepScheduler"
        raise KeyboardInterrupt
    assert tiny_pipe.scheduler is own
    with denoised_with(tiny_pipe, None):
        assert tiny_pipe.scheduler is own
