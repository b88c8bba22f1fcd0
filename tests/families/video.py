"""Tiny random pipelines of the video families. A video has two latent frames of 4 x 3 tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from .base import Family, lively, random_embeddings

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM
CHANNELS = 4
TEXT_WIDTH, POOLED_WIDTH = 24, 16
TEXT_TOKENS = 7
SIZE = {"height": 64, "width": 48, "num_frames": 5}
ROPE_AXES = (4, 6, 6)


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int, make: type[torch.nn.Module], **config: Any) -> torch.nn.Module:
    """A module in eval mode with the initial weights of its own library; the same seed gives the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(**config).eval()


def valid_tokens(seeds: Sequence[int], tokens: int) -> Tensor:
    """(B, tokens) float: a mask of a prompt's tokens, of another length for each of three seeds in a row."""
    lengths = torch.tensor([tokens - seed % 3 for seed in seeds])
    return (torch.arange(tokens) < lengths[:, None]).float()


def pictures(seeds: Sequence[int]) -> Tensor:
    """(B, 3, height, width) between 0 and 1: the first frame of each sample."""
    return random_embeddings(seeds, 3, SIZE["height"], SIZE["width"], salt=9).sigmoid()


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


# HunyuanVideo


def hunyuan_video_transformer(**config: Any) -> HunyuanVideoTransformer3DModel:
    return lively(
        HunyuanVideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=2,
            num_single_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            rope_axes_dim=ROPE_AXES,
            **config,
        )
    )


def hunyuan_video() -> HunyuanVideoPipeline:
    return quiet(
        HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=hunyuan_video_transformer(),
            vae=None,
            scheduler=flow_scheduler(),
            text_encoder_2=None,
            tokenizer_2=None,
        )
    )


def hunyuan_video_image() -> HunyuanVideoImageToVideoPipeline:
    vae = seeded(
        1,
        AutoencoderKLHunyuanVideo,
        latent_channels=CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    return quiet(
        HunyuanVideoImageToVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=hunyuan_video_transformer(image_condition_type="token_replace", guidance_embeds=False),
            vae=vae,
            scheduler=flow_scheduler(),
            text_encoder_2=None,
            tokenizer_2=None,
            image_processor=None,
        )
    )


def hunyuan_video_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {
        "prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH),
        "pooled_prompt_embeds": random_embeddings(seeds, POOLED_WIDTH, salt=1),
        "prompt_attention_mask": valid_tokens(seeds, TEXT_TOKENS),
        **SIZE,
    }
    if guided:
        given |= {
            "negative_prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH, salt=2),
            "negative_pooled_prompt_embeds": random_embeddings(seeds, POOLED_WIDTH, salt=3),
            "negative_prompt_attention_mask": valid_tokens(seeds, TEXT_TOKENS),
            "true_cfg_scale": 3.0,
        }
    return given


def hunyuan_video_image_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    return {"image": pictures(seeds), **hunyuan_video_inputs(seeds, guided)}


# HunyuanVideo-1.5


class HunyuanVideo15WithScale(HunyuanVideo15Pipeline):
    """The pipeline with the scale of its guider as an argument of the call: 1 is no guidance."""

    def __call__(self, *args: Any, guidance_scale: float = 1.0, **kwargs: Any) -> Any:
        self.guider.guidance_scale = guidance_scale
        return super().__call__(*args, **kwargs)


def hunyuan_video_15() -> HunyuanVideo15Pipeline:
    vae = seeded(
        1,
        AutoencoderKLHunyuanVideo15,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
    )
    transformer = lively(
        HunyuanVideo15Transformer3DModel(
            in_channels=2 * CHANNELS + 1,
            out_channels=CHANNELS,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=4,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_WIDTH,
            text_embed_2_dim=POOLED_WIDTH,
            image_embed_dim=8,
            rope_axes_dim=ROPE_AXES,
        )
    )
    pipe = HunyuanVideo15WithScale(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=flow_scheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
    )
    pipe.vision_num_semantic_tokens = 3  # instead of 729 tokens of an image that is not there
    return quiet(pipe)


def hunyuan_video_15_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {
        "prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH),
        "prompt_embeds_mask": valid_tokens(seeds, TEXT_TOKENS),
        "prompt_embeds_2": random_embeddings(seeds, 4, POOLED_WIDTH, salt=1),
        "prompt_embeds_mask_2": valid_tokens(seeds, 4),
        "height": 64,
        "width": 48,
        "num_frames": 5,
    }
    if guided:
        given |= {
            "negative_prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH, salt=2),
            "negative_prompt_embeds_mask": valid_tokens(seeds, TEXT_TOKENS),
            "negative_prompt_embeds_2": random_embeddings(seeds, 4, POOLED_WIDTH, salt=3),
            "negative_prompt_embeds_mask_2": valid_tokens(seeds, 4),
            "guidance_scale": 3.0,
        }
    return given


# CogVideoX


def cogvideox_pipeline(scheduler: Any, rotary: bool) -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=WIDTH,
        text_embed_dim=TEXT_WIDTH,
        num_layers=4,
        sample_width=6,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=rotary,
    )
    return quiet(
        CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=lively(transformer), scheduler=scheduler
        )
    )


COGVIDEOX_SCHEDULE = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}


def cogvideox() -> CogVideoXPipeline:
    """As the 5B model: rotary positions, and the stochastic DPM solver."""
    return cogvideox_pipeline(CogVideoXDPMScheduler(**COGVIDEOX_SCHEDULE), rotary=True)


def cogvideox_2b() -> CogVideoXPipeline:
    """As the 2B model: sinusoidal positions, and DDIM."""
    return cogvideox_pipeline(CogVideoXDDIMScheduler(**COGVIDEOX_SCHEDULE | {"snr_shift_scale": 3.0}), rotary=False)


def cogvideox_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {
        "prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH),
        "guidance_scale": 3.0 if guided else 1.0,
        **SIZE,
    }
    if guided:
        given["negative_prompt_embeds"] = random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH, salt=2)
    return given


# Wan


def wan_transformer(seed: int = 0, **config: Any) -> WanTransformer3DModel:
    config = {"in_channels": CHANNELS} | config
    return lively(
        WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            out_channels=CHANNELS,
            text_dim=TEXT_WIDTH,
            ffn_dim=2 * WIDTH,
            num_layers=4,
            rope_max_seq_len=32,
            **config,
        ),
        seed,
    )


def wan_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_vae() -> AutoencoderKLWan:
    return seeded(
        1,
        AutoencoderKLWan,
        base_dim=4,
        z_dim=CHANNELS,
        num_res_blocks=1,
        dim_mult=[1, 1, 1, 1],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def wan_pipeline(**parts: Any) -> WanPipeline:
    return quiet(WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=wan_scheduler(), **parts))


def wan() -> WanPipeline:
    """As Wan 2.1 T2V."""
    return wan_pipeline(transformer=wan_transformer())


def wan_a14b() -> WanPipeline:
    """As Wan 2.2 T2V A14B: one transformer for the first half of the steps, another for the rest."""
    return wan_pipeline(transformer=wan_transformer(), transformer_2=wan_transformer(seed=1), boundary_ratio=0.8)


def wan_ti2v() -> WanPipeline:
    """As Wan 2.2 TI2V 5B, without an image: a timestep for each token, all the same."""
    return wan_pipeline(transformer=wan_transformer(), expand_timesteps=True)


def wan_ti2v_image() -> WanImageToVideoPipeline:
    """As Wan 2.2 TI2V 5B with an image: the tokens of the first frame have timestep 0."""
    return quiet(
        WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=wan_scheduler(),
            transformer=wan_transformer(),
            expand_timesteps=True,
        )
    )


def wan_image() -> WanImageToVideoPipeline:
    """As Wan 2.1 I2V: the image in the latents' further channels, and its CLIP embeddings before the text."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return quiet(
        WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=wan_scheduler(),
            image_processor=CLIPImageProcessor(
                size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_rescale=False
            ),
            image_encoder=seeded(2, CLIPVisionModel, config=vision),
            transformer=wan_transformer(in_channels=2 * CHANNELS + 4, image_dim=8, added_kv_proj_dim=WIDTH),
        )
    )


def wan_inputs(seeds: list[int], guided: bool, text_tokens: int = TEXT_TOKENS) -> dict[str, Any]:
    given = {
        "prompt_embeds": random_embeddings(seeds, text_tokens, TEXT_WIDTH),
        "guidance_scale": 3.0 if guided else 1.0,
        **SIZE,
    }
    if guided:
        given["negative_prompt_embeds"] = random_embeddings(seeds, text_tokens, TEXT_WIDTH, salt=2)
    return given


def wan_ti2v_image_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    return {"image": pictures([0]), **wan_inputs(seeds, guided)}  # one image for the whole batch


def wan_image_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    # The model takes all but the last 512 tokens for the image's.
    return {"image": pictures([0]), **wan_inputs(seeds, guided, text_tokens=512)}


# LTX-Video


def ltx() -> LTXPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        num_layers=4,
        caption_channels=TEXT_WIDTH,
    )
    return quiet(
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=lively(transformer),
        )
    )


def ltx_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {
        "prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH),
        "prompt_attention_mask": valid_tokens(seeds, TEXT_TOKENS),
        "guidance_scale": 3.0 if guided else 1.0,
        "height": 128,
        "width": 96,
        "num_frames": 9,
    }
    if guided:
        given |= {
            "negative_prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, TEXT_WIDTH, salt=2),
            "negative_prompt_attention_mask": valid_tokens(seeds, TEXT_TOKENS),
        }
    return given


FAMILIES = (
    Family("hunyuan-video", hunyuan_video, hunyuan_video_inputs, guided_calls=2, output="frames"),
    Family("hunyuan-video-i2v", hunyuan_video_image, hunyuan_video_image_inputs, guided_calls=2, output="frames"),
    Family("hunyuan-video-1.5", hunyuan_video_15, hunyuan_video_15_inputs, guided_calls=2, output="frames"),
    # Its solver adds noise at each step: with fewer steps no two are alike.
    Family("cogvideox", cogvideox, cogvideox_inputs, guided_calls=1, steps=12, output="frames"),
    Family("cogvideox-2b", cogvideox_2b, cogvideox_inputs, guided_calls=1, output="frames"),
    Family("wan", wan, wan_inputs, guided_calls=2, output="frames"),
    Family("wan-i2v", wan_image, wan_image_inputs, guided_calls=2, output="frames"),
    # Five steps for each of the two transformers: enough for a forecast.
    Family("wan-a14b", wan_a14b, wan_inputs, guided_calls=2, steps=10, output="frames"),
    Family("wan-ti2v", wan_ti2v, wan_inputs, guided_calls=2, output="frames"),
    Family("wan-ti2v-i2v", wan_ti2v_image, wan_ti2v_image_inputs, guided_calls=2, output="frames"),
    Family("ltx", ltx, ltx_inputs, guided_calls=1, output="frames"),
)
