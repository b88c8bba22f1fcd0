"""The run in more steps towards the converged solution: its noise levels, and its steps of the second order."""

from itertools import pairwise

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from h2cache.plans.divided import Divided


def test_levels_lie_evenly_between_the_schedulers_and_steps_are_exact_for_lines():
    """Where the output is the noise level itself, the sample moves by half the difference of the levels' squares."""
    base = FlowMatchEulerDiscreteScheduler(shift=3.0)
    divided = Divided.of(base, 2)
    for scheduler in (base, divided):
        scheduler.set_timesteps(4)
    levels = divided.sigmas
    assert torch.equal(levels[::2], base.sigmas) and len(divided.timesteps) == 8
    torch.testing.assert_close(levels[1::2], (base.sigmas[1:] + base.sigmas[:-1]) / 2)
    samples = [torch.zeros(1, 3)]
    for timestep, level in zip(divided.timesteps, levels, strict=False):
        moved = divided.step(level.expand(1, 3), timestep, samples[-1]).prev_sample
        samples.append(moved)
    first, *others = [(after - before)[0, 0] for before, after in pairwise(samples)]
    assert first == (levels[1] - levels[0]) * levels[0]  # Euler's
    torch.testing.assert_close(torch.stack(others), (levels[2:].square() - levels[1:-1].square()) / 2)
    divided.set_timesteps(4)
    again = divided.step(levels[0].expand(1, 3), divided.timesteps[0], samples[0], return_dict=False)
    assert torch.equal(again[0], samples[1]), "a new run begins with Euler's step"
