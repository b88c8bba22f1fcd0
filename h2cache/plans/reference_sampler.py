"""What a plan does, in torch alone: the reference for other programs, and the text of an exported sampler.

A step from one noise level to the next adds `sum_k stride[k] * v_k` to the sample, where v_0 is the model's newest
output and v_k the one k calls before. `SIGMAS` and `STRIDES` of an exported file are the plan's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

SIGMAS: Sequence[float] = ()
STRIDES: Sequence[Sequence[float]] = ()


def sample(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    x: torch.Tensor,
    sigmas: Sequence[float],
    strides: Sequence[Sequence[float]],
) -> torch.Tensor:
    """The sample at noise level 0.

    Args:
        velocity: the model's output, noise minus clean sample, for a sample and its noise level.
        x: noise at `sigmas[0]`, which is 1 where the run starts from noise alone.
        sigmas, strides: the plan's table.
    """
    history: list[torch.Tensor] = []
    longest = max(map(len, strides))
    for sigma, step in zip(sigmas, strides, strict=False):  # sigmas has one more, where the run ends
        history = [velocity(x, sigma), *history][:longest]
        total = x.float()
        for stride, output in zip(step, history, strict=False):
            total = torch.add(total, output, alpha=stride)
        x = total.to(x.dtype)
    return x


@torch.no_grad()
def sample_plan(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: Sequence[float] | None = None,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """`sample` as a sampler of k-diffusion: `model(x, sigma, **extra_args)` returns the denoised sample.

    Args:
        sigmas, disable: not used; a plan has noise levels of its own, and shows no progress.
        callback: called before each step with "x", "i", "sigma" and "denoised".
    """
    numbers = iter(range(len(STRIDES)))

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        denoised = model(x, x.new_full((len(x),), sigma), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": next(numbers), "sigma": sigma, "denoised": denoised})
        return (x - denoised) / sigma

    return sample(velocity, x, SIGMAS, STRIDES)
