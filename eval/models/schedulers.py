"""Which solver a run is denoised with: an experiment's setting names it, `scheduler: unipc`.

Diffusers' own schedulers, made from the configuration of the pipeline's: the same noise levels' shift, the same kind of
prediction. It is the alternative to a cache that every user has: a better solver at fewer steps.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)


class ShiftedFlowHeun(FlowMatchHeunDiscreteScheduler):
    """Diffusers' Heun solver at the noise levels of its Euler solver, whose resolution-dependent shift it lacks.

    n steps evaluate the model 2 n - 1 times.
    """

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, *, levels: Mapping[str, Any] | None = None):
        """`levels`: the configuration of the Euler scheduler that chooses them; None: with `shift` alone."""
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)
        chosen = {"num_train_timesteps": num_train_timesteps, "shift": shift} if levels is None else levels
        self._euler = FlowMatchEulerDiscreteScheduler.from_config(chosen)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the Euler scheduler takes them; every level but the first is evaluated at twice."""
        self._euler.set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        levels, times = self._euler.sigmas, self._euler.timesteps
        super().set_timesteps(len(times), device=device)
        self.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
        self.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])


FLOW: dict[str, Callable[[Mapping[str, Any]], SchedulerMixin]] = {
    "euler": FlowMatchEulerDiscreteScheduler.from_config,
    "heun": lambda config: ShiftedFlowHeun(config["num_train_timesteps"], _shift(config), levels=config),
    "dpm++2m": lambda config: DPMSolverMultistepScheduler.from_config(config, **_flow(config)),
    "unipc": lambda config: UniPCMultistepScheduler.from_config(config, **_flow(config)),
}
NOISE: dict[str, Callable[[Mapping[str, Any]], SchedulerMixin]] = {
    "euler": EulerDiscreteScheduler.from_config,
    "heun": HeunDiscreteScheduler.from_config,
    "dpm++2m": DPMSolverMultistepScheduler.from_config,
    "unipc": UniPCMultistepScheduler.from_config,
}
NAMES = tuple(FLOW)


def solver(name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
    """A scheduler of the kind `name`, one of NAMES, for pipelines that were made with `scheduler`."""
    config = scheduler.config
    flows = isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler)
    flows = flows or config.get("prediction_type") == "flow_prediction"
    return (FLOW if flows else NOISE)[name](config)


@contextmanager
def denoised_with(pipe: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """The pipeline with the solver `name` inside the block, as it was after it; None: with its own."""
    if name is None:
        yield
        return
    own = pipe.scheduler
    pipe.scheduler = solver(name, own)
    try:
        yield
    finally:
        pipe.scheduler = own


def _flow(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells diffusers' multistep solvers that the model predicts a flow."""
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": _shift(config)}


def _shift(config: Mapping[str, Any]) -> float:
    """Of the noise levels, where it does not depend on the resolution."""
    return config.get("shift") or config.get("flow_shift") or 1.0
