"""One prompt to one image or video, timed in its three parts."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from h2cache.eval.models.pipelines import takes


@dataclass(frozen=True)
class Drawing:
    """The frames of a video, or an image as the only one, and the seconds that the parts took."""

    frames: tuple[Image.Image, ...]
    is_video: bool
    text_seconds: float
    denoising_seconds: float
    vae_seconds: float

    @property
    def image(self) -> Image.Image:
        """The image; ValueError for a video."""
        if self.is_video:
            raise ValueError(f"a video of {len(self.frames)} frames is no image")
        return self.frames[0]

    @property
    def total_seconds(self) -> float:
        """What a user waits, the model being loaded."""
        return self.text_seconds + self.denoising_seconds + self.vae_seconds


def generate(
    pipe: DiffusionPipeline,
    prompt: str,
    seed: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_latents: Callable[[torch.Tensor], None] = lambda latents: None,
    **call_arguments: Any,
) -> Drawing:
    """Draw what `pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), **call_arguments)` draws.

    With `num_images_per_prompt` the times are of the whole batch and the frames of its first image. That one has the
    noise of `seed`, the next that of `seed + 1`, and so on.

    Noise comes from the CPU so that a seed means the same on every device. `on_step(done, total)` is called after every
    denoising step, and so is `on_latents`, with what the step has made of the latents. Clocks are read with the device
    idle: text ends with the last call of a text encoder, denoising with the last step. Arguments that the pipeline does
    not take are left out.
    """
    device = pipe._execution_device  # asked once: finding it out takes milliseconds
    given = {name: value for name, value in call_arguments.items() if takes(pipe, name)}
    count = given.get("num_images_per_prompt", 1)
    noise = [torch.Generator("cpu").manual_seed(seed + index) for index in range(count)]
    start = text_end = denoising_end = _now(device)

    def after_text(encoder: nn.Module, args: tuple, output: Any) -> None:
        nonlocal text_end
        text_end = _now(device)

    def after_step(pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        nonlocal denoising_end
        on_step(step + 1, pipe.num_timesteps)
        on_latents(tensors["latents"])
        if step + 1 == pipe.num_timesteps:
            denoising_end = _now(device)
        return tensors

    with ExitStack() as hooks:
        for encoder in _text_encoders(pipe):
            hooks.enter_context(encoder.register_forward_hook(after_text))
        result, *_ = pipe(
            prompt=prompt,
            generator=noise[0] if len(noise) == 1 else noise,
            callback_on_step_end=after_step,
            output_type="pil",
            **given,
        )[0]
    end = _now(device)
    is_video = not isinstance(result, Image.Image)
    frames = tuple(result) if is_video else (result,)
    return Drawing(frames, is_video, text_end - start, denoising_end - text_end, end - denoising_end)


def _text_encoders(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The pipeline's text encoders, by their names in diffusers: text_encoder, text_encoder_2 and so on."""
    parts = pipe.components.items()
    return [part for name, part in parts if name.startswith("text_encoder") and isinstance(part, nn.Module)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
