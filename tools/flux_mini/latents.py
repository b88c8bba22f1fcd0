"""Stage 2: a pool of scenes, each encoded once by the trained autoencoder.

Scene `i` of a pool is a function of the seed and `i` alone, so only its latents and its map of letters are stored;
captions are phrased anew each time that a scene is used.
"""

import argparse
import json
import os
import random
from pathlib import Path

import numpy as np
import torch

from . import vae as autoencoder
from .scenes import Scene, draw, letter_map, random_scene


def scene_at(seed: int, index: int) -> Scene:
    return random_scene(random.Random(f"scene-{seed}-{index}"))


class Pool:
    """Packed, normalised latents (N, 64, 64) of float16, letter maps (N, 32, 32) of uint8, and the scenes that they
    show."""

    def __init__(self, work: Path):
        self.meta = json.loads((work / "latents.json").read_text())
        self.packed = np.load(work / "latents.npy", mmap_mode="r")
        self.letters = np.load(work / "letters.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.packed)

    def scene(self, index: int) -> Scene:
        return scene_at(self.meta["seed"], index)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, 16, 16) latents to FLUX's (B, 64 tokens, 64 channels): 2x2 patches, channel-major."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, c * 4)


@torch.no_grad()
def encode(work: Path, count: int, seed: int, device: torch.device, batch: int = 64) -> None:
    vae = autoencoder.load(work).to(device, memory_format=torch.channels_last)
    chunks, letters = [], []
    for start in range(0, count, batch):
        scenes = [scene_at(seed, i) for i in range(start, min(start + batch, count))]
        pixels = autoencoder.to_pixels([draw(scene) for scene in scenes]).to(device, memory_format=torch.channels_last)
        letters += [np.asarray(letter_map(scene)) for scene in scenes]
        with torch.autocast(device.type, torch.bfloat16):
            chunks.append(vae.encode(pixels).latent_dist.mean.float().cpu())
        if start // batch % 50 == 0:
            print(f"{start} of {count} scenes", flush=True)
    latents = torch.cat(chunks)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    packed = pack((latents - shift) * scale).half().numpy()
    for name, array in (("latents", packed), ("letters", np.stack(letters))):
        np.save(work / f"{name}.partial.npy", array)
        os.replace(work / f"{name}.partial.npy", work / f"{name}.npy")
    meta = {"seed": seed, "count": count, "shift_factor": shift, "scaling_factor": scale}
    (work / "latents.json").write_text(json.dumps(meta, indent=2))
    print(meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32_768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encode(options.work, options.count, options.seed, options.device)


if __name__ == "__main__":
    main()
