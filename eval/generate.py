"""One prompt to one image, timed in its three parts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL import Image


@dataclass(frozen=True)
class Drawing:
    """An image, and the seconds that its parts took."""

    image: Image.Image
    text_seconds: float
    denoising_seconds: float
    vae_seconds: float

    @property
    def total_seconds(self) -> float:
        """What a user waits, the model being loaded."""
        return self.text_seconds + self.denoising_seconds + self.vae_seconds


def generate(
    pipe: FluxPipeline,
    prompt: str,
    seed: int,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    **call_arguments: Any,
) -> Drawing:
    """Draw the image that `pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), **call_arguments)` draws.

    Noise comes from the CPU so that a seed means the same on every device. `on_step(done, total)` is called after every
    denoising step. Clocks are read with the device idle.
    """
    device = pipe._execution_device  # asked once: finding it out takes milliseconds
    clock = [_now(device)]
    with torch.no_grad():
        prompt_embeds, pooled_prompt_embeds, _ = pipe.encode_prompt(
            prompt, prompt_2=None, max_sequence_length=call_arguments["max_sequence_length"]
        )
    clock.append(_now(device))

    def step_end(pipe: FluxPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        on_step(step + 1, pipe.num_timesteps)
        if step + 1 == pipe.num_timesteps:
            clock.append(_now(device))
        return tensors

    (image,) = pipe(
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled_prompt_embeds,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=step_end,
        **call_arguments,
    ).images
    clock.append(_now(device))
    text, denoising, vae = (end - start for start, end in pairwise(clock))
    return Drawing(image, text, denoising, vae)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
