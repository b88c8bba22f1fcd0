"""Stage 1: the autoencoder, 17 frames of 3x64x64 pixels to 5 of 16x8x8 latents and back.

Purely convolutional (no attention in the middle), so that most steps can be on crops of 9 frames of 32x32 around the
shape, where the edges and the motion are; every eighth step sees whole videos, for the group norms' statistics.
"""

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo

from h2cache.eval.metrics.motions import FRAMES, SIZE
from tools.flux_mini.training import Log, advance, cosine, resume, save, set_rate, stage_options

from .clips import Clip, draw, random_clip

CROP = 32
CROP_FRAMES = 9
WHOLE_EVERY = 8  # steps
WHOLE_SHARE = 6  # crops of a batch that cost about as much as one whole video
SHAPE_WEIGHT = 4.0  # of the pixels of the shape and close by, over that of the others
SHAPE_MARGIN = 2  # pixels around the shape
DIFFERENCE_WEIGHT = 0.5  # of each axis' differences: edges, and motion
KL_WEIGHT = 3e-4
LOGVAR = -6.0


def build() -> AutoencoderKLHunyuanVideo:
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    _start_as_blur(vae)
    return vae


@torch.no_grad()
def _start_as_blur(vae: AutoencoderKLHunyuanVideo) -> None:
    """Let every convolution outside of the residual branches hand its channels on, and the noise in the latents be
    small: colours then come through from the first step, where random weights would lose them in twenty layers."""
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv3d) and ".conv1" not in name and ".conv2" not in name:
            channel = torch.arange(min(module.in_channels, module.out_channels))
            middle = tuple(size // 2 for size in module.kernel_size)
            if module.kernel_size[0] > 1:  # time is padded before the first frame alone: the last place is now
                middle = (module.kernel_size[0] - 1, *middle[1:])
            module.weight.mul_(0.5)
            module.weight[channel, channel, *middle] += 1
    vae.quant_conv.bias.chunk(2)[1].fill_(LOGVAR)


class ConvolutionMuon(torch.optim.Muon):
    """Muon for convolutions, each of whose weights counts as the matrix (out, in x kernel)."""

    def __init__(self, weights: Iterable[torch.nn.Parameter], learning_rate: float):
        self._weights = list(weights)
        matrices = [weight.detach().view(len(weight), -1) for weight in self._weights]  # of the same memory
        super().__init__(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self) -> None:
        for matrix, weight in zip(self.param_groups[0]["params"], self._weights, strict=True):
            matrix.grad = weight.grad.reshape(matrix.shape)
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None


def optimizers(vae: AutoencoderKLHunyuanVideo, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the weights of convolutions, AdamW for everything else."""
    weights = [parameter for parameter in vae.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in vae.parameters() if parameter.ndim == 1]
    return [
        ConvolutionMuon(weights, learning_rate),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def to_pixels(videos: list[np.ndarray]) -> torch.Tensor:
    """(T, H, W, 3) uint8 videos to (B, 3, T, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1).contiguous()


def crop(clip: Clip, rng: random.Random) -> np.ndarray:
    """(9, 32, 32, 3) uint8 pixels near the middle of the clip's way."""
    first = rng.randint(0, FRAMES - CROP_FRAMES)
    left, top = (round(at + rng.uniform(-20, 20)) - CROP // 2 for at in (clip.x, clip.y))
    left, top = (min(max(0, start), SIZE - CROP) for start in (left, top))
    return draw(clip, range(first, first + CROP_FRAMES))[:, top : top + CROP, left : left + CROP]


def examples(seed: int, step: int, batch: int) -> torch.Tensor:
    """(B, 3, T, H, W) pixels of a step: `batch` crops, or fewer whole videos."""
    rng = random.Random(f"{seed}-{step}")
    if step % WHOLE_EVERY == 0:
        return to_pixels([draw(random_clip(rng)) for _ in range(max(1, batch // WHOLE_SHARE))])
    return to_pixels([crop(random_clip(rng), rng) for _ in range(batch)])


def shape_weights(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, H, W): `SHAPE_WEIGHT` where the shape is in a frame, or was in the one before or after, else 1.

    The shape is what differs from the video's most frequent colour.
    """
    ground = pixels.flatten(2).median(dim=2).values[:, :, None, None, None]
    shape = ((pixels - ground).abs().amax(dim=1, keepdim=True) > 0.1).float()
    near = F.max_pool3d(shape, (3, 2 * SHAPE_MARGIN + 1, 2 * SHAPE_MARGIN + 1), 1, (1, SHAPE_MARGIN, SHAPE_MARGIN))
    return 1 + (SHAPE_WEIGHT - 1) * near


def loss_terms(vae: AutoencoderKLHunyuanVideo, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted L1 and squared error, weighted L1 of the differences along time, rows and columns, and KL in nats per
    latent element."""
    posterior = vae.encode(pixels).latent_dist
    weights = shape_weights(pixels)
    error = vae.decode(posterior.sample()).sample.float() - pixels
    differences = sum(
        (weights.narrow(axis, 1, weights.shape[axis] - 1) * error.diff(dim=axis).abs()).mean() for axis in (2, 3, 4)
    )
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return (weights * (error.abs() + error.square())).mean(), differences, kl


def validation_pixels(seed: int) -> torch.Tensor:
    """24 whole videos of held-out combinations."""
    rng = random.Random(seed + 1_000_003)
    return to_pixels([draw(random_clip(rng, held_out=True)) for _ in range(24)])


@torch.no_grad()
def reconstruct(vae: AutoencoderKLHunyuanVideo, pixels: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """The videos as the autoencoder gives them back, without noise in the latents."""
    return torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample.clamp(-1, 1) for p in pixels.split(batch)])


def decibels(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """(B, T) PSNR of each frame, peak 2."""
    return 10 * torch.log10(4 / (reconstruction - pixels).square().mean(dim=(1, 3, 4)))


def train(work: Path, steps: int, batch: int, learning_rate: float, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    vae = build().to(device)
    optims = optimizers(vae, learning_rate)
    checkpoint = work / "vae.pt"
    start = resume(checkpoint, model=vae, optimizers=optims)
    validation = validation_pixels(seed).to(device)
    log = Log(work / "vae.csv", ("pixel", "difference", "kl", "psnr", "psnr_worst_frame"), start)
    for step in range(start, steps):
        set_rate(optims, learning_rate * cosine(step, steps))
        pixels = examples(seed, step, batch).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            pixel, difference, kl = loss_terms(vae, pixels)
        (pixel + DIFFERENCE_WEIGHT * difference + KL_WEIGHT * kl).backward()
        advance(optims, vae.parameters())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            quality = decibels(reconstruct(vae, validation), validation)
            measured = {"psnr": quality.mean().item(), "psnr_worst_frame": quality.min(dim=1).values.mean().item()}
            log.write(step + 1, pixel=pixel.item(), difference=difference.item(), kl=kl.item(), **measured)
            save(checkpoint, step + 1, model=vae, optimizers=optims)


def load(work: Path) -> AutoencoderKLHunyuanVideo:
    """The trained autoencoder, in evaluation mode."""
    vae = build()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True, map_location="cpu")["model"])
    return vae.eval().requires_grad_(False)


def main() -> None:
    options = stage_options(__doc__, steps=2600, batch=12, learning_rate=2e-3)
    train(options.work, options.steps, options.batch, options.learning_rate, options.seed, options.device)


if __name__ == "__main__":
    main()
