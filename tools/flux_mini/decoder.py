"""Stage 3: the decoder alone, sharpened on letters, with the encoder and so all latents fixed.

It may run beside the transformer's stage. Latents get the noise that a sampler of this size leaves in them, so that the
decoder learns to draw clean letters from slightly wrong latents.
"""

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from . import vae as autoencoder
from .training import Log, advance, cosine, resume, save, set_rate, stage_options

LATENT_NOISE = 0.1
EDGE_WEIGHT = 1.5


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    vae = autoencoder.load(work).to(device, memory_format=torch.channels_last)
    vae.decoder.requires_grad_(True)
    optims = [torch.optim.AdamW(vae.decoder.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)]
    checkpoint = work / "decoder.pt"
    start = resume(checkpoint, model=vae, optimizers=optims)
    validation = autoencoder.validation_pixels(seed).to(device)
    log = Log(work / "decoder.csv", ("l1", "edge", "psnr", "psnr_letters"), start)
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps))
        rng = random.Random(f"decoder-{seed}-{step}")
        pixels = autoencoder.crops(rng, batch).to(device, memory_format=torch.channels_last)
        noise = torch.Generator().manual_seed(rng.getrandbits(62))
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mean.float()
            latents = latents + LATENT_NOISE * torch.randn(latents.shape, generator=noise).to(device)
            reconstruction = vae.decode(latents).sample.float()
        l1, edge = autoencoder.pixel_losses(reconstruction, pixels)
        (l1 + EDGE_WEIGHT * edge).backward()
        advance(optims, vae.decoder.parameters())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            whole, letters = autoencoder.psnr(vae, validation)
            log.write(step + 1, l1=l1.item(), edge=edge.item(), psnr=whole, psnr_letters=letters)
            save(checkpoint, step + 1, model=vae, optimizers=optims)


def load(work: Path) -> AutoencoderKL:
    """The autoencoder with the sharpened decoder, in evaluation mode."""
    vae = autoencoder.build()
    vae.load_state_dict(torch.load(work / "decoder.pt", weights_only=True, map_location="cpu")["model"])
    return vae.eval().requires_grad_(False)


def main() -> None:
    options = stage_options(__doc__, steps=1500, batch=16, learning_rate=7e-4)
    train(options.work, options.steps, options.batch, options.learning_rate, options.seed, options.device)


if __name__ == "__main__":
    main()
