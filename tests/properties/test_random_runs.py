"""What holds for any thresholds, shapes, batches and sequences of runs, tried on examples that hypothesis thinks up."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loops import attentions, denoise, denoising, position_ids
from methods_under_test import (
    EARLY,
    FIRST_BLOCK,
    MEASURING,
    METHODS,
    SCHEDULED,
    always_hitting,
    measures,
    never_hitting,
)
from tiny import tiny_transformer

import h2cache
from h2cache import CacheConfig, Decision, H2CacheConfig

SIZES = dict(
    height=st.integers(1, 4),
    width=st.integers(1, 5),
    text_tokens=st.integers(1, 9),
    steps=st.integers(1, 7),
    seed=st.integers(0, 3),
    guidance=st.sampled_from([1.0, 3.5]),
)
runs = st.fixed_dictionaries({**SIZES, "batch": st.integers(1, 3)})
lone_images = st.fixed_dictionaries({**SIZES, "batch": st.just(1)})
taus = st.one_of(st.floats(0, 1), st.sampled_from([-1.0, 0.0, math.inf]))


@st.composite
def configs(draw, methods: list = METHODS) -> CacheConfig:
    config = draw(st.sampled_from([method.values[0] for method in methods]))
    if not measures(config):
        one_cluster = {"clusters": 1} if hasattr(config, "clusters") else {}  # however few tokens there are
        numbers = dict(
            interval=draw(st.integers(1, 4)), order=draw(st.integers(0, 2)), first_enhance=draw(st.integers(1, 3))
        )
        return config.updated(**numbers, **one_cluster)
    if not isinstance(config, H2CacheConfig):
        return config.updated(threshold=draw(taus))
    pool = st.one_of(st.none(), st.integers(1, 20))
    return config.updated(
        tau1=draw(taus),
        tau2=draw(taus),
        pool1=draw(pool),
        pool2=draw(pool),
        hierarchical=draw(st.booleans()),
        warmup_steps=draw(st.integers(1, 3)),
        max_consecutive_hits=draw(st.one_of(st.none(), st.integers(1, 3))),
        stages=draw(st.sampled_from(["both", "both", "structure", "detail"])),
    )


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@given(run=runs, config=configs())
def test_a_threshold_that_never_hits_changes_no_bit(model, run, config):
    plain = denoise(model, **run)
    with h2cache.apply(model, never_hitting(config)) as handle:
        cached = denoise(model, **run)
    assert torch.equal(cached, plain)
    assert handle.summary()["computed_fraction"] == 1.0


@given(run=runs, config=configs())
def test_the_trace_tells_how_many_blocks_were_executed(model, run, config):
    with h2cache.apply(model, config) as handle, attentions(model) as calls:
        denoise(model, **run)
    executed = sum(sum(blocks) for blocks in calls)
    summary, images = handle.summary(), run["batch"] * run["steps"]
    assert executed == pytest.approx(summary["computed_fraction"] * images * 5)
    assert summary["max_speedup"] == pytest.approx(images * 5 / executed)
    if getattr(config, "stages", "both") == "both":
        assert executed == sum(row.blocks_computed for row in handle.trace)


@given(run=runs, config=configs(SCHEDULED))
def test_every_decision_follows_the_schedule(model, run, config):
    """The first steps, then one step in `interval`, counted from the last computed one."""
    with h2cache.apply(model, config) as handle:
        denoise(model, **run)
    for row in handle.trace:
        after_the_first = row.step - config.first_enhance
        if after_the_first < 0:
            expected = Decision.WARMUP
        else:
            expected = Decision.COMPUTE if (after_the_first + 1) % config.interval == 0 else Decision.HIT
        assert row.decision is expected and row.diff is None


@given(run=runs, config=configs(EARLY))
def test_every_decision_follows_the_sum(model, run, config):
    """The first step, and the last one of three and more, compute; between them what has added up decides."""
    with h2cache.apply(model, config) as handle:
        denoise(model, **run)
    for row in handle.trace:
        if row.step == 0:
            expected = Decision.WARMUP
        elif row.step == run["steps"] - 1 >= 2:
            expected = Decision.COMPUTE
        else:
            expected = Decision.HIT if row.diff < row.threshold else Decision.COMPUTE
        assert row.decision is expected


@given(run=runs, config=configs(FIRST_BLOCK))
def test_every_decision_follows_the_rule(model, run, config):
    """Warm-up, then the reason that the numbers in the same row, and the rows before it, give."""
    with h2cache.apply(model, config) as handle:
        denoise(model, **run)
    in_a_row: dict[tuple, int] = {}
    skipped: dict[tuple, bool] = {}
    limit = getattr(config, "max_consecutive_hits", None)
    for row in handle.trace:
        place = (row.stage, row.sample)
        forced = row.stage == "detail" and config.hierarchical and skipped.get(("structure", row.sample), False)
        if row.step < getattr(config, "warmup_steps", 1):
            expected = Decision.WARMUP
        elif limit is not None and in_a_row.get(place, 0) >= limit:
            expected = Decision.COMPUTE
        elif forced:
            expected = Decision.FORCED
        else:
            expected = Decision.HIT if row.diff < row.threshold else Decision.COMPUTE
        assert row.decision is expected
        skipped[place] = row.decision.skips
        in_a_row[place] = in_a_row.get(place, 0) + 1 if row.decision.skips else 0


@given(run=runs, config=configs())
def test_an_image_of_a_batch_is_the_image_alone(model, run, config):
    """Same decisions, and the same numbers but for the rounding of another batch size. Where a difference meets its
    threshold to four digits, that rounding may decide, and the example says nothing."""
    assume(not any(stage.learns for stage in config.compose()))  # rounding may decide there as well
    with h2cache.apply(model, config) as handle:
        batch = denoise(model, **run)
    rows = list(handle.trace)
    for image in range(run["batch"]):
        with h2cache.apply(model, config) as handle:
            alone = denoise(model, **run | dict(batch=1, seed=run["seed"] + image))
        assume(all(row.diff is None or abs(row.diff - row.threshold) > 1e-4 for row in handle.trace))
        of_this = [(row.step, row.stage, row.decision) for row in rows if row.sample == image]
        assert of_this == [(row.step, row.stage, row.decision) for row in handle.trace]
        assert (batch[image] - alone[0]).norm() <= 1e-5 * alone.norm()


@given(run=lone_images, taus=st.tuples(st.floats(0, 1), st.floats(0, 1)), method=st.sampled_from(MEASURING))
def test_a_larger_threshold_hits_no_later(model, run, taus, method):
    """Until the first hit two runs are the same, so the larger threshold meets it first. (After it they are different
    runs, and the larger threshold may well compute more.)"""
    config, first_hits = method.values[0], []
    for tau in sorted(taus):
        single = dict(tau1=tau, tau2=-1.0) if isinstance(config, H2CacheConfig) else dict(threshold=tau)
        with h2cache.apply(model, config.updated(**single)) as handle:
            denoise(model, **run)
        first_hits.append(min((row.step for row in handle.trace if row.decision is Decision.HIT), default=math.inf))
    assert first_hits[1] <= first_hits[0]


@given(run=lone_images, config=configs(MEASURING))
def test_zero_and_negative_thresholds_never_hit_and_infinity_always_does(model, run, config):
    names = ("tau1", "tau2") if isinstance(config, H2CacheConfig) else ("threshold",)
    for tau in (0.0, -0.5):
        with h2cache.apply(model, config.updated(**dict.fromkeys(names, tau))) as handle:
            denoise(model, **run)
        assert handle.summary()["computed_fraction"] == 1.0
    with h2cache.apply(model, always_hitting(config)) as handle:
        denoise(model, **run)
    limited = getattr(config, "max_consecutive_hits", None) is not None
    assert all(row.decision is not Decision.COMPUTE for row in handle.trace) or limited


@given(run=lone_images, config=configs(SCHEDULED))
def test_a_schedule_without_end_computes_its_first_steps_only(model, run, config):
    with h2cache.apply(model, always_hitting(config)) as handle:
        denoise(model, **run)
    first = getattr(config, "first_enhance", 1)
    assert all(row.decision.skips == (row.step >= first) for row in handle.trace)


class Abort(Exception):
    pass


def abort_between_steps(model, run, at, **shared):
    """The caller of the loop walks away after step `at`."""
    loop = denoising(model, **run, **shared)
    for _ in range(min(at, run["steps"])):
        next(loop)
    loop.close()


def abort_inside_a_block(model, run, at, **shared):
    """Ctrl-C in the middle of a step: the last double block has run, the first single block has not."""
    calls = []

    def interrupt(module, args, kwargs):
        calls.append(module)
        if len(calls) > at:
            raise Abort

    hook = model.single_transformer_blocks[0].register_forward_pre_hook(interrupt, with_kwargs=True)
    try:
        denoise(model, **run, **shared)
    except Abort:
        pass
    finally:
        hook.remove()


def interleaved(model, first, second):
    """The images of two runs whose steps alternate, as two callers of one transformer would have it."""
    loops, images = [denoising(model, **first), denoising(model, **second)], [None, None]
    alive = [0, 1]
    while alive:
        for k in list(alive):
            try:
                images[k] = next(loops[k])
            except StopIteration:
                alive.remove(k)
    return images


actions = st.one_of(
    st.tuples(st.just("whole"), runs),
    st.tuples(st.just("whole, with the position ids of an earlier run"), runs),
    st.tuples(st.just("two at a time"), runs, runs),
    st.tuples(st.just("left after a step"), runs, st.integers(1, 4)),
    st.tuples(st.just("interrupted in a step"), runs, st.integers(0, 4)),
)


@settings(max_examples=25)
@given(config=configs(), sequence=st.lists(actions, min_size=2, max_size=4))
def test_every_run_of_a_session_is_the_run_alone(model, config, sequence):
    """Whatever came before, was left unfinished or goes on at the same time; and in the end nothing is held."""

    def alone(run):
        with h2cache.apply(model, config):
            return denoise(model, **run)

    session, ids = [], {}
    with h2cache.apply(model, config) as handle:
        for kind, run, *more in sequence:
            size = run["height"], run["width"]
            if kind == "whole":
                session.append((run, denoise(model, **run)))
            elif kind == "two at a time":
                session += zip((run, more[0]), interleaved(model, run, more[0]), strict=True)
            elif kind == "left after a step":
                abort_between_steps(model, run, more[0])
            elif kind == "interrupted in a step":
                abort_inside_a_block(model, run, more[0], img_ids=ids.setdefault(size, position_ids(*size)))
            else:
                image = denoise(model, **run, img_ids=ids.setdefault(size, position_ids(*size)))
                session.append((run, image))
        ids.clear()
        assert handle.held_bytes() == 0
    for run, image in session:
        assert torch.equal(image, alone(run)), run


@given(config=configs(), run=lone_images, at=st.integers(0, 5))
def test_a_step_that_failed_and_is_tried_again_begins_afresh(model, config, run, at):
    """What the failed step left behind is forgotten: a second try must not take it for an earlier step."""

    def fail_once(step, call):
        if step == at:
            hook = model.norm_out.register_forward_pre_hook(fail)  # behind the last block
            with pytest.raises(Abort):
                model(**call)
            hook.remove()

    def fail(module, args):
        raise Abort

    def forget(step, call):
        if step == at:
            handle.reset()

    with h2cache.apply(model, config):
        tried_again = denoise(model, **run, before_step=fail_once)
    with h2cache.apply(model, config) as handle:
        afresh = denoise(model, **run, before_step=forget)
    assert torch.equal(tried_again, afresh)
