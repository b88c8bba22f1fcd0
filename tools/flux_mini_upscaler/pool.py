"""Stage 1: scenes, their small pictures and their captions, each encoded once by flux-mini's own encoders.

Scene `i` is a function of the seed and `i` alone. Training asks for more of them as it goes on, so that it starts at
once; what was encoded stays on disk.
"""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from tools.flux_mini.latents import pack, scene_at
from tools.flux_mini.scenes import SIZE, caption, draw
from tools.flux_mini.text import T5_LENGTH, WIDTH
from tools.flux_mini.transformer import CAPTION_DROPOUT, TOKENS
from tools.flux_mini.vae import to_pixels

from .degrade import degraded

CHUNK = 64
SHAPES = {"latents": (TOKENS, 64), "control": (TOKENS, 64), "states": (T5_LENGTH, WIDTH), "pooled": (WIDTH,)}


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture at 128x128 as FluxControlNetPipeline enlarges it before it encodes it."""
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


class Pool:
    """float16 arrays of up to `count` scenes: `latents` and `control` (N, 64, 64), packed and normalised, of the
    picture and of its small one; `states` (N, 40, 128) and `pooled` (N, 128) of its caption."""

    def __init__(self, work: Path, pipe: FluxPipeline, count: int, seed: int):
        work.mkdir(parents=True, exist_ok=True)
        self.pipe, self.count, self.seed = pipe, count, seed
        self._marker = work / f"pool-{seed}-{count}.txt"
        self.filled = int(self._marker.read_text()) if self._marker.exists() else 0
        self.arrays = {}
        for name, shape in SHAPES.items():
            path = work / f"pool-{seed}-{count}-{name}.npy"
            mode = "r+" if self.filled else "w+"
            self.arrays[name] = np.lib.format.open_memmap(path, mode, np.float16, (count, *shape))

    def grow(self, needed: int) -> None:
        """Encode until at least `needed` scenes are there, or all."""
        while self.filled < min(needed, self.count):
            indices = range(self.filled, min(self.filled + CHUNK, self.count))
            for name, values in self._encoded(indices).items():
                self.arrays[name][indices.start : indices.stop] = values.cpu().numpy()
                self.arrays[name].flush()
            self.filled = indices.stop
            self._marker.write_text(str(self.filled))

    def batch(self, rng: random.Random, size: int, device: torch.device) -> dict[str, torch.Tensor]:
        """`size` of the scenes that are there, as float32."""
        indices = sorted(rng.randrange(self.filled) for _ in range(size))
        return {name: torch.from_numpy(array[indices]).float().to(device) for name, array in self.arrays.items()}

    @torch.no_grad()
    def _encoded(self, indices: range) -> dict[str, torch.Tensor]:
        pictures, small, prompts = [], [], []
        for index in indices:
            scene, rng = scene_at(self.seed, index), random.Random(f"degraded-{self.seed}-{index}")
            pictures.append(draw(scene))
            small.append(enlarged(degraded(pictures[-1], rng)))
            prompts.append("" if rng.random() < CAPTION_DROPOUT else caption(scene, rng))
        states, pooled, _ = self.pipe.encode_prompt(prompts, prompts, max_sequence_length=T5_LENGTH)
        return {
            "latents": encode(self.pipe, pictures),
            "control": encode(self.pipe, small),
            "states": states,
            "pooled": pooled,
        }


@torch.no_grad()
def encode(pipe: FluxPipeline, pictures: list[Image.Image]) -> torch.Tensor:
    """(B, 64, 64) packed, normalised latents of 128x128 pictures: the mean of what the pipeline samples from."""
    vae = pipe.vae
    pixels = to_pixels(pictures).to(vae.device, memory_format=torch.channels_last)
    with torch.autocast(vae.device.type, torch.bfloat16):
        latents = vae.encode(pixels).latent_dist.mean.float()
    return pack((latents - vae.config.shift_factor) * vae.config.scaling_factor)
