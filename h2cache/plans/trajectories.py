"""Uncached runs of a pipeline, recorded so that cached ones can be tried without it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.interception import interception_of
from .conditions import Conditions, described, digest, model_of, tokens_of
from .promise import decibels

if TYPE_CHECKING:
    from .pipeline_loop import PipelineLoop

DIGITS = 6  # significant ones of a noise level in a plan
TOLERANCE = 1e-2  # of an output that is computed again, relative; bfloat16 rounds coarsely


@dataclass
class Trajectories:
    """The runs of a few prompts, in batches. Latents, outputs and noise levels are in flow matching's terms
    (`plans/bases.py`).

    Fields:
        model: the output for some prompts (a slice of their places) at a step, for their latents.
        sizes: how many prompts each batch holds.
        sigmas: noise levels, one more than steps.
        latents: of the reference, before each step and after the last, (prompts, ...).
        grams: (prompts, 2 * steps + 1, 2 * steps + 1), inner products of the outputs at all steps and of the latents
            before all steps and after the last, less the first; for `PathCosts`.
        decode: final latents to images in 0..1, (prompts, 3, H, W), or to videos.
    """

    model: Callable[[slice, int, Tensor], Tensor]
    conditions: Conditions
    sizes: list[int]
    sigmas: list[float]
    latents: list[Tensor]
    grams: Tensor
    decode: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __post_init__(self) -> None:
        self.images = self.decode(self.latents[-1])

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @torch.no_grad()
    def compute(self, step: int, latents: Tensor) -> Tensor:
        """What the model returns at `step` for these latents of all prompts."""
        parts = latents.split(self.sizes)
        return torch.cat([self.compute_batch(batch, step, part) for batch, part in enumerate(parts)])

    def compute_batch(self, batch: int, step: int, latents: Tensor) -> Tensor:
        """What the model returns at `step` for these latents of a batch, with a gradient where that is enabled."""
        start = sum(self.sizes[:batch])
        return self.model(slice(start, start + len(latents)), step, latents)

    def advance(self, step: int, latents: Tensor, output: Tensor) -> Tensor:
        """The latents after `step`."""
        return (latents.float() + self._stride(step) * output.float()).to(latents.dtype)

    def needed(self, step: int, latents: Tensor) -> Tensor:
        """The output that would lead from these latents to the uncached ones after `step`."""
        return (self.latents[step + 1].float() - latents.float()) / self._stride(step)

    def _stride(self, step: int) -> float:
        return self.sigmas[step + 1] - self.sigmas[step]

    def first(self, count: int) -> "Trajectories":
        """Those of the first prompts, as one batch."""
        if count > self.sizes[0]:
            raise ValueError(f"{count} prompts do not fit into the first batch, of {self.sizes[0]}")
        latents = [each[:count] for each in self.latents]
        return replace(self, sizes=[count], latents=latents, grams=self.grams[:count])

    @torch.no_grad()
    def decibels(self, latents: Tensor) -> Tensor:
        """(prompts,): how near the images of these final latents are to the reference's, PSNR in dB."""
        return decibels(self.decode(latents), self.images)


@torch.no_grad()
def record(
    pipe: Any,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    batch_size: int,
    *,
    parts: int = 1,
    **call_arguments: Any,
) -> Trajectories:
    """Run the pipeline on the prompts, prompt i with the noise of `seed + i`.

    Args:
        parts: that each step is divided into, each of which calls the model, with a solver of second order. Only where
            the steps begin is recorded: these are latents on the way to the converged solution.

    Raises:
        TypeError: where no plan can follow the pipeline's scheduler.
        ValueError: where the scheduler's settings do not allow it, the pipeline has a cache or a plan, or a step of it
            depends on more than latents and timestep.
    """
    from .bases import FlowForm, check_base  # only here: diffusers' schedulers take long to import
    from .divided import Divided
    from .pipeline_loop import PipelineLoop
    from .scheduler import PlanScheduler

    model = model_of(pipe)
    if isinstance(pipe.scheduler, PlanScheduler) or (model is not None and interception_of(model) is not None):
        raise ValueError(
            "h2cache.calibrate needs the uncached pipeline: remove the cache or the plan that it has first"
        )
    check_base(pipe.scheduler)
    scheduler = pipe.scheduler if parts == 1 else Divided.of(pipe.scheduler, parts)
    loop = PipelineLoop(pipe, prompts, steps, seed, call_arguments)
    recorded, sizes, grams = [], [], []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, min(start + batch_size, len(prompts)))
        samples, outputs, used = loop.run(rows, scheduler)
        samples, outputs, form = samples[::parts], outputs[::parts], FlowForm.of(used).every(parts)
        if not start:
            _check_replay(loop, rows, samples, outputs)
        latents = [form.scaled(step, sample) for step, sample in enumerate(samples)]
        velocities = [form.velocity(step, samples[step], output) for step, output in enumerate(outputs)]
        recorded.append(latents)
        sizes.append(rows.stop - rows.start)
        grams.append(_gram(velocities, latents))
    dtype, guidance = samples[0].dtype, getattr(pipe, "guidance_scale", None)
    conditions = Conditions(
        model=None if model is None else digest(model),
        scheduler=described(pipe.scheduler),
        steps=steps,
        guidance=guidance,
        image_tokens=tokens_of(samples[0]),
        sigmas=tuple(float(f"{level:.{DIGITS}g}") for level in form.levels[:-1]),
    )

    def velocity(rows: slice, step: int, latents: Tensor) -> Tensor:
        sample = form.unscaled(step, latents).to(dtype)
        return form.velocity(step, sample, loop.output(rows, step, sample))

    return Trajectories(
        model=velocity,
        conditions=conditions,
        sizes=sizes,
        sigmas=list(form.levels),
        latents=[torch.cat(batches) for batches in zip(*recorded, strict=True)],
        grams=torch.cat(grams),
        decode=lambda latents: loop.decoded(form.unscaled(steps, latents).to(dtype)),
    )


def _check_replay(loop: "PipelineLoop", rows: slice, samples: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Whether a step that is run by itself has the output that it had in the whole run."""
    step = min(1, len(outputs) - 1)
    again = loop.output(rows, step, samples[step]).float() - outputs[step].float()
    if again.norm() > TOLERANCE * outputs[step].float().norm():
        raise ValueError(
            f"h2cache.calibrate cannot run step {step} of this {type(loop.pipe).__name__} by itself: its output must "
            "depend on latents, timestep and the call's arguments alone"
        )


def _gram(outputs: Sequence[Tensor], latents: Sequence[Tensor]) -> Tensor:
    """See `Trajectories.grams`; of one batch."""
    vectors = [each.double().flatten(1) for each in (*outputs, *latents)]
    first = vectors[len(outputs)]
    rows = torch.stack(vectors[: len(outputs)] + [each - first for each in vectors[len(outputs) :]], dim=1)
    return (rows @ rows.mT).cpu()
