"""A run in more steps of a better solver, for what all solvers approach: the converged solution."""

from functools import wraps
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


class Divided(FlowMatchEulerDiscreteScheduler):
    """The same noise levels with more between any two of them, evenly spaced, and Adams-Bashforth's steps of order 2.

    The first step is Euler's. On flux-mini, 50 steps in two parts are nearer to the solution than 400 of Euler's
    (docs/plans.md).
    """

    sigmas: Tensor
    parts: int

    @classmethod
    def of(cls, scheduler: FlowMatchEulerDiscreteScheduler, parts: int) -> "Divided":
        """Each step of `scheduler` in so many parts. ValueError for a scheduler whose steps are not Euler's."""
        if getattr(type(scheduler), "step", None) is not FlowMatchEulerDiscreteScheduler.step:
            raise ValueError(
                f"h2cache.calibrate got reference = 'converged' with {type(scheduler).__name__}: it needs "
                f"{FlowMatchEulerDiscreteScheduler.__name__}, whose steps it divides; use reference='uncached'"
            )
        made = cls.from_config(scheduler.config)
        made.parts = parts
        return made

    @wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)  # pipelines look which arguments it takes
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the scheduler's, then divided."""
        super().set_timesteps(*args, **kwargs)
        shares = torch.arange(self.parts, device=self.sigmas.device) / self.parts
        between = self.sigmas[:-1, None] + shares * (self.sigmas[1:] - self.sigmas[:-1])[:, None]
        self.sigmas = torch.cat([between.flatten(), self.sigmas[-1:]])
        self.timesteps = self.sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = len(self.timesteps)
        self._before: Tensor | None = None

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True, **others: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next level, by the last two outputs."""
        if self.step_index is None:
            self._init_step_index(timestep)
        index, output = self.step_index, model_output.float()
        stride = (self.sigmas[index + 1] - self.sigmas[index]).item()
        moved = sample.float() + stride * output
        if self._before is not None:
            earlier = (self.sigmas[index] - self.sigmas[index - 1]).item()
            moved = moved + stride**2 / (2 * earlier) * (output - self._before)
        self._before = output.clone()
        self._step_index += 1
        moved = moved.to(sample.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)
