"""An exported plan as a sampler with k-diffusion's calling convention. Needs torch and tqdm only.

With `v = (x - denoised) / sigma`, which is the output of a flow model, a step adds `sum_k strides[k] * v_k` to the
sample, where v_0 is the newest output and v_k the one k calls before.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import trange

TOLERANCE = 1e-4  # between a noise level of a plan and one that is passed in; both go from 1 to 0
SUM_TOLERANCE = 1e-4  # between the sum of a step's strides, which are rounded to six digits, and the step


@dataclass(frozen=True)
class PlanTable:
    """What `h2cache plan export --format json` writes.

    Attributes:
        sigmas: noise levels at which the model is called, falling from at most 1, and 0, where the run ends.
        strides: for each call, the lengths of the step along the last outputs, newest first. They sum to the step.
    """

    sigmas: tuple[float, ...]
    strides: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.strides) + 1 or not self.strides:
            raise ValueError(f"{len(self.sigmas)} sigmas and {len(self.strides)} strides: must be one sigma more")
        if self.sigmas[0] > 1 or self.sigmas[-1] != 0 or any(later >= sigma for sigma, later in pairwise(self.sigmas)):
            raise ValueError(f"sigmas = {list(self.sigmas)}: must fall from at most 1 to 0, as those of flow models")
        for call, (strides, (sigma, later)) in enumerate(zip(self.strides, pairwise(self.sigmas), strict=True)):
            sound = 1 <= len(strides) <= call + 1 and all(map(math.isfinite, strides))
            if not sound or abs(sum(strides) - (later - sigma)) > SUM_TOLERANCE:
                raise ValueError(
                    f"strides[{call}] = {list(strides)}: must be 1 to {call + 1} numbers that sum to "
                    f"{later - sigma:.6g}"
                )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that `text` holds.

        Raises:
            ValueError: where `text` is no exported plan.
        """
        try:
            data = json.loads(text)
            return cls(
                tuple(float(sigma) for sigma in data["sigmas"]),
                tuple(tuple(float(stride) for stride in strides) for strides in data["strides"]),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                "this is no exported plan: `h2cache plan export FILE --format json` writes one, with sigmas and strides"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The plan in a file.

        Raises:
            ValueError: naming the file, where it holds no exported plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def steps(self, sigmas: Sequence[float]) -> list[tuple[float, ...]]:
        """The strides of a run over these noise levels: all of the plan's, or some that follow each other.

        A run that starts in the middle of the plan has no outputs from before. Their strides fall on the newest output.

        Raises:
            ValueError: where the noise levels are not the plan's.
        """
        for start in range(len(self.sigmas) - len(sigmas) + 1 if sigmas else 0):
            if all(abs(a - b) <= TOLERANCE for a, b in zip(self.sigmas[start:], sigmas, strict=False)):
                taken = self.strides[start : start + len(sigmas) - 1]
                return [known_strides(strides, call + 1) for call, strides in enumerate(taken)]
        raise ValueError(
            f"the sigmas {[round(float(sigma), 4) for sigma in sigmas]} are not the plan's "
            f"{[round(sigma, 4) for sigma in self.sigmas]}, nor a part of them: take them from the plan's scheduler"
        )


def known_strides(strides: Sequence[float], known: int) -> tuple[float, ...]:
    """Strides over `known` outputs; what the others would have had falls on the newest."""
    newest, *older = strides[:known]
    return (newest + sum(strides[known:]), *older)


@torch.no_grad()
def sample_plan(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    plan: PlanTable,
) -> Tensor:
    """The sample at `sigmas[-1]`, with one call of the model for each step between two sigmas.

    Outputs and sums are float32; at most as many outputs are held as the longest strides have. No noise is added.

    Args:
        model: `model(x, sigma, **extra_args)` returns the denoised sample (B, ...), after guidance; sigma is (B,).
        x: (B, ...), `(1 - sigma) * clean + sigma * noise` at `sigmas[0]`.
        sigmas: (S + 1,), those of the plan, or some that follow each other.
        extra_args: see `model`.
        callback: called after each call of the model with "x", "i", "sigma", "sigma_hat" and "denoised".
        disable: True for no progress bar.
        plan: the solver.

    Returns:
        (B, ...), with the dtype of `x`.

    Raises:
        ValueError: where `sigmas` are not the plan's.
    """
    steps = plan.steps(sigmas.tolist())
    held = max(map(len, steps), default=0)
    outputs: list[Tensor] = []
    batch = x.new_ones([len(x)])
    for i in trange(len(steps), disable=disable):
        denoised = model(x, sigmas[i] * batch, **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        outputs = [(x.float() - denoised.float()) / sigmas[i], *outputs][:held]
        moved = x.float()
        for stride, output in zip(steps[i], outputs, strict=False):
            moved = torch.add(moved, output, alpha=stride)
        x = moved.to(x.dtype)
    return x
