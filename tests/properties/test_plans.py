"""What holds of every method holds of plans, which are followed by a scheduler and not by the engine.

A plan that computes every step changes no bit, runs know nothing of each other, images of a batch nothing of their
neighbours, and every Flux pipeline runs with one.
"""

import copy
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loops import attentions, before_each_call
from pictures import alone, own_pipeline, picture
from plans import PLAN, plans

import h2cache
from h2cache import Decision, Plan, PlanConfig
from h2cache.baselines import BlockCacheConfig
from h2cache.plans.conditions import Conditions

CONFIG = PlanConfig(PLAN, allow_transfer=True)
# More steps than any run has, or resampling adds skips.
EVERYTHING = PlanConfig(Plan(Conditions(steps=100), tuple(range(100)), {}), allow_transfer=True)
BLOCKS = 5  # of the tiny transformer
IMAGE = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
MASK = (torch.arange(64) < 32).float().expand(1, 1, 64, 64)
PIPELINES: dict[str, tuple[type[DiffusionPipeline], dict[str, Any]]] = {
    "text-to-image": (FluxPipeline, {}),
    "image-to-image": (FluxImg2ImgPipeline, dict(image=IMAGE, strength=0.7)),
    "inpaint": (FluxInpaintPipeline, dict(image=IMAGE, mask_image=MASK, strength=0.7)),
    "kontext": (FluxKontextPipeline, dict(image=IMAGE, _auto_resize=False, max_area=64 * 64)),
    "controlnet": (FluxControlNetPipeline, dict(control_image=IMAGE)),
}
every_pipeline = pytest.mark.parametrize("name", PIPELINES)
with_and_without_guidance = pytest.mark.parametrize(
    "guidance", [{}, dict(negative_prompt="blurry", true_cfg_scale=2.5)], ids=["distilled", "guided"]
)


@pytest.fixture
def pipe(tiny_pipe: FluxPipeline) -> FluxPipeline:
    """With a scheduler of its own, so that whatever a failed test leaves there is gone with it."""
    return own_pipeline(tiny_pipe)


@pytest.fixture
def made(tiny_pipe: FluxPipeline) -> Callable[[str], tuple[DiffusionPipeline, dict[str, Any]]]:
    """A pipeline by its name, and what it is called with beside the prompt."""

    def make(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
        kind, request = PIPELINES[name]
        components = {"controlnet": tiny_controlnet(tiny_pipe)} if name == "controlnet" else {}
        return own_pipeline(tiny_pipe, kind, **components), request

    return make


def tiny_controlnet(pipe: FluxPipeline) -> FluxControlNetModel:
    """Two double blocks like the transformer's, with projections that do not return zero."""
    settings = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    settings = {name: value for name, value in settings.items() if name != "out_channels"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = FluxControlNetModel(**settings | dict(num_layers=2, num_single_layers=0))
        for projection in model.controlnet_blocks:
            torch.nn.init.normal_(projection.weight, std=0.2)
    return model.eval()


@contextmanager
def skipped_by_hand(pipe: DiffusionPipeline, plan: Plan) -> Iterator[None]:
    """The pipeline with its own scheduler and all its steps, whose transformer answers skipped ones with the weighted
    sum of what it returned before, for each branch of guidance by itself."""
    forward, outputs = pipe.transformer.forward, defaultdict(list)

    def answer(**call: Any) -> tuple[torch.Tensor]:
        step = (pipe.scheduler.timesteps / 1000 - call["timestep"][0]).abs().argmin().item()
        known = outputs[id(call["encoder_hidden_states"])]
        if step in plan.computed:
            known.insert(0, forward(**call)[0])
            return (known[0],)
        return (sum(weight * output for weight, output in zip(plan.weights[step], known, strict=False)),)

    pipe.transformer.forward = answer
    try:
        yield
    finally:
        del pipe.transformer.forward


# --- a run ----------------------------------------------------------------------------------------------------------


@with_and_without_guidance
@every_pipeline
def test_computing_every_step_changes_no_bit(name, guidance, made):
    pipe, request = made(name)
    plain = picture(pipe, steps=6, **request, **guidance)
    with h2cache.apply(pipe, EVERYTHING):
        assert torch.equal(picture(pipe, steps=6, **request, **guidance), plain)
    assert torch.equal(picture(pipe, steps=6, **request, **guidance), plain)


@with_and_without_guidance
@pytest.mark.parametrize("name", ["text-to-image", "kontext", "controlnet"])
def test_images_are_those_of_a_transformer_that_answers_skipped_calls_with_the_sums(name, guidance, made):
    """What a ControlNet adds is part of the output; and guidance is linear, so that it may come before the sum."""
    pipe, request = made(name)
    with skipped_by_hand(pipe, PLAN):
        expected = picture(pipe, steps=8, **request, **guidance)
    with h2cache.apply(pipe, CONFIG):
        found = picture(pipe, steps=8, **request, **guidance)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, picture(pipe, steps=8, **request, **guidance), rtol=1e-2, atol=1e-2)


@with_and_without_guidance
@every_pipeline
def test_nothing_runs_but_what_the_trace_says(name, guidance, made):
    pipe, request = made(name)
    branches = 2 if guidance else 1
    with h2cache.apply(pipe, CONFIG) as handle, attentions(pipe.transformer) as calls:
        picture(pipe, steps=8, **request, **guidance)
    computed = [row for row in handle.trace if not row.decision.skips]
    assert calls == [[1] * BLOCKS] * (branches * len(computed))
    assert sum(row.blocks_computed for row in handle.trace) * branches == sum(map(sum, calls))
    assert [row.step for row in computed] == list(PLAN.computed[-len(computed) :])


@pytest.mark.parametrize(("strength", "started"), [(1.0, 0), (0.7, 1), (0.5, 3), (0.25, 6)])
@pytest.mark.parametrize("name", ["image-to-image", "inpaint"])
def test_strength_is_the_share_of_the_computed_steps_that_run(name, strength, started, made):
    pipe, request = made(name)
    with h2cache.apply(pipe, CONFIG) as handle:
        picture(pipe, steps=8, **request | dict(strength=strength))
    rows = list(handle.trace)
    assert [row.step for row in rows] == list(range(started, 8))
    assert rows[0].decision is Decision.WARMUP


@pytest.mark.parametrize("name", ["text-to-image", "kontext", "controlnet"])
def test_each_image_of_a_batch_is_the_image_made_alone(name, made):
    """Image-to-image starts the images of a batch from other noise than one alone, with or without a plan."""
    pipe, request = made(name)
    prompts = ["a red stop sign", "a blue shirt", "a label"]
    with h2cache.apply(pipe, CONFIG) as handle:
        together = picture(pipe, prompts, steps=8, **request)
        assert {row.sample for row in handle.trace} == {0, 1, 2}
        for image, prompt in enumerate(prompts):
            single = picture(pipe, prompt, seed=image, steps=8, **request)
            torch.testing.assert_close(together[image : image + 1], single, rtol=1e-3, atol=1e-3)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), batch=st.integers(1, 3), width=st.sampled_from([32, 64, 96]))
def test_any_plan_is_followed_and_recorded(pipe, plan, batch, width):
    with h2cache.apply(pipe, PlanConfig(plan)) as handle, attentions(pipe.transformer) as calls:
        image = picture(pipe, ["a sign"] * batch, steps=plan.steps, width=width)
    assert image.isfinite().all() and len(calls) == len(plan.computed)
    assert [row.step for row in handle.trace if row.sample == 0] == list(range(plan.steps))
    assert handle.summary()["computed_fraction"] == pytest.approx(len(plan.computed) / plan.steps)
    assert handle.held_bytes() == 0


# --- one run and another --------------------------------------------------------------------------------------------


class Interruption(Exception):
    """What a test interrupts a run with."""


def break_off_between_steps(pipe: DiffusionPipeline, error: type[BaseException]) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise error
        return tensors

    with pytest.raises(error):
        picture(pipe, "a green label", seed=5, steps=8, callback_on_step_end=stop)


def break_off_inside(pipe: DiffusionPipeline, error: type[BaseException]) -> None:
    calls: list[int] = []

    def fail(module: Any, args: Any) -> None:
        if len(calls) == 3:
            raise error

    hook = pipe.transformer.norm_out.register_forward_pre_hook(fail)
    try:
        with before_each_call(pipe.transformer, lambda: calls.append(1)), pytest.raises(error):
            picture(pipe, "a green label", seed=5, steps=8)
    finally:
        hook.remove()


def ask_to_stop(pipe: DiffusionPipeline) -> None:
    """diffusers' own way: the flag that makes a pipeline leave out its remaining steps."""

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return tensors

    picture(pipe, seed=5, steps=8, callback_on_step_end=stop)


def spoil(pipe: DiffusionPipeline) -> None:
    """A run whose latents are no numbers from its second computed step on."""

    def spoilt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * math.nan if step == 1 else tensors["latents"]}

    assert picture(pipe, steps=8, callback_on_step_end=spoilt).isnan().all()


DISTURBANCES: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "same-again": lambda pipe: picture(pipe, steps=8),
    "error-between-steps": lambda pipe: break_off_between_steps(pipe, Interruption),
    "ctrl-c-between-steps": lambda pipe: break_off_between_steps(pipe, KeyboardInterrupt),
    "error-inside-the-model": lambda pipe: break_off_inside(pipe, Interruption),
    "ctrl-c-inside-the-model": lambda pipe: break_off_inside(pipe, KeyboardInterrupt),
    "asked-to-stop": ask_to_stop,
    "no-numbers": spoil,
    "other-seed-and-prompt": lambda pipe: picture(pipe, "a blue shirt", seed=9, steps=8),
    "other-resolution": lambda pipe: picture(pipe, height=32, width=96, steps=8),
    "other-batch": lambda pipe: picture(pipe, ["a red stop sign", "a label"], steps=8),
    "other-steps": lambda pipe: (picture(pipe, steps=1), picture(pipe, steps=11)),
    "other-guidance": lambda pipe: picture(pipe, guidance_scale=7.0, steps=8),
    "true-cfg": lambda pipe: picture(pipe, negative_prompt="blurry", true_cfg_scale=3.0, steps=8),
}


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_the_next_picture_is_as_if_alone(disturb, pipe):
    expected = alone(pipe, CONFIG, steps=8)
    with h2cache.apply(pipe, CONFIG) as handle:
        disturb(pipe)
        handle.trace.clear()
        assert torch.equal(picture(pipe, steps=8), expected)
        assert handle.summary()["computed_fraction"] == 0.5


def test_embeddings_of_the_user_serve_many_runs(pipe):
    embeds, pooled, _ = pipe.encode_prompt("a red stop sign", None, max_sequence_length=24)
    given_ = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    expected = [alone(pipe, CONFIG, seed=seed, steps=8, **given_) for seed in (0, 1)]
    with h2cache.apply(pipe, CONFIG):
        for seed in (0, 1, 0):
            assert torch.equal(picture(pipe, seed=seed, steps=8, **given_), expected[seed])


def test_a_pipeline_inside_a_pipeline_has_its_own_run(tiny_pipe):
    """Both on one transformer, each with a plan of its own; and one that has none."""
    outer, inner, plain = (own_pipeline(tiny_pipe) for _ in range(3))
    uncached = picture(plain, steps=8)
    expected = [alone(outer, CONFIG, steps=10), alone(inner, PlanConfig(PLAN), steps=8), uncached]
    seen: list[torch.Tensor] = []

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            seen.extend([picture(inner, steps=8), picture(plain, steps=8)])
        return tensors

    with h2cache.apply(outer, CONFIG), h2cache.apply(inner, PlanConfig(PLAN)):
        seen.insert(0, picture(outer, steps=10, callback_on_step_end=preview))
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_two_threads_have_each_their_run(tiny_pipe):
    """The second goes on while the first is inside a call of the transformer that both share."""
    pipes, steps = [own_pipeline(tiny_pipe), own_pipeline(tiny_pipe)], [16, 5]
    expected = [alone(pipe, CONFIG, steps=count) for pipe, count in zip(pipes, steps, strict=True)]
    inside, done, drawn = threading.Event(), threading.Event(), [None, None]

    def hold(module: Any, args: Any) -> None:
        if threading.current_thread() is first and not done.is_set():
            inside.set()
            assert done.wait(20)

    def draw_first() -> None:
        drawn[0] = picture(pipes[0], steps=steps[0])

    first = threading.Thread(target=draw_first)
    hook = tiny_pipe.transformer.x_embedder.register_forward_pre_hook(hold)
    try:
        with h2cache.apply(pipes[0], CONFIG), h2cache.apply(pipes[1], CONFIG):
            first.start()
            assert inside.wait(20)
            drawn[1] = picture(pipes[1], steps=steps[1])
            done.set()
            first.join(20)
    finally:
        done.set()
        hook.remove()
    assert all(torch.equal(image, alone) for image, alone in zip(drawn, expected, strict=True))


def test_a_cache_on_the_transformer_works_within_the_computed_steps(pipe):
    """Put on the transformer itself, it knows nothing of the plan: the model is called for fewer steps."""
    with h2cache.apply(pipe, CONFIG) as plan, h2cache.apply(pipe.transformer, BlockCacheConfig(threshold=0.5)) as cache:
        picture(pipe, steps=16)
        assert plan.summary()["steps"] == 16 and not plan.replaced
        assert cache.summary()["steps"] == plan.summary()["stages"]["model"]["compute"] + 1
        assert cache.summary()["runs"] == 1


def test_inference_mode_and_half_precision(tiny_pipe):
    pipe = own_pipeline(tiny_pipe, transformer=copy.deepcopy(tiny_pipe.transformer).to(torch.bfloat16))
    embeds, pooled, _ = pipe.encode_prompt("a red stop sign", None, max_sequence_length=24)
    given_ = dict(prompt_embeds=embeds.bfloat16(), pooled_prompt_embeds=pooled.bfloat16())
    plain = picture(pipe, steps=6, **given_)
    with h2cache.apply(pipe, EVERYTHING):
        assert torch.equal(picture(pipe, steps=6, **given_), plain) and plain.dtype is torch.bfloat16
    expected = alone(pipe, CONFIG, steps=6, **given_)
    with torch.inference_mode(), h2cache.apply(pipe, CONFIG):
        assert torch.equal(picture(pipe, steps=6, **given_), expected)
