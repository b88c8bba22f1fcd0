"""Tiny random pipelines of the image families. An image has 16 tokens."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ClassifierFreeGuidance,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor

from .base import Family, lively, quiet, random_embeddings, valid_tokens

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM
CHANNELS = 4
TEXT_WIDTH, POOLED_WIDTH = 24, 16
TEXT_TOKENS = 7
ROPE_AXES = (4, 6, 6)
SCALE = 3.0  # of guidance
BETA_END = 0.002  # a tenth of what is usual: else the first step, divided by hardly any signal, outweighs all others


def size(pixels: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


def flow_scheduler(dynamic: bool = False) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)


def prompts(seeds: list[int], salt: int = 0) -> Tensor:
    """(B, TEXT_TOKENS, TEXT_WIDTH)"""
    return random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH, salt=salt)


# FLUX.2


def flux2_transformer(**config: Any) -> Flux2Transformer2DModel:
    return lively(
        Flux2Transformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            mlp_ratio=2.0,
            axes_dims_rope=(4, 4, 4, 4),
            **config,
        )
    )


def flux2() -> Flux2Pipeline:
    """As FLUX.2 dev: the scale of guidance is embedded."""
    return quiet(
        Flux2Pipeline(
            scheduler=flow_scheduler(dynamic=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=flux2_transformer(),
        )
    )


def flux2_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    return {"prompt_embeds": prompts(seeds), "guidance_scale": SCALE if guided else 1.0, **size(64)}


# Chroma


def chroma() -> ChromaPipeline:
    sinusoids = 16
    transformer = lively(
        ChromaTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=ROPE_AXES,
            approximator_num_channels=4 * sinusoids,
            approximator_hidden_dim=2 * WIDTH,
            approximator_layers=1,
        )
    )
    # As `lively` does to other families' embeddings of the timestep: only slow cosines, and then sines.
    slow = torch.arange(sinusoids // 2) >= 5
    transformer.distilled_guidance_layer.in_proj.weight.data[:, :sinusoids] *= 2 * slow.repeat(2)
    return quiet(
        ChromaPipeline(scheduler=flow_scheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
    )


def chroma_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {
        "prompt_embeds": prompts(seeds),
        "prompt_attention_mask": valid_tokens(seeds, TEXT_TOKENS),
        "guidance_scale": SCALE if guided else 1.0,
        **size(64),
    }
    if guided:
        given |= {
            "negative_prompt_embeds": prompts(seeds, salt=1),
            "negative_prompt_attention_mask": valid_tokens(seeds, TEXT_TOKENS),
        }
    return given


# Qwen-Image


def qwen_image_transformer(**config: Any) -> QwenImageTransformer2DModel:
    return lively(
        QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=ROPE_AXES,
            **config,
        )
    )


def qwen_image() -> QwenImagePipeline:
    return quiet(
        QwenImagePipeline(
            scheduler=flow_scheduler(dynamic=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=qwen_image_transformer(),
        )
    )


class QwenImageEditWithoutVae(QwenImageEditPipeline):
    """The pipeline with random latents in the place of those that a VAE makes of the given image."""

    def _encode_vae_image(self, image: Tensor, generator: Any) -> Tensor:
        return random_embeddings([7], CHANNELS, 1, 8, 8)


def qwen_image_edit() -> QwenImageEditPipeline:
    """As Qwen-Image-Edit-2511: the tokens of the given image are modulated by timestep 0."""
    pipe = QwenImageEditWithoutVae(
        scheduler=flow_scheduler(dynamic=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=qwen_image_transformer(zero_cond_t=True),
    )
    pipe.vae_scale_factor = 128  # the pipeline takes images of 1024 pixels: 16 tokens then
    pipe.latent_channels = CHANNELS
    return quiet(pipe)


def qwen_image_inputs(seeds: list[int], guided: bool, pixels: int = 64) -> dict[str, Any]:
    given = {
        "prompt_embeds": prompts(seeds),
        "prompt_embeds_mask": valid_tokens(seeds, TEXT_TOKENS),
        "true_cfg_scale": SCALE if guided else 1.0,
        **size(pixels),
    }
    if guided:
        given |= {
            "negative_prompt_embeds": prompts(seeds, salt=1),
            "negative_prompt_embeds_mask": valid_tokens(seeds, TEXT_TOKENS),
        }
    return given


def qwen_image_edit_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    return {"image": Image.new("RGB", (16, 16)), **qwen_image_inputs(seeds, guided, pixels=1024)}


# HunyuanImage


class HunyuanImageWithScale(HunyuanImagePipeline):
    """The pipeline with the scale of its guider as an argument of the call: 1 is no guidance."""

    def __call__(self, *args: Any, guidance_scale: float = 1.0, **kwargs: Any) -> Any:
        self.guider.guidance_scale = guidance_scale
        return super().__call__(*args, **kwargs)


def hunyuan_image() -> HunyuanImagePipeline:
    transformer = HunyuanImageTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=POOLED_WIDTH,
        rope_axes_dim=(8, 8),
    )
    # diffusers makes it 2048 wide, which takes longer than all blocks.
    transformer.context_embedder_2 = type(transformer.context_embedder_2)(POOLED_WIDTH, WIDTH, WIDTH)
    return quiet(
        HunyuanImageWithScale(
            scheduler=flow_scheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=lively(transformer),
            guider=ClassifierFreeGuidance(guidance_scale=1.0),
        )
    )


def hunyuan_image_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {
        "prompt_embeds": prompts(seeds),
        "prompt_embeds_mask": valid_tokens(seeds, TEXT_TOKENS),
        "prompt_embeds_2": random_embeddings(seeds, 4, POOLED_WIDTH, salt=1),
        "prompt_embeds_mask_2": valid_tokens(seeds, 4),
        **size(128),
    }
    if guided:
        given |= {
            "negative_prompt_embeds": prompts(seeds, salt=2),
            "negative_prompt_embeds_mask": valid_tokens(seeds, TEXT_TOKENS),
            "negative_prompt_embeds_2": random_embeddings(seeds, 4, POOLED_WIDTH, salt=3),
            "negative_prompt_embeds_mask_2": valid_tokens(seeds, 4),
            "guidance_scale": SCALE,
        }
    return given


# Stable Diffusion 3.5


def sd3() -> StableDiffusion3Pipeline:
    """As Stable Diffusion 3.5 medium: the first blocks have two attentions."""
    transformer = lively(
        SD3Transformer2DModel(
            sample_size=8,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
    )
    names = [f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    return quiet(
        StableDiffusion3Pipeline(transformer=transformer, scheduler=flow_scheduler(), vae=None, **dict.fromkeys(names))
    )


def sd3_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {
        "prompt_embeds": prompts(seeds),
        "pooled_prompt_embeds": random_embeddings(seeds, POOLED_WIDTH, salt=1),
        "guidance_scale": SCALE if guided else 1.0,
        **size(64),
    }
    if guided:
        given |= {
            "negative_prompt_embeds": prompts(seeds, salt=2),
            "negative_pooled_prompt_embeds": random_embeddings(seeds, POOLED_WIDTH, salt=3),
        }
    return given


# Z-Image


def z_image() -> ZImagePipeline:
    transformer = lively(
        ZImageTransformer2DModel(
            in_channels=CHANNELS,
            dim=WIDTH,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=HEADS,
            n_kv_heads=HEADS,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=list(ROPE_AXES),
            axes_lens=[96, 16, 16],
        )
    )
    return quiet(
        ZImagePipeline(scheduler=flow_scheduler(), vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
    )


def z_image_prompts(seeds: list[int], salt: int = 0) -> list[Tensor]:
    """A prompt for each sample, all of them padded to 32 tokens by the model."""
    return [random_embeddings([seed], 9, TEXT_WIDTH, salt=salt)[0] for seed in seeds]


def z_image_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {"prompt_embeds": z_image_prompts(seeds), "guidance_scale": SCALE if guided else 0.0, **size(64)}
    if guided:
        given["negative_prompt_embeds"] = z_image_prompts(seeds, salt=1)
    return given


# Lumina 2


def lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        hidden_size=WIDTH,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=ROPE_AXES,
        axes_lens=(32, 16, 16),
        cap_feat_dim=TEXT_WIDTH,
    )
    return quiet(
        Lumina2Pipeline(
            transformer=lively(transformer, longest=1.0),  # its timestep is not multiplied by 1000
            scheduler=flow_scheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
        )
    )


def lumina2_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    # Prompts of one length: the model pads others, and padding counts where a cache looks at the text.
    mask = (torch.arange(TEXT_TOKENS) < 5).expand(len(seeds), -1).long()
    given = {
        "prompt_embeds": prompts(seeds),
        "prompt_attention_mask": mask,
        "guidance_scale": SCALE if guided else 1.0,
        **size(64),
    }
    if guided:
        given |= {"negative_prompt_embeds": prompts(seeds, salt=1), "negative_prompt_attention_mask": mask}
    return given


# PixArt


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=4,
        cross_attention_dim=WIDTH,
        sample_size=8,
        caption_channels=TEXT_WIDTH,
    )
    return quiet(
        PixArtSigmaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=lively(transformer),
            scheduler=DPMSolverMultistepScheduler(beta_end=BETA_END),
        )
    )


def pixart_inputs(seeds: list[int], guided: bool, pixels: int = 64) -> dict[str, Any]:
    given = {
        "prompt_embeds": prompts(seeds),
        "prompt_attention_mask": valid_tokens(seeds, TEXT_TOKENS),
        "negative_prompt": None,
        "guidance_scale": SCALE if guided else 1.0,
        "use_resolution_binning": False,
        **size(pixels),
    }
    if guided:
        given |= {
            "negative_prompt_embeds": prompts(seeds, salt=1),
            "negative_prompt_attention_mask": valid_tokens(seeds, TEXT_TOKENS),
        }
    return given


# Sana


def sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=4,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=4,
    )
    return quiet(
        SanaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=lively(transformer),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )


def sana_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    return pixart_inputs(seeds, guided, pixels=128)


# DiT


def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=4,
        sample_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(block_out_channels=(8,), latent_channels=CHANNELS, norm_num_groups=4).eval()
    return quiet(
        DiTPipeline(
            transformer=lively(transformer), vae=vae, scheduler=DDIMScheduler(beta_end=BETA_END, clip_sample=False)
        )
    )


def dit_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    return {"class_labels": list(seeds), "guidance_scale": SCALE if guided else 1.0}


FAMILIES = (
    Family("flux2", flux2, flux2_inputs, guided_calls=0),
    Family("chroma", chroma, chroma_inputs, guided_calls=2),
    Family("qwen-image", qwen_image, qwen_image_inputs, guided_calls=2),
    Family("qwen-image-edit", qwen_image_edit, qwen_image_edit_inputs, guided_calls=2),
    Family("hunyuan-image", hunyuan_image, hunyuan_image_inputs, guided_calls=2),
    Family("sd3", sd3, sd3_inputs, guided_calls=1),
    Family("z-image", z_image, z_image_inputs, guided_calls=1),
    Family("lumina2", lumina2, lumina2_inputs, guided_calls=2),
    Family("pixart", pixart, pixart_inputs, guided_calls=1),
    Family("sana", sana, sana_inputs, guided_calls=1),
    Family("dit", dit, dit_inputs, guided_calls=1, output_type="pt"),  # its pipeline always decodes
)
