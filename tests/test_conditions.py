"""The conditions of a run are those of the pipeline that makes it, as they were when it began, and nobody else's."""

import threading
from contextlib import contextmanager

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from loops import denoise, denoising
from pictures import alone, own_pipeline, picture
from test_plan import PLAN

import h2cache
from h2cache import PlanConfig
from h2cache.conditions import Conditions, calling_pipeline, described, digest

CONFIG = PlanConfig(PLAN, allow_transfer=True)


@contextmanager
def asked():
    """The conditions that plans are asked for while it is open, in order: once for each of them."""
    seen, original = [], PlanConfig.for_run

    def for_run(self, conditions):
        seen.append(conditions)
        return original(self, conditions)

    PlanConfig.for_run = for_run
    try:
        yield seen
    finally:
        PlanConfig.for_run = original


def test_they_are_the_calling_pipeline_s(tiny_pipe):
    with h2cache.apply(tiny_pipe, CONFIG), asked() as seen:
        picture(tiny_pipe, steps=5, guidance_scale=2.5, negative_prompt="grey", true_cfg_scale=2.0)
    model, scheduler = digest(tiny_pipe.transformer), described(tiny_pipe.scheduler)
    assert seen == [Conditions(model, scheduler, steps=5, guidance=2.5, image_tokens=16)]


def test_they_are_known_whatever_apply_was_given(tiny_pipe):
    """The transformer, or another pipeline around it. Image-to-image makes part of the steps asked for."""
    img2img = own_pipeline(tiny_pipe, FluxImg2ImgPipeline)
    for target in (tiny_pipe, tiny_pipe.transformer):
        with h2cache.apply(target, CONFIG), asked() as seen:
            picture(img2img, steps=10, strength=0.6, image=torch.zeros(1, 3, 64, 64))
        assert [conditions.steps for conditions in seen] == [6]
    with h2cache.apply(tiny_pipe, PlanConfig(PLAN)), pytest.raises(ValueError, match="steps 8 and is run with 6"):
        picture(img2img, steps=10, strength=0.6, image=torch.zeros(1, 3, 64, 64))


def test_a_loop_of_ones_own_shows_model_and_tokens(tiny_pipe):
    """Also while a pipeline is in the middle of a run that it broke off."""
    transformer = tiny_pipe.transformer

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture(tiny_pipe, steps=5, callback_on_step_end=stop)
    assert tiny_pipe.current_timestep is not None, "it looks as if it ran"
    with h2cache.apply(tiny_pipe, CONFIG), asked() as seen:
        denoise(transformer, steps=8)
    assert seen == [Conditions(digest(transformer), image_tokens=16)]


def test_they_are_settled_at_the_first_call(tiny_pipe):
    """What becomes of the pipeline during the run is not the run's business."""
    expected = alone(tiny_pipe, CONFIG, steps=10)

    def meddle(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale, pipe._num_timesteps = 9.0, 4
        return tensors

    with h2cache.apply(tiny_pipe, CONFIG) as handle, asked() as seen:
        assert torch.equal(picture(tiny_pipe, steps=10, callback_on_step_end=meddle), expected)
    assert [conditions.steps for conditions in seen] == [10]
    assert handle.summary()["runs"] == 1


def test_a_pipeline_inside_a_pipeline_has_its_own(tiny_pipe):
    inner, drawn = own_pipeline(tiny_pipe), []
    expected = [alone(tiny_pipe, CONFIG, steps=steps) for steps in (10, 5)]

    def preview(pipe, step, timestep, tensors):
        if step == 4:
            drawn.append(picture(inner, steps=5))
        return tensors

    with h2cache.apply(tiny_pipe, CONFIG):
        drawn.insert(0, picture(tiny_pipe, steps=10, callback_on_step_end=preview))
    assert all(torch.equal(image, alone) for image, alone in zip(drawn, expected, strict=True))


def test_two_threads_on_one_transformer_have_each_their_own(tiny_pipe):
    """The second begins, and goes on, while the first is inside a call; only the first's pipeline was given."""
    pipes, steps = [tiny_pipe, own_pipeline(tiny_pipe)], [16, 5]
    expected = [alone(pipe, CONFIG, steps=count) for pipe, count in zip(pipes, steps, strict=True)]
    inside, done, drawn = threading.Event(), threading.Event(), [None, None]

    def hold(module, args):
        if threading.current_thread() is first and not done.is_set():
            inside.set()
            assert done.wait(20)

    def draw_first():
        drawn[0] = picture(pipes[0], steps=steps[0])

    first = threading.Thread(target=draw_first)
    hook = tiny_pipe.transformer.x_embedder.register_forward_pre_hook(hold)
    try:
        with h2cache.apply(tiny_pipe, CONFIG):
            first.start()
            assert inside.wait(20)
            drawn[1] = picture(pipes[1], steps=steps[1])
            done.set()
            first.join(20)
    finally:
        done.set()
        hook.remove()
    assert all(torch.equal(image, alone) for image, alone in zip(drawn, expected, strict=True))


def test_a_loop_beside_a_pipeline_in_another_thread_is_a_loop(tiny_pipe):
    loop, seen = denoising(tiny_pipe.transformer, steps=8), []

    def look(pipe, step, timestep, tensors):
        thread = threading.Thread(target=lambda: (next(loop), seen.append(calling_pipeline())))
        thread.start()
        thread.join(20)
        return tensors

    with h2cache.apply(tiny_pipe, PlanConfig(PLAN)) as handle, asked() as conditions:
        picture(tiny_pipe, steps=8, callback_on_step_end=look)
    assert seen == [None] * 8
    assert [found.steps for found in conditions] == [8, None]
    assert handle.summary()["runs"] == 2
