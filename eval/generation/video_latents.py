"""How far a cache takes each frame of a video's latents from those of the uncached run, step by step."""

from contextlib import nullcontext

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from h2cache.eval.generation.backends import Method, applied
from h2cache.eval.generation.generate import generate
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.models.pipelines import ModelConfig


def recorded_latents(
    pipe: DiffusionPipeline, model: ModelConfig, prompt: Prompt, seed: int, steps: int, method: Method | None
) -> Tensor | None:
    """(steps, frames, values) float32: the latents after each step. None where they are not (B, C, F, H, W)."""
    latents: list[Tensor] = []

    def made(after: Tensor) -> None:
        latents.append(after.float().cpu())

    arguments = model.arguments_with(prompt.picture and prompt.picture.image) | {"num_inference_steps": steps}
    with applied(pipe, method) if method else nullcontext():
        generate(pipe, prompt.text, seed, on_latents=made, **arguments)
    if latents[0].dim() != 5:
        return None
    return torch.stack([after[0].transpose(0, 1).flatten(1) for after in latents])


def frame_errors(cached: Tensor, uncached: Tensor) -> Tensor:
    """(steps, frames) float64 relative L2 error of (steps, frames, values)."""
    wrong = (cached.double() - uncached.double()).norm(dim=2)
    return wrong / uncached.double().norm(dim=2)
