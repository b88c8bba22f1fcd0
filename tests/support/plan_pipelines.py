"""Tiny random pipelines with a VAE and prompts, each with the scheduler that its kind comes with, to calibrate on.

Prompts are text (for DiT, classes) and become random embeddings, which their letters decide.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
)
from families.base import lively, quiet, random_embeddings
from families.image import BETA_END, CHANNELS, POOLED_WIDTH, SCALE, TEXT_TOKENS, TEXT_WIDTH, dit, qwen_image, sd3
from families.video import wan, wan_vae
from torch import Tensor


def seeded(kind: type[torch.nn.Module], **config: Any) -> torch.nn.Module:
    """A module in eval mode; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return kind(**config).eval()


def small_vae() -> AutoencoderKL:
    """Eight pixels a latent."""
    blocks = 4
    return seeded(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        shift_factor=0.1,
        mid_block_add_attention=False,
    )


def embedded(prompt: str | list[str], *shape: int) -> Tensor:
    """(B, *shape)"""
    texts = [prompt] if isinstance(prompt, str) else prompt
    return random_embeddings([sum(map(ord, text)) for text in texts], *shape)


def sdxl() -> StableDiffusionXLPipeline:
    """A U-Net of two levels, with Euler steps and epsilon prediction."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * 8,
    )
    empty = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = EulerDiscreteScheduler(beta_end=BETA_END, timestep_spacing="leading", steps_offset=1)
    return StableDiffusionXLPipeline(
        vae=small_vae(), unet=lively(unet), scheduler=scheduler, add_watermarker=False, **empty
    )


def of_two_widths(prompt: Any, *_: Any, negative_prompt: Any = None, **__: Any) -> tuple[Tensor, ...]:
    """As SDXL and SD3 encode."""
    negative = [negative_prompt or ""] * len(prompt)
    widths = ((TEXT_TOKENS, TEXT_WIDTH), (POOLED_WIDTH,))
    return tuple(embedded(texts, *width) for width in widths for texts in (prompt, negative))


def of_wan(prompt: Any, *_: Any, negative_prompt: Any = None, **__: Any) -> tuple[Tensor, Tensor]:
    negative = [negative_prompt or ""] * len(prompt)
    return embedded(prompt, TEXT_TOKENS, TEXT_WIDTH), embedded(negative, TEXT_TOKENS, TEXT_WIDTH)


def of_qwen(prompt: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    embeds = embedded(prompt, TEXT_TOKENS, TEXT_WIDTH)
    return embeds, torch.ones(embeds.shape[:2], dtype=torch.long)


def with_vae(kind: type[DiffusionPipeline], pipe: DiffusionPipeline, vae: torch.nn.Module) -> DiffusionPipeline:
    return kind(**pipe.components | {"vae": vae})


def qwen_vae() -> AutoencoderKLQwenImage:
    zeros, ones = [0.0] * CHANNELS, [1.0] * CHANNELS
    return seeded(
        AutoencoderKLQwenImage,
        base_dim=4, z_dim=CHANNELS, num_res_blocks=1, dim_mult=[1, 1, 1, 1], latents_mean=zeros, latents_std=ones,
    )  # fmt: skip


IMAGE = dict(height=32, width=32)
# By name: the pipeline, how it encodes prompts, the arguments of its call.
MADE: dict[str, tuple[Callable[[], DiffusionPipeline], Callable[..., Any] | None, dict[str, Any]]] = {
    "sdxl": (sdxl, of_two_widths, dict(IMAGE, guidance_scale=SCALE)),
    "dit": (dit, None, dict(guidance_scale=SCALE)),
    "wan": (lambda: with_vae(WanPipeline, wan(), wan_vae()), of_wan, dict(IMAGE, num_frames=1, guidance_scale=SCALE)),
    "qwen-image": (
        lambda: with_vae(QwenImagePipeline, qwen_image(), qwen_vae()),
        of_qwen,
        dict(IMAGE, negative_prompt=[" "] * 4, true_cfg_scale=SCALE),
    ),
    "sd3": (
        lambda: with_vae(StableDiffusion3Pipeline, sd3(), small_vae()),
        of_two_widths,
        dict(IMAGE, guidance_scale=SCALE),
    ),
}


@cache
def made(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A pipeline and the arguments of its call, for all tests: leave it as you found it."""
    build, encode, call = MADE[name]
    pipe = quiet(build())
    if encode is not None:
        pipe.encode_prompt = encode
    return pipe, call
