"""diffusers' own caches, swept: what `transformer.enable_cache` takes and Flux supports."""

import ast
import contextlib
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import diffusers
import torch
from diffusers import FluxPipeline

from eval.generation.generate import generate

from .contender import Contender, described

LIBRARY = "diffusers"
# What has no row, and why.
LEFT_OUT = {
    "diffusers SeaCache": "it needs the step's index and sigma in `cache_context`, which FluxPipeline does not give",
    "diffusers FasterCache, the skipped unconditional branch": "a guidance-distilled Flux has no such branch, so that "
    "only its attention reuse applies; that is measured",
}
MODULES = [r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"]
FED = [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"]  # feed proj_out, and so need not run where it is forecast
# Its modes, and the steps before which they compute. The last is its default, which still computes every MLP.
TAYLOR: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "TaylorSeer, lite": (dict(use_lite_mode=True), (2, 3, 6)),
    "TaylorSeer, modules": (dict(cache_identifiers=MODULES, skip_predict_identifiers=FED), (3,)),
    "TaylorSeer, attention": ({}, (3,)),
}
INTERVALS = (2, 3, 4, 5, 6, 7, 8)
EVERYWHERE = (-1, 1001)  # timesteps


def contenders(pipe: FluxPipeline, prompts: Sequence[str], call: dict[str, Any]) -> Iterator[Contender]:
    """MagCache's ratios are measured here, on `prompts`."""
    for threshold in (0.03, 0.045, 0.065, 0.09, 0.13, 0.18, 0.25, 0.35):
        yield _row("FirstBlockCache", lambda _, t=threshold: diffusers.FirstBlockCacheConfig(t), threshold=threshold)
    yield from _taylor()
    yield from _magnitudes(pipe, prompts, call)
    for reuse in (2, 3, 5, 8):
        yield _row("PyramidAttentionBroadcast", partial(_pyramid, reuse), skip_range=reuse)
        yield _row("FasterCache", partial(_faster, reuse), skip_range=reuse)


def _taylor() -> Iterator[Contender]:
    for (method, (options, before)), interval, order in product(TAYLOR.items(), INTERVALS, (1, 2)):
        for first in before:
            shown = dict(cache_interval=interval, max_order=order, disable_cache_before_step=first)
            # Factors in float32, which its forecasts are most exact with.
            make = partial(diffusers.TaylorSeerCacheConfig, **shown, **options, taylor_factors_dtype=torch.float32)
            yield _row(method, lambda _, make=make: make(), interval=interval, order=order, before=first)


def _magnitudes(pipe: FluxPipeline, prompts: Sequence[str], call: dict[str, Any]) -> Iterator[Contender]:
    ratios = magnitude_ratios(pipe, prompts, call)
    steps = call["num_inference_steps"]
    for threshold, most, retained in product((0.03, 0.1, 0.3, 1.0), (2, 3, 4, 6, 8), (0.06, 0.2)):
        shown = dict(threshold=threshold, max_skip_steps=most, retention_ratio=retained)
        make = partial(diffusers.MagCacheConfig, **shown, num_inference_steps=steps, mag_ratios=ratios)
        yield _row("MagCache", lambda _, make=make: make(), threshold=threshold, skips=most, retained=retained)


def magnitude_ratios(pipe: FluxPipeline, prompts: Sequence[str], call: dict[str, Any]) -> list[float]:
    """MagCache's ratio for every step, as its own calibration finds them, averaged over prompts."""
    config = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=call["num_inference_steps"])
    found = []
    for seed, prompt in enumerate(prompts):
        printed = io.StringIO()  # the only way it tells
        with _enabled(lambda _: config, pipe), contextlib.redirect_stdout(printed):
            generate(pipe, prompt, seed, **call)
        found.append(next(ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1")))
    return [statistics.mean(ratios) for ratios in zip(*found, strict=True)]


def _pyramid(reuse: int, pipe: FluxPipeline) -> object:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=reuse,
        spatial_attention_timestep_skip_range=EVERYWHERE,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _faster(reuse: int, pipe: FluxPipeline) -> object:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=reuse,
        spatial_attention_timestep_skip_range=(-1, 681),
        current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda module: 1.0 - float(pipe.current_timestep) / 1000,  # rises, as in the paper
        is_guidance_distilled=True,
        tensor_format="BCHW",
    )


def _row(method: str, make: Callable[[FluxPipeline], object], **shown: object) -> Contender:
    return Contender(LIBRARY, method, described(**shown), partial(_enabled, make))


@contextlib.contextmanager
def _enabled(make: Callable[[FluxPipeline], object], pipe: FluxPipeline) -> Iterator[None]:
    pipe.transformer.enable_cache(make(pipe))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()
