"""Stage 2: a pool of clips, each encoded once by the trained autoencoder.

Clip `i` of a pool is a function of the seed and `i` alone, so only its latents are stored; captions are phrased anew
each time that a clip is used. No clip has a held-out combination of shape, colour and motion.
"""

import argparse
import json
import os
import random
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from . import vae as autoencoder
from .clips import Clip, draw, random_clip
from .shape_aid import covered_shares


def clip_at(seed: int, index: int) -> Clip:
    return random_clip(random.Random(f"clip-{seed}-{index}"))


class Pool:
    """Scaled latents (N, 16, 5, 8, 8) of float16, and the clips that they show."""

    def __init__(self, work: Path):
        self.meta = json.loads((work / "latents.json").read_text())
        self.latents = np.load(work / "latents.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.latents)

    def clip(self, index: int) -> Clip:
        return clip_at(self.meta["seed"], index)

    @cached_property
    def covered(self) -> np.ndarray:
        """(N, 5, 8, 8), see `covered_shares`; takes some seconds."""
        return np.stack([covered_shares(self.clip(i)) for i in range(len(self))])


@torch.no_grad()
def encode(work: Path, count: int, seed: int, device: torch.device, batch: int = 2) -> None:
    vae = autoencoder.load(work).to(device)
    chunks = []
    for start in range(0, count, batch):
        clips = [clip_at(seed, i) for i in range(start, min(start + batch, count))]
        pixels = autoencoder.to_pixels([draw(clip) for clip in clips]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            chunks.append(vae.encode(pixels).latent_dist.mean.float().cpu())
        if start // batch % 200 == 0:
            print(f"{start} of {count} clips", flush=True)
    latents = torch.cat(chunks)
    scale = 1 / latents.std().item()
    np.save(work / "latents.partial.npy", (latents * scale).half().numpy())
    os.replace(work / "latents.partial.npy", work / "latents.npy")
    meta = {"seed": seed, "count": count, "scaling_factor": scale, "mean": latents.mean().item()}
    (work / "latents.json").write_text(json.dumps(meta, indent=2))
    print(meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=6144)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encode(options.work, options.count, options.seed, options.device)


if __name__ == "__main__":
    main()
