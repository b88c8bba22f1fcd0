"""Uncached runs of a pipeline, recorded so that cached ones can be tried without it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.block_call import select_rows
from ..runtime.interception import interception_of
from .conditions import Conditions, described, digest
from .promise import decibels

DIGITS = 6  # significant ones of a noise level in a plan
NEEDS_EULER = "h2cache.calibrate needs a scheduler that makes Euler steps, such as FlowMatchEulerDiscreteScheduler"
TOLERANCE = 1e-2  # of one recorded step, relative, for Euler's rule to be recognised; bfloat16 rounds coarsely


@dataclass
class Trajectories:
    """The runs of a few prompts, in batches.

    Fields:
        model: the transformer.
        calls: for each batch the arguments of a call, apart from latents and timestep.
        sizes: how many prompts each batch holds.
        timesteps: of each step, (1,), as the call takes them.
        sigmas: noise levels, one more than steps.
        latents: of the reference, before each step and after the last, (prompts, N, C).
        grams: (prompts, 2 * steps + 1, 2 * steps + 1), inner products of the outputs at all steps and of the latents
            before all steps and after the last, less the first; for `PathCosts`.
        decode: final latents to images in 0..1, (prompts, 3, H, W).
    """

    model: Callable[..., Any]
    conditions: Conditions
    calls: list[dict[str, Any]]
    sizes: list[int]
    timesteps: list[Tensor]
    sigmas: list[float]
    latents: list[Tensor]
    grams: Tensor
    decode: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __post_init__(self) -> None:
        self.images = self.decode(self.latents[-1])

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @torch.no_grad()
    def compute(self, step: int, latents: Tensor) -> Tensor:
        """What the model returns at `step` for these latents of all prompts."""
        parts = latents.split(self.sizes)
        return torch.cat([self.compute_batch(batch, step, part) for batch, part in enumerate(parts)])

    def compute_batch(self, batch: int, step: int, latents: Tensor) -> Tensor:
        """What the model returns at `step` for these latents of a batch, with a gradient where that is enabled."""
        timestep = self.timesteps[step].expand(len(latents))
        return self.model(**self.calls[batch], hidden_states=latents, timestep=timestep)[0]

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
        rows = torch.arange(count, device=self.latents[0].device)
        call = {
            name: value if name.endswith("_ids") else select_rows(value, rows, self.sizes[0])  # ids have no batch
            for name, value in self.calls[0].items()
        }
        latents = [each[:count] for each in self.latents]
        return replace(self, calls=[call], sizes=[count], latents=latents, grams=self.grams[:count])

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
        ValueError: where it does not call its transformer once a step, or its scheduler's step is not Euler's.
    """
    from .divided import Divided  # only here: diffusers' schedulers take long to import
    from .scheduler import PlanScheduler

    if interception_of(pipe.transformer) is not None or isinstance(pipe.scheduler, PlanScheduler):
        raise ValueError(
            "h2cache.calibrate needs the uncached pipeline: remove the cache or the plan that it has first"
        )
    own, seen = pipe.scheduler, _Calls(parts)
    if parts > 1:
        pipe.scheduler = Divided.of(own, parts)
    hook = pipe.transformer.register_forward_hook(seen, with_kwargs=True)
    calls, sizes, latents, final, grams = [], [], [], [], []
    try:
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            seen.clear()
            generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
            final.append(
                pipe(part, generator=generators, num_inference_steps=steps, output_type="latent", **call_arguments)[0]
            )
            if seen.count != steps * parts:
                raise ValueError(
                    f"h2cache.calibrate saw {seen.count} calls of the transformer in {steps * parts} steps: it needs "
                    "one a step (calibrate without true_cfg_scale; the plan serves both branches)"
                )
            calls.append(seen.arguments)
            sizes.append(len(part))
            latents.append(list(seen.latents))
            grams.append(_gram(seen.outputs, [*seen.latents, final[-1]]))
        used = pipe.scheduler
    finally:
        hook.remove()
        pipe.scheduler = own
    sigmas = used.sigmas.tolist()[-steps * parts - 1 :]
    first_stride, sigmas = sigmas[1] - sigmas[0], sigmas[::parts]
    whole = [torch.cat(parts) for parts in zip(*latents, strict=True)] + [torch.cat(final)]
    guidance = getattr(pipe, "guidance_scale", None)
    levels = tuple(float(f"{sigma:.{DIGITS}g}") for sigma in sigmas[:-1])
    model, scheduler = digest(pipe.transformer), described(pipe.scheduler)
    conditions = Conditions(model, scheduler, steps, guidance, whole[0].shape[1], levels)
    trajectories = Trajectories(
        model=pipe.transformer,
        conditions=conditions,
        calls=calls,
        sizes=sizes,
        timesteps=seen.timesteps,
        sigmas=sigmas,
        latents=whole,
        grams=torch.cat(grams),
        decode=decoder(pipe, call_arguments),
    )
    last = slice(-sizes[-1], None)
    _check_euler(whole[0][last], first_stride, seen)
    return trajectories


def _gram(outputs: Sequence[Tensor], latents: Sequence[Tensor]) -> Tensor:
    """See `Trajectories.grams`; of one batch."""
    vectors = [each.double().flatten(1) for each in (*outputs, *latents)]
    first = vectors[len(outputs)]
    rows = torch.stack(vectors[: len(outputs)] + [each - first for each in vectors[len(outputs) :]], dim=1)
    return (rows @ rows.mT).cpu()


class _Calls:
    """Listens to the calls of a transformer, and keeps what every `every`-th began with."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self.latents: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.arguments: dict[str, Any] = {}
        self.outputs: list[Tensor] = []
        self.second_latents: Tensor | None = None

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if args:
            raise ValueError("h2cache.calibrate works with pipelines that call their transformer with keywords")
        own = dict(kwargs)
        latents, timestep = own.pop("hidden_states"), own.pop("timestep")[:1]
        self.arguments = own
        if self.count % self.every == 0:
            self.latents.append(latents)
            self.timesteps.append(timestep)
            self.outputs.append(output[0])
        if self.count == 1:
            self.second_latents = latents
        self.count += 1


def _check_euler(before: Tensor, stride: float, seen: _Calls) -> None:
    """Whether the first step of a batch from the latents `before` is Euler's, of this length in noise levels."""
    if seen.second_latents is None:
        return
    moved = seen.second_latents.float() - before.float()
    if (moved - stride * seen.outputs[0].float()).norm() > TOLERANCE * moved.norm():
        raise ValueError(NEEDS_EULER)


def decoder(pipe: Any, call_arguments: dict[str, Any], at_once: int = 4) -> Callable[[Tensor], Tensor]:
    """From final latents to pixels in 0..1 as the pipeline decodes them, (prompts, 3, H, W), `at_once` at a time."""
    height, width = call_arguments["height"], call_arguments["width"]
    vae = pipe.vae

    def decode(latents: Tensor) -> Tensor:
        def images() -> Iterator[Tensor]:
            for part in latents.split(at_once):
                unpacked = pipe._unpack_latents(part, height, width, pipe.vae_scale_factor)
                scaled = unpacked / vae.config.scaling_factor + vae.config.shift_factor
                yield (vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

        return torch.cat(list(images()))

    return decode
