"""A tiny random pipeline of FLUX.1, with 2 double and 3 single blocks."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny import CLIP_WIDTH, T5_WIDTH, tiny_transformer

from .base import Family, quiet, random_embeddings

TEXT_TOKENS = 7


def flux() -> FluxPipeline:
    return quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=tiny_transformer(double=2, single=3),
        )
    )


def flux_inputs(seeds: list[int], guided: bool) -> dict[str, Any]:
    given = {
        "prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, T5_WIDTH),
        "pooled_prompt_embeds": random_embeddings(seeds, CLIP_WIDTH, salt=1),
        "height": 64,
        "width": 64,
    }
    if guided:
        given |= {
            "negative_prompt_embeds": random_embeddings(seeds, TEXT_TOKENS, T5_WIDTH, salt=2),
            "negative_pooled_prompt_embeds": random_embeddings(seeds, CLIP_WIDTH, salt=3),
            "true_cfg_scale": 3.0,
        }
    return given


FAMILIES = [Family("flux", flux, flux_inputs, guided_calls=2)]
