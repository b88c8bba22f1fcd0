"""`h2cache.apply(pipe, PlanConfig(plan))` swaps the scheduler and puts it back, and its handle tells what happened."""

import gc
import logging
import math
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from attachments import assert_same_inside, inside
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, HeunDiscreteScheduler
from pictures import own_pipeline, picture
from plans import PLAN

import h2cache
from h2cache import Decision, Handle, Plan, PlanConfig, PlanScheduler
from h2cache.baselines import BlockCacheConfig
from h2cache.plans.conditions import Conditions
from h2cache.runtime.interception import interception_of

BLOCKS = 5  # of the tiny transformer
CONFIG = PlanConfig(PLAN)
EVERYTHING = PlanConfig(Plan(Conditions(steps=8), tuple(range(8)), {}))


@pytest.fixture
def pipe(tiny_pipe):
    """With a scheduler of its own, so that whatever a failed test leaves there is gone with it."""
    return own_pipeline(tiny_pipe)


def stop_at(step: int, error: type[BaseException] = KeyboardInterrupt):
    """A callback that breaks the run off behind the computed step of this number."""

    def callback(pipe, number, timestep, tensors):
        if number == step:
            raise error
        return tensors

    return callback


# --- on and off -----------------------------------------------------------------------------------------------------


def test_removal_leaves_the_pipeline_as_it_was(pipe):
    plain = picture(pipe, steps=8)
    scheduler, config, parts = pipe.scheduler, dict(pipe.config), dict(vars(pipe))
    handle = h2cache.apply(pipe, CONFIG)
    assert isinstance(handle, Handle) and isinstance(pipe.scheduler, PlanScheduler)
    assert handle.held_bytes() == 0, "nothing before the first run"
    assert not torch.equal(picture(pipe, steps=8), plain)
    handle.remove()
    handle.remove()
    assert torch.equal(picture(pipe, steps=8), plain)
    assert pipe.scheduler is scheduler and dict(pipe.config) == config
    assert vars(pipe).keys() == parts.keys()
    assert all(vars(pipe)[name] is part for name, part in parts.items() if name in pipe.components)
    assert len(handle.trace) == 8, "the trace stays readable"


def test_no_model_is_touched(pipe):
    picture(pipe, steps=8)  # the first run makes a registry of diffusers' own
    before = inside(pipe.transformer)
    with h2cache.apply(pipe, CONFIG):
        picture(pipe, steps=8)
        assert_same_inside(pipe.transformer, before)


def test_the_earlier_scheduler_is_not_touched(pipe):
    """It is copied: another pipeline may be using it at this moment."""
    pipe.scheduler.set_timesteps(5, mu=0.5)
    before = dict(vars(pipe.scheduler))
    with h2cache.apply(pipe, CONFIG) as handle:
        picture(pipe, steps=8)
        earlier = handle._earlier
        assert all(value is before[name] for name, value in vars(earlier).items())


def test_leaving_the_block_removes_it_also_by_an_exception(pipe):
    scheduler = pipe.scheduler
    with pytest.raises(KeyboardInterrupt), h2cache.apply(pipe, CONFIG) as handle:
        picture(pipe, steps=8, callback_on_step_end=stop_at(1))
    assert pipe.scheduler is scheduler and handle.held_bytes() == 0


def test_a_scheduler_that_the_user_put_there_stays(pipe, caplog):
    handle, own = h2cache.apply(pipe, CONFIG), FlowMatchEulerDiscreteScheduler()
    pipe.scheduler = own
    with caplog.at_level(logging.WARNING, "h2cache"):
        handle.remove()
    assert pipe.scheduler is own
    assert "another scheduler by now, which stays" in caplog.text
    with pytest.raises(RuntimeError, match="removed or replaced by another"):
        handle.update(allow_transfer=True)


def test_a_scheduler_with_a_plan_that_the_user_made_is_put_back(pipe):
    pipe.scheduler = own = PlanScheduler(EVERYTHING.plan, pipe.scheduler)
    with h2cache.apply(pipe, CONFIG) as handle:
        picture(pipe, steps=8)
        assert handle.summary()["computed_fraction"] == 0.5
    assert pipe.scheduler is own


def test_applying_again_replaces(pipe, caplog):
    scheduler = pipe.scheduler
    first = h2cache.apply(pipe, CONFIG)
    second = h2cache.apply(pipe, EVERYTHING)
    with caplog.at_level(logging.WARNING, "h2cache"):
        first.remove()
    assert "already replaced by a later h2cache.apply" in caplog.text
    with pytest.raises(RuntimeError, match="replaced"):
        first.update(allow_transfer=True)
    picture(pipe, steps=8)
    assert (len(first.trace), second.summary()["computed_fraction"]) == (0, 1.0)
    second.remove()
    assert pipe.scheduler is scheduler


def test_a_cache_replaces_a_plan_and_a_plan_a_cache(pipe):
    scheduler, transformer = pipe.scheduler, pipe.transformer
    plan = h2cache.apply(pipe, CONFIG)
    cache = h2cache.apply(pipe, BlockCacheConfig(threshold=0.3))
    assert plan.replaced and pipe.scheduler is scheduler and interception_of(transformer) is not None
    plan = h2cache.apply(pipe, CONFIG)
    assert interception_of(transformer) is None and isinstance(pipe.scheduler, PlanScheduler)
    with pytest.raises(RuntimeError, match="replaced"):
        cache.update(threshold=0.1)
    plan.remove()
    assert pipe.scheduler is scheduler


def test_what_cannot_be_had_changes_nothing(pipe):
    first, scheduler = h2cache.apply(pipe, CONFIG), pipe.scheduler
    with pytest.raises(TypeError):
        h2cache.apply(pipe, object())
    with pytest.raises(TypeError):
        h2cache.apply(pipe.transformer, CONFIG)
    assert pipe.scheduler is scheduler and not first.replaced
    first.remove()
    cache = h2cache.apply(pipe, BlockCacheConfig(threshold=0.3))
    pipe.scheduler = HeunDiscreteScheduler()
    with pytest.raises(TypeError, match="not of HeunDiscreteScheduler"):
        h2cache.apply(pipe, CONFIG)
    assert interception_of(pipe.transformer) is not None
    cache.remove()


@pytest.mark.parametrize("target", [torch.nn.Linear(2, 2), "pipe", None], ids=lambda target: type(target).__name__)
def test_what_is_no_pipeline_is_refused(target):
    with pytest.raises(TypeError, match=rf"{type(target).__name__}: a plan skips steps of a pipeline.*PlanScheduler"):
        h2cache.apply(target, CONFIG)


def test_a_pipeline_of_a_model_that_no_adapter_knows_is_served(pipe):
    """Its model counts as one block."""

    class Pipeline:
        unet, guidance_scale = torch.nn.Linear(3, 3), None
        scheduler = FlowMatchEulerDiscreteScheduler()

    other = Pipeline()
    with h2cache.apply(other, CONFIG) as handle:
        other.scheduler.set_timesteps(8)
        for timestep in other.scheduler.timesteps:
            other.scheduler.step(torch.zeros(2, 3), timestep, torch.zeros(2, 3))
    assert handle.summary()["computed_fraction"] == 0.5
    assert {row.blocks_computed for row in handle.trace} == {0, 1}


def test_a_pipeline_on_the_same_components_is_its_own_pipeline(pipe):
    """`from_pipe` shares the scheduler as well. Each handle takes off what it put on."""
    with h2cache.apply(pipe, CONFIG) as first:
        other = FluxImg2ImgPipeline.from_pipe(pipe)
        shared = other.scheduler
        assert shared is pipe.scheduler
        with h2cache.apply(other, EVERYTHING):
            assert pipe.scheduler is shared and not first.replaced
        assert other.scheduler is shared


def test_a_pipeline_with_a_plan_goes_when_nobody_holds_it(tiny_pipe):
    pipe = own_pipeline(tiny_pipe)
    h2cache.apply(pipe, CONFIG)
    scheduler = weakref.ref(pipe.scheduler)
    del pipe
    gc.collect()
    assert scheduler() is None


def test_the_scheduler_can_be_pickled(pipe):
    with h2cache.apply(pipe, CONFIG):
        loaded = pickle.loads(pickle.dumps(pipe.scheduler))
    assert loaded.plan == PLAN and loaded.watcher is None


# --- what is told ---------------------------------------------------------------------------------------------------


def test_the_trace_has_a_row_for_each_step_and_image(pipe):
    with h2cache.apply(pipe, CONFIG) as handle:
        picture(pipe, ["a red sign", "a label"], steps=8)
        base = handle.scheduler.base
    rows = [row for row in handle.trace if row.sample == 1]
    assert len(handle.trace) == 2 * len(rows) and [row.step for row in rows] == list(range(8))
    warmup, compute, hit = Decision.WARMUP, Decision.COMPUTE, Decision.HIT
    assert [row.decision for row in rows] == [warmup, compute, hit, compute, hit, hit, compute, hit]
    assert [row.timestep for row in rows] == base.timesteps.tolist() and rows[0].timestep == 1000
    assert [row.blocks_computed for row in rows] == [BLOCKS, BLOCKS, 0, BLOCKS, 0, 0, BLOCKS, 0]
    assert {(row.run, row.context, row.stage, row.diff) for row in rows} == {(0, "cond", "model", None)}
    assert all(math.isnan(row.threshold) for row in rows)


def test_the_summary_adds_up_over_runs(pipe):
    with h2cache.apply(pipe, CONFIG) as handle:
        assert handle.summary()["stages"] == {"model": dict(warmup=0, compute=0, hit=0, forced=0)}
        for _ in range(2):
            picture(pipe, steps=8)
    counts = dict(warmup=2, compute=6, hit=8, forced=0)
    expected = dict(runs=2, steps=16, stages={"model": counts}, computed_fraction=0.5, max_speedup=2.0)
    assert handle.summary() == expected


def test_the_trace_becomes_a_table(pipe):
    with h2cache.apply(pipe, CONFIG) as handle:
        picture(pipe, steps=8)
    frame = handle.trace.to_pandas()
    assert list(frame["decision"][:3]) == ["warmup", "compute", "hit"] and frame["threshold"].isna().all()


def test_what_is_held_is_the_outputs_that_are_still_needed_and_nothing_after_the_run(pipe):
    held = []

    def look(pipe, step, timestep, tensors):
        held.append(handle.held_bytes())
        return tensors

    with h2cache.apply(pipe, CONFIG) as handle:
        latents = picture(pipe, steps=8, callback_on_step_end=look)
    assert held == [latents.nbytes, 2 * latents.nbytes, 2 * latents.nbytes, 0]


# --- while it is on -------------------------------------------------------------------------------------------------


def test_an_update_takes_effect_with_the_next_run(pipe):
    with h2cache.apply(pipe, EVERYTHING):
        expected = picture(pipe, steps=8)

    def change(pipe, step, timestep, tensors):
        if step == 1:
            handle.update(plan=EVERYTHING.plan)
        return tensors

    with h2cache.apply(pipe, CONFIG) as handle:
        first = picture(pipe, steps=8)
        assert torch.equal(picture(pipe, steps=8, callback_on_step_end=change), first)
        assert handle.config == EVERYTHING and pipe.scheduler.plan == EVERYTHING.plan
        assert pipe.scheduler.config["plan"]["computed"] == list(range(8))
        assert torch.equal(picture(pipe, steps=8), expected)


def test_an_update_that_makes_no_sense_changes_nothing(pipe):
    with h2cache.apply(pipe, CONFIG) as handle:
        for changes in (dict(tau1=0.2), dict(plan=3), dict(allow_transfer="yes")):
            with pytest.raises(ValueError, match=next(iter(changes))):
                handle.update(**changes)
        assert handle.config is CONFIG and pipe.scheduler.plan == PLAN


def test_a_reset_forgets_the_outputs_and_the_run_goes_on_with_what_is_newer(pipe):
    """Weights of outputs that are gone fall on the newest, as at the beginning of a run."""

    def forget(pipe, step, timestep, tensors):
        if step == 1:
            handle.reset()
            assert handle.held_bytes() == 0
        return tensors

    with h2cache.apply(pipe, CONFIG) as handle:
        whole = picture(pipe, steps=8)
        handle.trace.clear()
        assert not torch.equal(picture(pipe, steps=8, callback_on_step_end=forget), whole)
        assert [row.decision for row in handle.trace if row.step == 3] == [Decision.WARMUP]
        assert handle.summary()["runs"] == 2
        assert torch.equal(picture(pipe, steps=8), whole)


@pytest.mark.parametrize(
    ("known", "changes", "named"),
    [
        (dict(guidance=3.5), dict(guidance_scale=5.0), "guidance 3.5 and is run with 5.0"),
        (dict(image_tokens=4), {}, "image tokens 4 and is run with 16"),
        (dict(model="Other 0123"), {}, "model Other 0123 and is run with FluxTransformer2DModel"),
        (dict(scheduler="Other {}"), {}, r"scheduler Other \{\} and is run with FlowMatchEuler.*\"shift\": 3.0"),
        ({}, dict(steps=6), "steps 8 and is run with 6"),
    ],
)
def test_a_run_under_other_conditions_is_refused_unless_allowed(pipe, known, changes, named):
    plan = replace(PLAN, made_for=replace(PLAN.made_for, **known))
    call = dict(steps=8) | changes
    with h2cache.apply(pipe, PlanConfig(plan)), pytest.raises(ValueError, match=f"made for {named}.*allow_transfer"):
        picture(pipe, **call)
    with h2cache.apply(pipe, PlanConfig(plan, allow_transfer=True)) as handle:
        picture(pipe, **call)
    assert any(row.decision is Decision.HIT for row in handle.trace)


def test_a_run_that_was_refused_leaves_nothing_behind(pipe):
    with h2cache.apply(pipe, CONFIG) as handle:
        expected = picture(pipe, steps=8)
        with pytest.raises(ValueError, match="steps 8 and is run with 6"):
            picture(pipe, steps=6)
        assert torch.equal(picture(pipe, steps=8), expected)
    assert handle.summary()["runs"] == 2
