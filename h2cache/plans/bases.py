"""The schedulers that a plan can follow, and their noise levels and outputs in the terms of flow matching.

A scheduler keeps a sample `x = alpha * x0 + sigma * noise`, and its model predicts some combination of `x0` and
`noise`. With `scale = alpha + sigma`, the sample `x / scale` is flow matching's at the noise level
`tau = sigma / scale`, from 1 to 0, and `v = noise - x0` is its velocity:

    x / scale = (1 - tau) * x0 + tau * noise,    d(x / scale) = v * d(tau).

An Euler step of this equation is the step of EulerDiscreteScheduler and of DDIM, and the first-order step of the
multistep solvers. Plans, calibration and searches know `tau` and `v` alone; for flow matching nothing is converted.
"""

import inspect
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

FLOW = "flow_prediction"
PREDICTIONS = (FLOW, "epsilon", "sample", "v_prediction")


MULTISTEP = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)  # their own step needs the outputs of skipped steps
BASES: tuple[Any, ...] = (
    FlowMatchEulerDiscreteScheduler,
    EulerDiscreteScheduler,
    DDIMScheduler,
    CogVideoXDDIMScheduler,
    *MULTISTEP,
)


def alphas_and_sigmas(base: Any) -> tuple[Tensor, Tensor]:
    """Of a scheduler's sample at each step of the run that `set_timesteps` began and where it ends, (steps + 1,)."""
    if isinstance(base, DDIMScheduler | CogVideoXDDIMScheduler):
        end = base.timesteps[-1] - base.config.num_train_timesteps // base.num_inference_steps
        last = base.alphas_cumprod[end] if end >= 0 else base.final_alpha_cumprod
        squares = torch.cat([base.alphas_cumprod[base.timesteps], last.reshape(1)]).double()
        return squares.sqrt(), (1 - squares).sqrt()
    sigmas = base.sigmas.double()
    if isinstance(base, MULTISTEP):
        return base._sigma_to_alpha_sigma_t(sigmas)
    return (torch.ones_like(sigmas) if isinstance(base, EulerDiscreteScheduler) else 1 - sigmas), sigmas


def check_base(base: object) -> None:
    """Raise for a scheduler that a plan cannot follow.

    Raises:
        TypeError: for one whose step is not that of a class in `BASES`.
        ValueError: for settings under which a step adds noise or is not linear.
    """
    name, config = type(base).__name__, getattr(base, "config", {})
    if getattr(type(base), "step", None) not in [kind.step for kind in BASES]:
        raise _not_served(name)
    if config.get("stochastic_sampling"):
        raise ValueError(
            f"a plan cannot follow {name} with stochastic_sampling=True, which adds noise: set it to False"
        )
    algorithm = config.get("algorithm_type", "")
    if algorithm.startswith("sde"):
        raise ValueError(
            f"a plan cannot follow {name} with algorithm_type={algorithm!r}, which adds noise: set another"
        )
    # CogVideoX's has the setting and does not clip.
    clips = config.get("clip_sample") and isinstance(base, DDIMScheduler)
    if clips or config.get("thresholding"):
        setting = "clip_sample" if clips else "thresholding"
        raise ValueError(
            f"a plan cannot follow {name} with {setting}=True, whose steps are not linear: set it to False"
        )
    prediction = config.get("prediction_type", FLOW)
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"a plan cannot follow {name} with prediction_type={prediction!r}: must be one of {', '.join(PREDICTIONS)}"
        )


def kind_of(base: object) -> type:
    """Which class in `BASES` a scheduler is of."""
    return next(kind for kind in BASES if isinstance(base, kind))


def class_of(name: str | None, settings: Set[str]) -> Any:
    """Which class in `BASES` a config is of.

    Args:
        name: as it is saved; None in the config of a scheduler that was made and not loaded.
        settings: the names of its settings, which tell the class where there is no name.

    Raises:
        TypeError: for another class.
    """
    known = {kind: inspect.signature(kind).parameters.keys() for kind in BASES}
    for kind, own in known.items():
        if name == kind.__name__ or (name is None and settings == own):
            return kind
    if name is None and settings <= known[FlowMatchEulerDiscreteScheduler]:
        return FlowMatchEulerDiscreteScheduler
    raise _not_served(name or "another scheduler")


def _not_served(name: str) -> TypeError:
    return TypeError(f"a plan needs the steps of {', '.join(kind.__name__ for kind in BASES)}, not of {name}")


def has_own_step(base: object) -> bool:
    """Whether a single step of the scheduler depends on one output alone."""
    return not isinstance(base, MULTISTEP)


@dataclass(frozen=True)
class FlowForm:
    """A run of a scheduler in the terms of flow matching.

    Fields:
        levels: tau of each step and where the run ends, steps + 1.
        scales: by which a sample is divided at these levels, 1 for flow matching.
        parts: of each step, those of sample and output in the velocity, (0, 1) for flow matching.
    """

    levels: tuple[float, ...]
    scales: tuple[float, ...]
    parts: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, base: Any) -> "FlowForm":
        """Of the run that `set_timesteps` of a scheduler began."""
        alphas, sigmas = (each.cpu() for each in alphas_and_sigmas(base))
        scales, norms = alphas + sigmas, (alphas.square() + sigmas.square()).sqrt()
        by_prediction = {
            FLOW: (0 * scales, scales),
            "epsilon": (-1 / alphas, scales / alphas),
            "sample": (1 / sigmas, -scales / sigmas),
            "v_prediction": ((sigmas - alphas) / norms.square(), scales / norms),
        }
        of_sample, of_output = by_prediction[base.config.get("prediction_type", FLOW)]
        parts = zip(of_sample[:-1].tolist(), of_output[:-1].tolist(), strict=True)
        return cls(tuple((sigmas / scales).tolist()), tuple(scales.tolist()), tuple(parts))

    @property
    def steps(self) -> int:
        """Of the run."""
        return len(self.parts)

    def every(self, count: int) -> "FlowForm":
        """Of the run of which each step is `count` steps of this one."""
        return FlowForm(self.levels[::count], self.scales[::count], self.parts[::count])

    def velocity(self, step: int, sample: Tensor, output: Tensor) -> Tensor:
        """What the model's output for a sample means, in float32 where it is converted."""
        of_sample, of_output = self.parts[step]
        if (of_sample, of_output) == (0, 1):
            return output
        return torch.add(output.float() * of_output, sample.float(), alpha=of_sample)

    def scaled(self, step: int, sample: Tensor) -> Tensor:
        """The sample of the scheduler before a step (or at the end: `steps`) as flow matching's."""
        return sample if self.scales[step] == 1 else sample.float() / self.scales[step]

    def unscaled(self, step: int, sample: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return sample if self.scales[step] == 1 else sample * self.scales[step]
