"""Rule 2: the n-th image of a session equals that image made alone, whatever came before it or runs beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from interruptions import Interruption, break_off_between_steps, called_at_every_step
from loops import before_each_call, denoise, denoising, position_ids
from methods_under_test import EARLY, METHODS, MODULES, SOME_KINDS, every_method, measures, some_kinds, warmup_steps
from pictures import alone, is_mixed, own_pipeline, picture
from thorough import named, product
from waits import hide_timesteps

import h2cache
from h2cache import Decision, H2CacheConfig


@pytest.fixture(params=["cpu-timestep", "device-timestep"])
def where_timesteps_live(request, monkeypatch):
    if request.param == "device-timestep":
        hide_timesteps(monkeypatch)
    return request.param


# --- one pipeline, one picture after another ------------------------------------------------------------------------


def break_off_inside(pipe: Any, error: type[BaseException], part: str, call: int) -> BaseException:
    """Part of the model fails the first time that it runs in the `call`-th call or later, as it may be skipped."""
    transformer, calls = pipe.transformer, []

    def fail(module: Any, args: Any) -> None:
        if len(calls) >= call:
            raise error("broken")

    hook = transformer.get_submodule(part).register_forward_pre_hook(fail)
    try:
        with before_each_call(transformer, lambda: calls.append(1)), pytest.raises(error) as caught:
            picture(pipe, "a green label", seed=5, steps=12)
    finally:
        hook.remove()
    return caught.value


def ask_pipeline_to_stop(pipe: Any, **options: Any) -> None:
    """diffusers' own way: the flag that makes a pipeline leave out its remaining steps."""

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 4
        return tensors

    picture(pipe, seed=5, callback_on_step_end=stop, **options)


def break_off_and_make_image_to_image(pipe: Any) -> None:
    break_off_between_steps(pipe, Interruption)
    picture(own_pipeline(pipe, FluxImg2ImgPipeline), image=torch.full((1, 3, 64, 64), 0.5), strength=0.5, seed=5)


LAST = "single_transformer_blocks.2"
DISTURBANCES: dict[str, Callable[[Any], Any]] = {
    "same-again": picture,
    "error-between-steps": lambda pipe: break_off_between_steps(pipe, Interruption),
    "ctrl-c-between-steps": lambda pipe: break_off_between_steps(pipe, KeyboardInterrupt),
    "error-in-first-block": lambda pipe: break_off_inside(pipe, Interruption, "transformer_blocks.0", call=6),
    "error-in-middle-block": lambda pipe: break_off_inside(pipe, Interruption, "transformer_blocks.1", call=2),
    "error-in-last-block": lambda pipe: break_off_inside(pipe, Interruption, LAST, call=2),
    "ctrl-c-in-last-block": lambda pipe: break_off_inside(pipe, KeyboardInterrupt, LAST, call=2),
    "error-in-attention": lambda pipe: break_off_inside(pipe, Interruption, LAST + ".attn.to_q", call=5),
    "error-behind-the-blocks": lambda pipe: break_off_inside(pipe, Interruption, "norm_out", call=5),
    "asked-to-stop": ask_pipeline_to_stop,
    "other-seed": lambda pipe: picture(pipe, seed=9),
    "other-prompt": lambda pipe: picture(pipe, "a blue shirt"),
    "other-resolution": lambda pipe: picture(pipe, height=32, width=96),
    "transposed-resolution": lambda pipe: (picture(pipe, height=32, width=128), picture(pipe, height=128, width=32)),
    "other-batch": lambda pipe: picture(pipe, ["a red stop sign", "a blue shirt", "a label"]),
    "other-number-of-images": lambda pipe: picture(pipe, num_images_per_prompt=2),
    "fewer-steps": lambda pipe: picture(pipe, steps=3),
    "more-steps": lambda pipe: picture(pipe, steps=14),
    "other-guidance": lambda pipe: picture(pipe, guidance_scale=7.0),
    "true-cfg": lambda pipe: picture(pipe, negative_prompt="blurry", true_cfg_scale=3.0),
    "image-to-image": break_off_and_make_image_to_image,
}


@pytest.mark.thorough
@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
@pytest.mark.parametrize("config", METHODS[:1] + EARLY + MODULES[-1:])
def test_next_picture_is_as_if_alone(config, disturb, tiny_pipe):
    """Each disturbance by itself; every method meets one of each sort below, in one session."""
    expected = alone(tiny_pipe, config)
    with h2cache.apply(tiny_pipe, config) as handle:
        kept = disturb(tiny_pipe)  # an exception that is kept keeps the frames of its run, and all that was theirs
        handle.trace.clear()
        assert torch.equal(picture(tiny_pipe), expected)
        assert is_mixed(handle)
        del kept
        assert torch.equal(picture(tiny_pipe), expected)


# One of each sort; the others go another way through the engine for few methods.
OF_EACH_SORT = [
    *("error-between-steps", "ctrl-c-in-last-block", "error-in-attention", "asked-to-stop", "other-prompt"),
    *("transposed-resolution", "other-batch", "fewer-steps", "other-guidance", "true-cfg", "image-to-image"),
]
SESSIONS = {"of-each-sort": OF_EACH_SORT, "of-all": list(DISTURBANCES)}


@product(
    "config, names",
    METHODS,
    named(SESSIONS),
    kept=lambda method, session: (session == "of-all") == (method in SOME_KINDS),
)
def test_a_whole_session(config, names, tiny_pipe):
    """Disturbances of every kind, one after another in one session, and the same picture in between."""
    expected = alone(tiny_pipe, config)
    kept = []
    with h2cache.apply(tiny_pipe, config) as handle:
        for name, disturb in ((name, DISTURBANCES[name]) for name in names):
            kept.append(disturb(tiny_pipe))
            handle.trace.clear()
            assert torch.equal(picture(tiny_pipe), expected), name
            assert is_mixed(handle)
        kept.clear()
        assert torch.equal(picture(tiny_pipe), expected)


@some_kinds
def test_a_session_on_flux_mini(config, flux_mini):
    options = dict(steps=6, height=128, width=128, max_sequence_length=64)
    requests = [dict(seed=1), dict(prompt=["a label", "a sign"], steps=5), dict(prompt="a blue shirt", seed=2)]
    expected = [alone(flux_mini, config, **options | request) for request in requests]
    with h2cache.apply(flux_mini, config):
        for number in (0, 1, 2, 0):
            assert torch.equal(picture(flux_mini, **options | requests[number]), expected[number])


@every_method
def test_image_to_image_after_a_run_that_broke_off(config, tiny_pipe):
    """Its first timestep is lower than the last one of the aborted run, so time alone does not tell them apart."""
    img2img = own_pipeline(tiny_pipe, FluxImg2ImgPipeline)
    request = dict(image=torch.linspace(0, 1, 64).expand(1, 3, 64, 64), strength=0.6, steps=12)
    expected = alone(img2img, config, **request)
    with h2cache.apply(tiny_pipe, config) as handle:
        kept = break_off_between_steps(tiny_pipe, Interruption)
        handle.trace.clear()
        assert torch.equal(picture(img2img, **request), expected)
        assert next(iter(handle.trace)).decision is Decision.WARMUP
        del kept


@every_method
def test_embeddings_of_the_user_serve_many_runs(config, tiny_pipe):
    """The same tensors are handed to every run, so it is not the prompt that tells runs apart."""
    tokens = dict(max_sequence_length=24)
    embeds, pooled, _ = tiny_pipe.encode_prompt("a red stop sign", None, **tokens)
    negative, negative_pooled, _ = tiny_pipe.encode_prompt("blurry", None, **tokens)
    given = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    guided = given | dict(
        negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled, true_cfg_scale=2.0
    )
    requests = [given | {"seed": 0}, given | {"seed": 1}, guided, given | {"steps": 5}, given | {"seed": 0}]

    def draw(request: dict[str, Any]) -> torch.Tensor:
        options = {name: value for name, value in request.items() if name != "seed"}
        return picture(tiny_pipe, generator=torch.Generator().manual_seed(request.get("seed", 0)), **options)

    expected = []
    for request in requests:
        with h2cache.apply(tiny_pipe, config):
            expected.append(draw(request))
    with h2cache.apply(tiny_pipe, config):
        for request, image in zip(requests, expected, strict=True):
            assert torch.equal(draw(request), image)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@every_method
def test_runs_of_few_steps(config, steps, tiny_pipe):
    plain, expected = picture(tiny_pipe, steps=steps), alone(tiny_pipe, config, steps=steps)
    if steps == 1:
        assert torch.equal(expected, plain), "the first step always computes"
    with h2cache.apply(tiny_pipe, config) as handle:
        for _ in range(3):
            assert torch.equal(picture(tiny_pipe, steps=steps), expected)
        assert handle.summary()["runs"] == 3
        assert handle.summary()["steps"] == 3 * steps


# --- loops of one's own ---------------------------------------------------------------------------------------------


@every_method
def test_loop_that_keeps_its_position_ids(config, transformer, where_timesteps_live):
    """The object that names a run is here the same for all of them; that time starts over shows where one begins."""
    requests = [dict(seed=0), dict(seed=1), dict(seed=0, steps=5), dict(seed=2, steps=11)]
    expected = []
    for request in requests:
        with h2cache.apply(transformer, config):
            expected.append(denoise(transformer, **request))
    ids = position_ids(4, 4)
    with h2cache.apply(transformer, config) as handle:
        for number in (0, 1, 0, 2, 3, 0):
            assert torch.equal(denoise(transformer, img_ids=ids, **requests[number]), expected[number])
        assert is_mixed(handle)


@every_method
def test_loop_that_keeps_its_position_ids_and_its_prompt(config, transformer, where_timesteps_live):
    """Then nothing but the time tells one run from the next. A schedule reads no time from an accelerator, so there the
    loop has to say it."""
    generator = torch.Generator().manual_seed(0)
    prompt, pooled = torch.randn(1, 6, 24, generator=generator), torch.randn(1, 16, generator=generator)

    def same_prompt(step: int, call: dict[str, Any]) -> None:
        call.update(encoder_hidden_states=prompt, pooled_projections=pooled)

    requests = [dict(seed=0), dict(seed=1), dict(seed=0, steps=5), dict(seed=2, steps=11)]
    expected = []
    for request in requests:
        with h2cache.apply(transformer, config):
            expected.append(denoise(transformer, before_step=same_prompt, **request))
    ids = position_ids(4, 4)
    with h2cache.apply(transformer, config) as handle:
        for number in (0, 1, 2, 3, 0):
            if where_timesteps_live == "device-timestep" and not measures(config):
                handle.reset()
            latents = denoise(transformer, img_ids=ids, before_step=same_prompt, **requests[number])
            assert torch.equal(latents, expected[number])
        assert is_mixed(handle)
        assert handle.summary()["runs"] == 5


@every_method
def test_loop_that_keeps_its_position_ids_and_breaks_off(config, transformer):
    """Between two steps or inside one; then a whole run, or one that starts at a lower time."""
    ids = position_ids(4, 4)

    def later(step: int, call: dict[str, Any]) -> None:
        call["timestep"] = call["timestep"] * 0.3

    def run(**options: Any) -> torch.Tensor:
        with h2cache.apply(transformer, config):
            return denoise(transformer, img_ids=position_ids(4, 4), **options)

    whole, late = run(), run(before_step=later)
    with h2cache.apply(transformer, config) as handle:
        unfinished = denoising(transformer, img_ids=ids, seed=3)
        for _ in range(6):
            next(unfinished)
        assert torch.equal(denoise(transformer, img_ids=ids), whole)

        for part in called_at_every_step(config, transformer):
            for following, expected in [({}, whole), ({"before_step": later}, late)]:
                hook = part.register_forward_hook(fail_at_call(5))
                with pytest.raises(Interruption):
                    denoise(transformer, img_ids=ids, seed=3)
                hook.remove()
                assert handle.held_bytes() == 0, "a run that failed inside a call is over"
                assert torch.equal(denoise(transformer, img_ids=ids, **following), expected)

        unfinished = denoising(transformer, img_ids=ids, seed=3)
        for _ in range(3):
            next(unfinished)
        handle.reset()  # what the handle offers where nothing tells the runs apart
        assert torch.equal(denoise(transformer, img_ids=ids, before_step=later), late)


def fail_at_call(number: int) -> Callable[..., None]:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise Interruption

    return fail


@every_method
def test_one_step_runs_with_the_same_position_ids(config, transformer, where_timesteps_live):
    ids = position_ids(4, 4)
    expected = [denoise(transformer, steps=1, seed=seed) for seed in range(3)]
    with h2cache.apply(transformer, config):
        for seed, latents in enumerate(expected):
            assert torch.equal(denoise(transformer, steps=1, seed=seed, img_ids=ids), latents)


@every_method
def test_steps_too_close_for_the_dtype_are_still_one_run(config, tiny_pipe_folder):
    """At 2048 x 2048 px FLUX's shift is 3.2, and in bfloat16 the first three of 50 timesteps are all 1000."""
    pipe = FluxPipeline.from_pretrained(tiny_pipe_folder, dtype=torch.bfloat16, local_files_only=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, base_shift=3.2)
    pipe.set_progress_bar_config(disable=True)
    with h2cache.apply(pipe, config) as handle:
        ask_pipeline_to_stop(pipe, steps=50)
    assert next(float(row.timestep) for row in handle.trace if row.step == 1) == 1000
    assert handle.summary()["runs"] == 1
    warmup = len(config.compose()) * warmup_steps(config)
    assert sum(row.decision is Decision.WARMUP for row in handle.trace) == warmup


@pytest.fixture
def inputs(transformer):
    """The arguments of one call of the model."""
    captured = {}
    denoise(transformer, steps=1, before_step=lambda step, arguments: captured.update(arguments))
    return captured


def test_the_same_call_again_and_again_is_run_after_run(transformer, inputs):
    """As a benchmark may make it: nothing changes, not even the timestep. It never hits, and it does not grow."""
    with torch.no_grad(), h2cache.apply(transformer, H2CacheConfig(tau1=9.0, tau2=9.0)) as handle:
        held = []
        for _ in range(7):
            transformer(**inputs)
            held.append(handle.held_bytes())
    assert held[2:] == [*held[:2], *held[:2], held[0]]
    assert not handle.trace.to_pandas()["decision"].isin(["hit", "forced"]).any()


def test_steps_with_the_same_input_are_one_run(transformer, inputs):
    """Only the timestep changes: the calls are steps of one run, compared with one another."""
    with torch.no_grad(), h2cache.apply(transformer, H2CacheConfig(tau1=9.0, tau2=9.0)) as handle:
        for step in range(5):
            transformer(**inputs | {"timestep": torch.tensor([1 - 0.1 * step])})
    assert handle.summary()["runs"] == 1
    assert handle.summary()["stages"]["structure"]["hit"] == 4
