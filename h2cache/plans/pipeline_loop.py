"""The denoising loop of a pipeline, from outside: a whole run, one step from any sample on, or what comes after it.

The pipeline itself is called each time, with a copy of its scheduler that listens. So guidance, two transformers, a
U-Net or a ControlNet are what the pipeline does with them. What it makes of the prompts is made once.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

AT_ONCE = 4  # samples that are decoded


class _Reached(Exception):
    """Ends a call of the pipeline where all that was asked for is known."""


class PipelineLoop:
    """The loop of a pipeline on prompts, of which prompt i has the noise of `seed + i`.

    Rows are places of prompts. A list among the call's arguments with one entry for each prompt is split as they are.
    """

    def __init__(self, pipe: Any, prompts: Sequence[Any], steps: int, seed: int, arguments: Mapping[str, Any]):
        self.pipe, self.prompts, self.steps, self.seed, self.arguments = pipe, list(prompts), steps, seed, arguments
        self._call = inspect.unwrap(type(pipe).__call__)  # without its `torch.no_grad`
        self._takes_latents = "latents" in inspect.signature(self._call).parameters
        self._start_scale = 1.0  # by which the pipeline multiplies latents that it is given
        self._encoded: dict[tuple[int, ...], list[Any]] = {}

    def run(self, rows: slice, scheduler: Any) -> tuple[list[Tensor], list[Tensor], Any]:
        """A whole run with a copy of `scheduler`.

        Returns:
            The samples before each step and after the last, the outputs at each step, and the copy as the run left it.

        Raises:
            ValueError: where the pipeline does not call its scheduler's `step` once for each timestep.
        """
        listening, count = copy.deepcopy(scheduler), len(self.prompts[rows])
        samples: list[Tensor] = []
        outputs: list[Tensor] = []

        def step(own: Callable[..., Any], output: Tensor, timestep: Tensor, sample: Tensor, **others: Any) -> Any:
            samples.append(sample[:count].clone())  # some pipelines repeat the batch for guidance
            outputs.append(output[:count].clone())
            made = own(output, timestep, sample, **others)
            if len(outputs) == len(listening.timesteps):
                samples.append(made[0][:count])
                raise _Reached
            return made

        _listen(listening, "step", step)
        try:
            self._called(rows, listening)
        except _Reached:
            self._start_scale = float(getattr(listening, "init_noise_sigma", 1.0))
            return samples, outputs, listening
        raise ValueError(
            f"h2cache.calibrate saw {len(outputs)} steps in a run of {self.steps}: it needs a pipeline that calls "
            "scheduler.step once for each timestep"
        )

    def output(self, rows: slice, step: int, sample: Tensor) -> Tensor:
        """What the pipeline hands to its scheduler at a step for these samples; with a gradient where that is on."""
        listening, found = copy.deepcopy(self.pipe.scheduler), []

        def reached(own: Callable[..., Any], output: Tensor, *_: Any, **others: Any) -> None:
            found.append(output[: len(sample)])
            raise _Reached

        _listen(listening, "step", reached)
        try:
            self._called(rows, listening, **self._from(listening, slice(step, step + 1), sample))
        except _Reached:
            return found[0]
        raise ValueError(f"h2cache.calibrate cannot begin a run of this pipeline at step {step}")

    def decoded(self, samples: Tensor) -> Tensor:
        """The images or videos of final samples as the pipeline makes them, (B, ...) in 0..1."""
        # A pipeline that takes no latents is given them in a last step, whose output is not used.
        steps = slice(self.steps if self._takes_latents else self.steps - 1, self.steps)
        made = []
        for part in samples.split(AT_ONCE):
            listening = copy.deepcopy(self.pipe.scheduler)
            _listen(listening, "step", lambda own, output, timestep, sample, **_: SchedulerOutput(prev_sample=sample))
            rows = slice(0, len(part))
            begun = self._from(listening, steps, part)
            made.append(self._called(rows, listening, output_type="pt", **begun)[0].float())
        return torch.cat(made)

    def _from(self, scheduler: Any, steps: slice, sample: Tensor) -> dict[str, Any]:
        """Make the next run with this scheduler begin at `sample` and make `steps` alone; arguments for the call."""

        def set_timesteps(own: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            scheduler.timesteps = scheduler.timesteps[steps]
            scheduler._step_index = steps.start  # which `scale_model_input` would else look up in the timesteps

        def given(own: Callable[..., Any], noise: Tensor, *_: Any) -> Tensor:
            return torch.cat([sample] * (len(noise) // len(sample)))

        _listen(scheduler, "set_timesteps", set_timesteps)
        if self._takes_latents:
            return {"latents": sample / self._start_scale}
        _listen(scheduler, "scale_model_input", given)
        return {}

    def _called(self, rows: slice, scheduler: Any, **more: Any) -> Any:
        """The result of the pipeline's own call with this scheduler."""
        each = {
            name: value[rows]
            for name, value in self.arguments.items()
            if isinstance(value, list) and len(value) == len(self.prompts)
        }
        seeds = [self.seed + place for place in range(len(self.prompts))[rows]]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        call = {"num_inference_steps": self.steps, "generator": generators, **self.arguments, **each, **more}
        with self._lent(rows, scheduler):
            return self._call(self.pipe, self.prompts[rows], **call)

    @contextmanager
    def _lent(self, rows: slice, scheduler: Any) -> Iterator[None]:
        """The pipeline with this scheduler, without a progress bar, and with what earlier calls made of the prompts."""
        pipe, own = self.pipe, self.pipe.scheduler
        replaced: dict[str, Any] = {"_progress_bar_config": {"disable": True}}
        if hasattr(pipe, "encode_prompt"):
            known = self._encoded.setdefault(rows.indices(len(self.prompts)), [])
            replaced["encode_prompt"] = _remembering(pipe.encode_prompt, known)
        before = {name: vars(pipe)[name] for name in replaced if name in vars(pipe)}
        pipe.scheduler = scheduler
        vars(pipe).update(replaced)
        try:
            yield
        finally:
            pipe.scheduler = own
            for name in replaced:
                del vars(pipe)[name]
            vars(pipe).update(before)


def _listen(scheduler: Any, name: str, instead: Callable[..., Any]) -> None:
    """Put a function in the place of a method of this one scheduler; it is given the method first."""
    own = getattr(scheduler, name)

    @wraps(own)  # pipelines look which arguments it takes
    def method(*args: Any, **kwargs: Any) -> Any:
        return instead(own, *args, **kwargs)

    setattr(scheduler, name, method)


def _remembering(encode: Callable[..., Any], known: list[Any]) -> Callable[..., Any]:
    """`encode`, whose n-th result is the n-th that is known, which is added where there is none yet."""
    places = itertools.count()

    @wraps(encode)
    def encoded(*args: Any, **kwargs: Any) -> Any:
        place = next(places)
        if place == len(known):
            with torch.no_grad():
                known.append(encode(*args, **kwargs))
        return known[place]

    return encoded
