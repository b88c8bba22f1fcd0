"""A run in many more steps, for what all solvers approach: the converged solution."""

from functools import wraps
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class Divided(FlowMatchEulerDiscreteScheduler):
    """The same noise levels, with more between any two of them, evenly spaced: nearer to the converged solution."""

    @classmethod
    def of(cls, scheduler: FlowMatchEulerDiscreteScheduler, parts: int) -> "Divided":
        """Each step of `scheduler` in so many parts. ValueError for a scheduler whose steps are not Euler's."""
        if getattr(type(scheduler), "step", None) is not FlowMatchEulerDiscreteScheduler.step:
            raise ValueError(f"{type(scheduler).__name__} does not make Euler steps, which alone can be divided")
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
