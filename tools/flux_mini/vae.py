"""Stage 1: the autoencoder, 3x128x128 pixels to 16x16x16 latents and back.

Purely convolutional (no attention in the middle), so that it can be trained on 64x64 crops around the letters, where
the detail is, and run on whole images.
"""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from .scenes import SIZE, Letter, draw, letter_boxes, letter_map, random_scene
from .training import Log, advance, cosine, resume, save, set_rate, stage_options

CROP = 64
EDGE_WEIGHT = 1.0
LETTER_WEIGHT = 2.0
KL_WEIGHT = 3e-4


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIZE,
    )


def to_pixels(images: list) -> torch.Tensor:
    """PIL images to (B, 3, H, W) float32 in [-1, 1]."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def crops(rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 3, 64, 64) pixels, two crops a scene, one around a letter of its word and one anywhere, and the
    (count, 1, 64, 64) weights of those pixels in the loss: `1 + LETTER_WEIGHT` in the cells that a letter covers."""
    images, covered = [], []
    while len(images) < count:
        scene = random_scene(rng)
        image, letters = draw(scene), letter_map(scene).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        letter = rng.choice(letter_boxes(scene))
        for box in (_box_around(letter, rng), _box_anywhere(rng)):
            images.append(image.crop(box))
            covered.append(np.asarray(letters.crop(box)) > 0)
    weights = 1 + LETTER_WEIGHT * torch.from_numpy(np.stack(covered[:count])).float().unsqueeze(1)
    return to_pixels(images[:count]), weights


def _box_around(letter: Letter, rng: random.Random) -> tuple[int, int, int, int]:
    """Of a crop that has the middle of the letter in its own middle half, as far as the picture allows."""
    x, y = (round(at) - rng.randint(CROP // 4, 3 * CROP // 4) for at in (letter.x, letter.y))
    x, y = (min(max(0, start), SIZE - CROP) for start in (x, y))
    return x, y, x + CROP, y + CROP


def _box_anywhere(rng: random.Random) -> tuple[int, int, int, int]:
    x, y = rng.randint(0, SIZE - CROP), rng.randint(0, SIZE - CROP)
    return x, y, x + CROP, y + CROP


def pixel_losses(
    reconstruction: torch.Tensor, pixels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted L1, and weighted L1 of the horizontal and vertical differences."""
    l1 = (weights * (reconstruction - pixels).abs()).mean()
    by_axis = zip(edges(reconstruction), edges(pixels), (weights[..., 1:, :], weights[..., 1:]), strict=True)
    return l1, sum((w * (a - b).abs()).mean() for a, b, w in by_axis)


def loss_terms(
    vae: AutoencoderKL, pixels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pixel losses, and KL in nats per latent element."""
    posterior = vae.encode(pixels).latent_dist
    l1, edge = pixel_losses(vae.decode(posterior.sample()).sample.float(), pixels, weights)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return l1, edge, kl


def validation_pixels(seed: int) -> torch.Tensor:
    """64 whole scenes that no training step draws."""
    rng = random.Random(seed + 1_000_003)
    return to_pixels([draw(random_scene(rng)) for _ in range(64)])


@torch.no_grad()
def reconstruction_quality(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[float, float]:
    """Mean PSNR (dB, peak 2) over whole images and over the central band that holds most letters."""
    reconstruction = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    error = (reconstruction - pixels).square()

    def decibels(region: torch.Tensor) -> float:
        return (10 * torch.log10(4 / region.mean(dim=(1, 2, 3)))).mean().item()

    return decibels(error), decibels(error[:, :, 44:84, 20:108])


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    vae = build().to(device, memory_format=torch.channels_last)
    optims = [torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)]
    checkpoint = work / "vae.pt"
    start = resume(checkpoint, model=vae, optimizers=optims)
    validation = validation_pixels(seed).to(device)
    log = Log(work / "vae.csv", ("l1", "edge", "kl", "psnr", "psnr_letters"), start)
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps))
        pixels, weights = crops(random.Random(f"{seed}-{step}"), batch)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            l1, edge, kl = loss_terms(vae, pixels, weights.to(device))
        (l1 + EDGE_WEIGHT * edge + KL_WEIGHT * kl).backward()
        advance(optims, vae.parameters())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            whole, letters = reconstruction_quality(vae, validation)
            log.write(step + 1, l1=l1.item(), edge=edge.item(), kl=kl.item(), psnr=whole, psnr_letters=letters)
            save(checkpoint, step + 1, model=vae, optimizers=optims)


def load(work: Path) -> AutoencoderKL:
    """The trained autoencoder, in evaluation mode."""
    vae = build()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True, map_location="cpu")["model"])
    return vae.eval().requires_grad_(False)


def main() -> None:
    options = stage_options(__doc__, steps=5000, batch=24, learning_rate=1e-3)
    train(options.work, options.steps, options.batch, options.learning_rate, options.seed, options.device)


if __name__ == "__main__":
    main()
