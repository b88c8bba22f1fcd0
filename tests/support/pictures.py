"""Pictures as the integration tests take them: latents out of a pipeline, seeded, in a few steps."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from loops import denoise
from tiny import TEXT_TOKENS
from torch import Tensor

import h2cache
from h2cache import CacheConfig, Handle
from h2cache.trace import Row, RunRecord

PROMPT = "a red stop sign"


def picture(pipe: DiffusionPipeline, prompt: Any = PROMPT, *, seed: int = 0, steps: int = 8, **options: Any) -> Tensor:
    """Final latents of 64 x 64 px images, unless `options` of the pipeline say otherwise; seeds are `seed + k`."""
    images = (len(prompt) if isinstance(prompt, list) else 1) * options.get("num_images_per_prompt", 1)
    request = dict(
        height=64,
        width=64,
        num_inference_steps=steps,
        max_sequence_length=TEXT_TOKENS,
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed + image) for image in range(images)],
    )
    return pipe(prompt=None if "prompt_embeds" in options else prompt, **request | options).images


def alone(pipe: DiffusionPipeline, config: CacheConfig, *args: Any, **options: Any) -> Tensor:
    """The picture made with a cache that has never seen another."""
    with h2cache.apply(pipe, config):
        return picture(pipe, *args, **options)


def is_mixed(handle: Handle) -> bool:
    """Whether something was skipped and something computed after warm-up: else a test of caching shows nothing."""
    decisions = {row.decision for row in handle.trace}
    return h2cache.Decision.COMPUTE in decisions and any(decision.skips for decision in decisions)


def run_record(handle: Handle) -> RunRecord:
    """What the trace holds of the only run: the numbers of blocks, and the rows."""
    (record,) = handle.trace._runs.values()
    return record


def partial_steps(rows: Iterable[Row]) -> int:
    """Stage visits in which some samples of a batch were skipped and some computed."""
    visits: dict[tuple, set[bool]] = {}
    for row in rows:
        visits.setdefault((row.run, row.context, row.step, row.stage), set()).add(row.decision.skips)
    return sum(len(kinds) == 2 for kinds in visits.values())


def own_pipeline(
    pipe: FluxPipeline, kind: type[DiffusionPipeline] = FluxPipeline, **components: Any
) -> DiffusionPipeline:
    """A pipeline of class `kind` on the components of `pipe`, with a scheduler and tokenizers of its own.

    Tokenizers keep the padding of their last call, so that two threads which share one get each other's.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    tokenizers = {name: copy.deepcopy(getattr(pipe, name)) for name in ("tokenizer", "tokenizer_2")}
    shared = {
        name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    made = kind(**shared | tokenizers | {"scheduler": scheduler} | components)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def cached(model: Any, config: CacheConfig, when: str, change: Callable[[], Any]) -> Iterator[Handle]:
    """The model with a cache and with a change, made before the cache is applied or (after a first run) afterwards."""
    if when == "before":
        change()
        with h2cache.apply(model, config) as handle:
            yield handle
    else:
        with h2cache.apply(model, config) as handle:
            picture(model, steps=3) if isinstance(model, FluxPipeline) else denoise(model, steps=3)
            handle.trace.clear()
            change()
            yield handle
