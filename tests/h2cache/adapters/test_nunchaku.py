"""What must hold of every method on both generations of nunchaku's Flux: the stand-ins, and the real ones if any.

`pytest -m nunchaku` runs these very tests on the real package. Where a test needs hits and misses, the stand-ins show
them; on a real model the same thresholds may fall otherwise, and the properties hold all the same.
"""
# ruff: noqa: F811 - fixtures

import math
from typing import Any

import pytest
import torch
from attachments import assert_same_inside, inside
from loops import position_ids
from methods_under_test import KINDS, always_hitting, measures, never_hitting, runs_first_block, warmup_steps
from nunchakus import REFUSED, STAGED, SUBJECTS, Subject, batching, in_turn, nunchaku, on_subjects, subject  # noqa: F401
from pictures import is_mixed, partial_steps, run_record
from thorough import named, product
from torch import Tensor
from waits import MEASURED_NOTHING, waits_by_step

import h2cache
from h2cache import CacheConfig, Decision, H2CacheConfig
from h2cache.handle import Handle

every_method = pytest.mark.parametrize("config", STAGED)  # with `batching`, which has one generation alone
methods_in_turn = on_subjects(STAGED)
kinds_in_turn = on_subjects([method for method in STAGED if method in KINDS])


def decisions(handle: Handle) -> list[Decision]:
    return [row.decision for row in handle.trace]


def assert_shows_something(subject: Subject, handle: Handle) -> None:
    assert subject.real or is_mixed(handle)


def guided(subject: Subject, **options: Any) -> Tensor:
    """A run of true guidance: each step calls the model for the prompt, and again for a negative one of another length.

    The second call is made from within the first step's preparation, so that both carry the run's position ids.
    """
    generator = torch.Generator().manual_seed(99)
    config, device = subject.transformer.config, subject.transformer.device
    prompt = torch.randn(1, 9, config.joint_attention_dim, generator=generator).to(device, subject.dtype)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator).to(device, subject.dtype)
    txt_ids = torch.zeros(9, 3, device=device)
    seen = []

    def negative(step: int, call: dict[str, Any]) -> None:
        own = {"encoder_hidden_states": prompt, "pooled_projections": pooled, "txt_ids": txt_ids}
        with torch.no_grad():
            seen.append(subject.transformer(**call | own)[0])

    return torch.stack([subject.denoise(before_step=negative, **options), torch.stack(seen).sum(dim=0)])


@product(
    "config, request_, subject",
    STAGED,
    named({"plain": {}, "odd": {"height": 3, "width": 5}}),
    SUBJECTS,
    kept=lambda method, size, subject: size == "odd" and in_turn(method, subject),
    indirect=["subject"],
)
def test_never_hitting_changes_no_bit(config, request_, subject):
    assert_no_bit_changes(subject, config, **request_)


@batching
@every_method
def test_never_hitting_changes_no_bit_of_a_batch(config, subject):
    assert_no_bit_changes(subject, config, batch=3)


def assert_no_bit_changes(subject: Subject, config: CacheConfig, **request: Any) -> None:
    untouched = subject.denoise(**request)
    with h2cache.apply(subject.transformer, never_hitting(config)) as handle:
        assert torch.equal(subject.denoise(**request), untouched)
    assert handle.summary()["computed_fraction"] == 1


def test_a_batch_that_the_kernels_do_not_take_is_refused(subject):
    """They end the process; with a cache one sentence says so, and the cache goes on. V1 takes 8 images, V2 one."""
    batch = 9 if subject.takes_batches else 2
    with h2cache.apply(subject.transformer, H2CacheConfig()) as handle:
        expected = subject.denoise(steps=3)
        with pytest.raises(ValueError, match=f"take a batch of at most {batch - 1}, not of {batch}: generate fewer"):
            subject.denoise(batch=batch)
        assert torch.equal(subject.denoise(steps=3), expected)
        handle.trace.clear()
        if subject.takes_batches:
            subject.denoise(steps=2, batch=batch - 1)
            assert len(handle.trace) == 2 * 2 * 8
    if not subject.real:  # the untouched stand-in fails where the real kernels end the process
        with pytest.raises(AssertionError):
            subject.denoise(batch=batch)


@methods_in_turn
def test_every_block_is_counted(config, subject):
    """The numbers of blocks are the model's; a hit leaves out all but the first of its stage, or all."""
    model = subject.transformer.config
    with h2cache.apply(subject.transformer, config) as handle:
        subject.denoise()
    record = run_record(handle)
    assert record.total_blocks == model.num_layers + model.num_single_layers
    assert len(handle.trace) == 9 * len(config.compose())
    for row in handle.trace:
        left = int(runs_first_block(config))
        assert row.blocks_computed == (left if row.decision.skips else record.stage_blocks[row.stage])


@methods_in_turn
def test_removal_leaves_the_model_as_it_was(config, subject):
    model = subject.transformer
    plain = subject.denoise()
    before, state = inside(model), {name: value.clone() for name, value in model.state_dict().items()}
    handle = h2cache.apply(model, config)
    cached = subject.denoise()
    assert_shows_something(subject, handle)
    assert not torch.equal(cached, plain)
    handle.remove()
    assert_same_inside(model, before)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(subject.denoise(), plain)
    assert handle.held_bytes() == 0 and len(handle.trace) > 0


@methods_in_turn
def test_removal_in_the_middle_of_a_run_and_by_an_error(config, subject):
    subject.denoise(steps=1)  # V1 notes its last arguments on itself
    before = inside(subject.transformer)
    handle = h2cache.apply(subject.transformer, config)
    for step, _ in enumerate(subject.denoising(steps=6)):
        if step == 3:
            handle.remove()
            assert_same_inside(subject.transformer, before)
    with pytest.raises(ZeroDivisionError), h2cache.apply(subject.transformer, config):
        subject.denoise(steps=3)
        1 / 0  # noqa: B018
    assert_same_inside(subject.transformer, before)


@kinds_in_turn
def test_applying_again_replaces(config, subject):
    subject.denoise(steps=1)  # V1 notes its last arguments on itself
    before = inside(subject.transformer)
    with h2cache.apply(subject.transformer, config):
        expected = subject.denoise()
    first = h2cache.apply(subject.transformer, never_hitting(config))
    second = h2cache.apply(subject.transformer, config)
    assert torch.equal(subject.denoise(), expected)
    assert len(first.trace) == 0
    first.remove()
    assert torch.equal(subject.denoise(), expected)
    second.remove()
    assert_same_inside(subject.transformer, before)


class Interruption(Exception):
    """What breaks a run off."""


@methods_in_turn
def test_a_session_of_runs(config, subject):
    """Whatever came before, a run is as if alone: aborted runs, other sizes, batches, steps and prompts, guidance."""

    def break_off(**options: Any) -> None:
        def stop(step: int, call: dict[str, Any]) -> None:
            if step == 4:
                raise Interruption

        with pytest.raises(Interruption):
            subject.denoise(before_step=stop, seed=5, **options)

    def break_off_inside() -> None:
        hook = subject.transformer.norm_out.register_forward_pre_hook(fail_at(3))
        try:
            with pytest.raises(Interruption):
                subject.denoise(seed=5)
        finally:
            hook.remove()

    with h2cache.apply(subject.transformer, config):
        expected = subject.denoise()
    disturbances = [
        break_off,
        break_off_inside,
        lambda: subject.denoise(height=2, width=8),
        lambda: subject.denoise(height=3, width=7, text_tokens=11),
        lambda: subject.denoise(steps=3, seed=4),
        lambda: guided(subject),
    ]
    if subject.takes_batches:
        disturbances += [lambda: break_off(batch=2), lambda: subject.denoise(batch=3)]
    with h2cache.apply(subject.transformer, config) as handle:
        for disturb in disturbances:
            disturb()
            handle.trace.clear()
            assert torch.equal(subject.denoise(), expected)
            assert_shows_something(subject, handle)


def fail_at(number: int) -> Any:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise Interruption

    return fail


@methods_in_turn
def test_a_loop_that_keeps_its_position_ids(config, subject):
    requests = [dict(seed=0), dict(seed=1, steps=7), dict(seed=0, text_tokens=9)]
    expected = []
    for request in requests:
        with h2cache.apply(subject.transformer, config):
            expected.append(subject.denoise(**request))
    ids = position_ids(4, 4).to(subject.transformer.device)
    with h2cache.apply(subject.transformer, config):
        for number in (0, 1, 0, 2, 0):
            assert torch.equal(subject.denoise(img_ids=ids, **requests[number]), expected[number])


@methods_in_turn
def test_branches_of_guidance_have_memories_of_their_own(config, subject):
    """With thresholds that all is below, a branch that saw the other's memory would show it."""
    config = always_hitting(config)
    with h2cache.apply(subject.transformer, config) as handle:
        conditional = subject.denoise(seed=3)
        alone = decisions(handle)
        handle.trace.clear()
        both = guided(subject, seed=3)
    assert torch.equal(both[0], conditional)
    rows = {name: [row.decision for row in handle.trace if row.context == name] for name in ("cond", "uncond")}
    assert rows == {"cond": alone, "uncond": alone}


@batching
@every_method
def test_each_image_of_a_batch_is_decided_as_if_alone(config, subject):
    with h2cache.apply(subject.transformer, config) as handle:
        batch = subject.denoise(batch=3)
        rows = list(handle.trace)
        handle.trace.clear()
        for sample in range(3):
            image = subject.denoise(seed=sample)
            torch.testing.assert_close(batch[sample : sample + 1], image, rtol=0.05, atol=0.05)
            assert [row.decision for row in rows if row.sample == sample] == decisions(handle)
            handle.trace.clear()
    if measures(config) and not subject.real:
        assert partial_steps(rows) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@on_subjects([method for method in STAGED if measures(method.values[0])])
def test_a_probe_that_is_no_number_computes_and_spoils_no_other_step(config, value, subject):
    config = always_hitting(config)
    bad, outputs = 4, []

    def spoil(step: int, call: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(1)
        still = torch.randn(call["hidden_states"].shape, generator=generator).to(call["hidden_states"])
        call["hidden_states"] = still * (value if step == bad else 1 + 0.01 * step)

    hook = subject.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        with h2cache.apply(subject.transformer, config) as handle:
            subject.denoise(steps=8, before_step=spoil)
    finally:
        hook.remove()
    assert [output.isfinite().all().item() for output in outputs] == [step != bad for step in range(8)]
    for row in handle.trace:
        if row.step == bad:
            assert not row.decision.skips or row.decision is Decision.FORCED
        elif row.step > bad + warmup_steps(config):
            assert row.decision.skips


@methods_in_turn
def test_memory_is_freed_when_a_run_ends(config, subject):
    held = []
    with h2cache.apply(subject.transformer, config) as handle:
        for _ in subject.denoising(steps=4):
            held.append(handle.held_bytes())
        assert min(held) > 0
        assert handle.held_bytes() == 0
        failed = subject.transformer.norm_out.register_forward_pre_hook(fail_at(2))
        with pytest.raises(Interruption):
            subject.denoise()
        failed.remove()
        assert handle.held_bytes() == 0


@methods_in_turn
def test_one_wait_for_each_decided_stage_and_none_for_others(config, subject, timesteps_elsewhere):
    if subject.real:
        pytest.skip("waits are counted on the CPU")
    waits, handle = waits_by_step(subject.transformer, config, dtype=subject.dtype)
    for step, count in enumerate(waits):
        rows = [row for row in handle.trace if row.step == step]
        decided = {row.stage for row in rows if row.decision not in MEASURED_NOTHING}
        learned = sum(stage.learns for stage in config.compose()) if any(row.decision.skips for row in rows) else 0
        assert count <= (len(decided) if measures(config) else learned), f"step {step}"
    assert not measures(config) or sum(waits) > 0


@kinds_in_turn
def test_settings_change_in_the_middle_of_a_run(config, subject):
    off = never_hitting(config)
    changes = {name: value for name, value in vars(off).items() if value != getattr(config, name)}
    with h2cache.apply(subject.transformer, config) as handle:
        for step, _ in enumerate(subject.denoising(steps=9)):
            if step == 4:
                handle.update(**changes)
    assert not any(row.decision.skips for row in handle.trace if row.step > 4)
    assert all(row.decision.skips is False for row in handle.trace if row.step == 0)


@pytest.mark.parametrize("config", REFUSED)
def test_modules_inside_blocks_are_refused(config, subject):
    """In one sentence that says what there is instead, before anything changes."""
    with h2cache.apply(subject.transformer, H2CacheConfig()) as handle:
        with pytest.raises(ValueError, match='granularity="stage"') as caught:
            h2cache.apply(subject.transformer, config)
        assert str(caught.value).startswith(f"nunchaku's FLUX.1 ({type(subject.transformer).__name__}) ")
        subject.denoise(steps=3)
        assert handle.summary()["steps"] == 3, "the cache before is still at work"


@pytest.mark.parametrize("config", [method for method in STAGED if "stage" in method.id])
def test_modules_are_refused_also_as_a_changed_setting(config, subject):
    with h2cache.apply(subject.transformer, config) as handle:
        expected = subject.denoise()
        with pytest.raises(ValueError, match='granularity="stage"'):
            handle.update(granularity="module")
        assert handle.config == config
        assert torch.equal(subject.denoise(), expected)
