"""Rule 3: under true classifier-free guidance the conditional and the unconditional branch have each their own memory.

The reference caches two copies of the transformer, one for each branch, which nothing could mix up.
"""

import copy
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxKontextPipeline, FluxPipeline
from methods_under_test import every_method, every_method_once, measures, some_kinds
from pictures import alone, is_mixed, own_pipeline, partial_steps, picture
from torch import nn

import h2cache

IMAGE = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
MASK = (torch.arange(64) < 32).float().expand(1, 1, 64, 64)

# FluxPipeline names its branches by diffusers' cache_context; the others do not.
PIPELINES = {
    "text-to-image": (FluxPipeline, {}),
    "image-to-image": (FluxImg2ImgPipeline, dict(image=IMAGE, strength=0.7, steps=11)),
    "inpaint": (FluxInpaintPipeline, dict(image=IMAGE, mask_image=MASK, strength=0.7, steps=11)),
    "kontext": (FluxKontextPipeline, dict(image=IMAGE, _auto_resize=False, max_area=64 * 64, steps=12)),
}
every_method_and_pipeline = every_method_once("pipeline", PIPELINES, most="image-to-image")

GUIDED = dict(negative_prompt="blurry, out of focus, a blue label", true_cfg_scale=2.5)


class Taking(nn.Module):
    """Stands in for a transformer and lets its two copies take turns: every pipeline calls cond first, then uncond."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.turns = nn.ModuleList([first, second])
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.turns[(self.calls + 1) % 2](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.turns[0], name)


@contextmanager
def one_transformer_a_branch(pipe: FluxPipeline, kind: type, config: h2cache.CacheConfig):
    """A pipeline with a cached transformer for each branch, and their handles: cond, uncond."""
    cond, uncond = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.transformer)
    with h2cache.apply(cond, config) as first, h2cache.apply(uncond, config) as second:
        yield own_pipeline(pipe, kind, transformer=Taking(cond, uncond)), (first, second)


def decisions(handle: h2cache.Handle, context: str) -> list[tuple]:
    return [(row.step, row.sample, row.stage, row.diff, row.decision) for row in handle.trace if row.context == context]


@every_method_and_pipeline
def test_branches_remember_apart(config, pipeline, tiny_pipe):
    kind, options = pipeline
    with one_transformer_a_branch(tiny_pipe, kind, config) as (pipe, references):
        expected = picture(pipe, **options, **GUIDED)
    pipe = own_pipeline(tiny_pipe, kind)
    with h2cache.apply(pipe, config) as handle:
        assert torch.equal(picture(pipe, **options, **GUIDED), expected)
    assert handle.summary()["runs"] == 1
    assert decisions(handle, "cond") == decisions(references[0], "cond")
    assert decisions(handle, "uncond") == decisions(references[1], "cond")  # alone, it is the first context of its run
    assert is_mixed(handle)
    alike = decisions(handle, "cond") == decisions(handle, "uncond")
    assert alike != measures(config), "a schedule decides alike; else the test would not see branches mixed up"


@every_method_and_pipeline
def test_branches_remember_apart_in_a_batch(config, pipeline, tiny_pipe):
    kind, options = pipeline
    prompts = ["a red stop sign", "a blue shirt"]
    guided = GUIDED | {"negative_prompt": ["blurry", "an orange label"]}
    options = {
        name: value.expand(2, -1, -1, -1) if torch.is_tensor(value) else value for name, value in options.items()
    }
    with one_transformer_a_branch(tiny_pipe, kind, config) as (pipe, references):
        expected = picture(pipe, prompts, **options, **guided)
    pipe = own_pipeline(tiny_pipe, kind)
    with h2cache.apply(pipe, config) as handle:
        assert torch.equal(picture(pipe, prompts, **options, **guided), expected)
    assert decisions(handle, "uncond") == decisions(references[1], "cond")


@every_method_once("pipeline", {name: PIPELINES[name] for name in ("text-to-image", "kontext")}, most="text-to-image")
def test_guided_pictures_are_as_if_alone(config, pipeline, tiny_pipe):
    """With guidance, without it, with other negatives, one after another."""
    kind, options = pipeline
    pipe = own_pipeline(tiny_pipe, kind)
    requests = [GUIDED, {}, GUIDED | {"negative_prompt": "a shirt", "seed": 3}]
    expected = [alone(pipe, config, **options, **request) for request in requests]
    with h2cache.apply(pipe, config):
        for number in (0, 1, 2, 1, 0):
            assert torch.equal(picture(pipe, **options, **requests[number]), expected[number])


@every_method
def test_one_negative_prompt_for_a_batch(config, tiny_pipe):
    """Pipelines then call the transformer with many images and one text, which the first block makes as many of."""
    prompts = ["a red stop sign", "a blue shirt", "a label"]
    options = dict(steps=16, true_cfg_scale=2.5)
    with h2cache.apply(tiny_pipe, config) as handle:
        each = picture(tiny_pipe, prompts, negative_prompt=["blurry"] * 3, **options)
        one = picture(tiny_pipe, prompts, negative_prompt="blurry", **options)
    torch.testing.assert_close(one, each, rtol=1e-5, atol=1e-5)
    first, second = ([row[3:6] + row[8:] for row in handle.trace if row.run == run] for run in (0, 1))
    assert first == second and is_mixed(handle)
    unconditional = [row for row in handle.trace if row.context == "uncond"]
    assert (partial_steps(unconditional) > 0) == measures(config), "or no image of a batch would be computed alone"


@every_method
def test_a_negative_prompt_of_the_same_words(config, tiny_pipe):
    """Then both branches are the same: guidance adds nothing, and each branch caches as the image without guidance."""
    with h2cache.apply(tiny_pipe, config) as handle:
        unguided = picture(tiny_pipe)
        single = decisions(handle, "cond")
        handle.trace.clear()
        guided = picture(tiny_pipe, negative_prompt="a red stop sign", true_cfg_scale=3.0)
    torch.testing.assert_close(guided, unguided, rtol=1e-5, atol=1e-5)
    assert decisions(handle, "cond") == decisions(handle, "uncond") == single


@every_method_and_pipeline
def test_branches_with_the_very_same_embeddings(config, pipeline, tiny_pipe):
    """As when only the image prompts of an IP-Adapter differ: the prompt does not tell the branches, the step does."""
    kind, options = pipeline
    pipe = own_pipeline(tiny_pipe, kind)
    embeds, pooled, _ = pipe.encode_prompt("a red stop sign", None, max_sequence_length=24)
    given = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    negative = dict(negative_prompt_embeds=embeds, negative_pooled_prompt_embeds=pooled, true_cfg_scale=3.0)
    with h2cache.apply(pipe, config) as handle:
        picture(pipe, **options, **given)
        single = decisions(handle, "cond")
        handle.trace.clear()
        picture(pipe, **options, **given, **negative)
    assert handle.summary()["runs"] == 1
    for context in ("cond", "uncond"):  # nothing but the rounding of the guidance differs from the image without it
        assert [row[:3] + row[4:] for row in decisions(handle, context)] == [row[:3] + row[4:] for row in single]


@some_kinds
def test_guidance_on_flux_mini(config, flux_mini):
    options = dict(steps=5, height=128, width=128, max_sequence_length=64)
    with one_transformer_a_branch(flux_mini, FluxPipeline, config) as (pipe, _):
        expected = picture(pipe, **options, **GUIDED)
    assert torch.equal(alone(flux_mini, config, **options, **GUIDED), expected)
