"""What the engine reads from the device, and what it does when the numbers there are no numbers (rules 6 and 7).

Reading a device's value makes the host wait for everything queued there. The calls that would wait are counted here on
the CPU. Timesteps that live on the CPU cost no wait; most tests have them claim to live elsewhere, as in pipelines.
"""

import math

import pytest
import torch
from loops import denoise, position_ids
from methods_under_test import (
    MEASURING,
    METHODS,
    SCHEDULED,
    always_hitting,
    has_clusters,
    measures,
    methods,
    never_hitting,
    runs_first_block,
    warmup_steps,
)
from torch import nn
from waits import MEASURED_NOTHING, ScalarReads, Waits, waits_by_step

import h2cache
from h2cache import CacheConfig, Decision, H2CacheConfig
from h2cache.baselines import BlockCacheConfig, HiCacheConfig


def test_the_counters_count(transformer):
    """What they look for, each once; and the model itself makes the host wait for nothing."""
    functions, scalars = Waits(), ScalarReads()
    number = torch.tensor([1.0])
    with functions, scalars:
        number.tolist(), number.cpu(), number.numpy(), torch.tensor([1], device="cpu")
        number.item(), float(number), bool(number), number.nonzero(), torch.equal(number, number)
        number * 2, number[:1], torch.cat([number, number])
    assert (functions.count, scalars.count) == (4, 5)
    assert waits_by_step(transformer, None)[0] == [0] * 8


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", MEASURING)
def test_one_wait_for_each_decided_stage_and_none_for_others(transformer, timesteps_elsewhere, config, batch):
    """A stage is decided in a call if one of its samples was compared there."""
    waits, handle = waits_by_step(transformer, config, batch=batch)
    for step, count in enumerate(waits):
        rows = [row for row in handle.trace if row.step == step]
        decided = {row.stage for row in rows if row.decision not in MEASURED_NOTHING}
        assert count <= len(decided), f"step {step}: {[str(row.decision) for row in rows]}"
    assert waits[0] == 0
    assert sum(waits) > 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", [*SCHEDULED, HiCacheConfig(interval=3, sigma="auto")])
def test_a_schedule_waits_for_nothing(transformer, timesteps_elsewhere, config, batch):
    """Only a forecast that fits itself reads, once a stage, what the last computed step had to teach: in the first step
    that is skipped after it, and after the first computed step that it could have forecast (step 5 here, since the
    first differences are those of step 2)."""
    waits, handle = waits_by_step(transformer, config, batch=batch, steps=13)
    assert any(row.decision.skips for row in handle.trace)
    learning = [stage for stage in config.compose() if stage.learns]
    assert waits == [len(learning) if step in (6, 9, 12) else 0 for step in range(13)]


@pytest.mark.parametrize("config", METHODS)
def test_what_always_computes_waits_no_more_than_for_its_probes(transformer, timesteps_elsewhere, config):
    """A forecast that is never made need not learn."""
    waits, _ = waits_by_step(transformer, never_hitting(config), steps=8)
    probes = sum(stage.probe is not None for stage in config.compose())
    first = warmup_steps(config)
    assert waits == [0] * first + [probes] * (8 - first)


def test_the_limit_of_hits_in_a_row_decides_without_a_wait(transformer, timesteps_elsewhere):
    waits, handle = waits_by_step(transformer, BlockCacheConfig(threshold=-1), steps=3)
    assert waits == [0, 1, 1]
    config = H2CacheConfig(tau1=math.inf, max_consecutive_hits=1)
    waits, handle = waits_by_step(transformer, config, steps=5)
    assert waits == [0, 1, 0, 1, 0]
    assert [row.decision[0] for row in handle.trace if row.stage == "structure"] == list("whchc")


@pytest.mark.parametrize("batch", [1, 3])
def test_timesteps_on_a_cpu_are_read_where_they_are(transformer, batch):
    """One more read a call, of host memory."""
    waits, _ = waits_by_step(transformer, BlockCacheConfig(threshold=-1), batch=batch, steps=3)
    assert waits == [1, 2, 2]


def test_timesteps_elsewhere_arrive_in_the_trace(transformer, timesteps_elsewhere):
    """In the model's unit, whether they travelled with a decision or were never needed."""
    with h2cache.apply(transformer, H2CacheConfig(warmup_steps=2)) as handle:
        denoise(transformer, steps=4)
    frame = handle.trace.to_pandas()
    assert frame[frame["stage"] == "structure"]["timestep"].tolist() == pytest.approx([1000, 750, 500, 250])
    assert frame[frame["stage"] == "detail"]["timestep"].tolist() == pytest.approx([1000, 750, 500, 250])


def test_timesteps_elsewhere_still_show_where_a_run_begins(transformer, timesteps_elsewhere):
    """A loop that keeps its position ids from run to run: the timestep goes up, so the second run is a new one."""
    config, ids = H2CacheConfig(tau1=0.3, tau2=0.35), position_ids(4, 4)
    with h2cache.apply(transformer, config) as handle:
        first = denoise(transformer, img_ids=ids)
        second = denoise(transformer, img_ids=ids)
    assert torch.equal(first, second)
    assert handle.summary()["runs"] == 2


# Rule 6. All thresholds are infinite here, so that a call computes only where it must: whatever is a number hits.

STEPS = 8


def watched(config: CacheConfig, transformer: nn.Module) -> nn.Module:
    """What the first probe of a method looks at: what leaves this module is what it compares."""
    return transformer.transformer_blocks[0] if runs_first_block(config) else transformer.x_embedder


def poisoned_run(transformer, config, poisoned, value, at, sample=0, batch=1, steps=STEPS):
    """The outputs of calls on nearly the same inputs, and the handle; the image tokens that leave the module `poisoned`
    are `value` at step `at` for one sample. Inputs are given anew at each step, so a later step is what the cache makes
    of it."""
    state, outputs = {"step": 0}, []

    def begin(step, call):
        state["step"] = step
        generator = torch.Generator().manual_seed(1000)
        still = torch.randn(3, 16, transformer.config.in_channels, generator=generator)[:batch]
        call["hidden_states"] = still * (1 + 0.01 * step)

    def poison(module, args, output):
        if state["step"] != at:
            return output
        image = (output if torch.is_tensor(output) else output[1]).clone()
        image[sample] = value
        return image if torch.is_tensor(output) else (output[0], image)

    class Watch:
        """Stands for the transformer in the loop, and keeps what its calls return, also those that nothing runs for."""

        config, device = transformer.config, transformer.device

        def __call__(self, **call):
            outputs.append(transformer(**call)[0])
            return (outputs[-1],)

    hook = poisoned.register_forward_hook(poison)
    try:
        with h2cache.apply(transformer, config) as handle:
            denoise(Watch(), steps=steps, batch=batch, before_step=begin)
    finally:
        hook.remove()
    return outputs, handle


H2_METHODS = [method for method in METHODS if isinstance(method.values[0], H2CacheConfig)]


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("config", MEASURING)
def test_a_first_stage_probe_that_is_no_number_computes_and_spoils_no_other_step(transformer, config, value, at):
    """The first probe is not finite in one step. That step computes, and its image is lost; the next step
    computes, since it has nothing sound to compare with; then hits go on. Warm-up steps (here the first, or the first
    two) compute anyway and are never read, and still must leave nothing behind."""
    config = always_hitting(config)
    outputs, handle = poisoned_run(transformer, config, watched(config, transformer), value, at)
    assert [output.isfinite().all().item() for output in outputs] == [step != at for step in range(STEPS)]
    again = at + 1 + warmup_steps(config)
    for row in handle.trace:
        if row.step == at:
            assert not row.decision.skips
        if row.step >= again:
            assert row.decision.skips, f"step {row.step}"
        assert row.step == at or row.diff is None or math.isfinite(row.diff), "compared with what is no number"


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("config", H2_METHODS)
def test_a_detail_probe_that_is_no_number_spoils_no_other_step(transformer, config, value, at):
    """The same in the second stage alone. Under the hierarchy a sound structure stage forces the detail stage without a
    look, also at the step after the bad one: what it adds there must not be what the bad step left behind."""
    config = always_hitting(config)
    outputs, handle = poisoned_run(transformer, config, transformer.single_transformer_blocks[0], value, at)
    assert [output.isfinite().all().item() for output in outputs] == [step != at for step in range(STEPS)]
    detail = [row for row in handle.trace if row.stage == "detail"]
    assert not detail[at].decision.skips or detail[at].decision is Decision.FORCED
    assert all(row.decision.skips for row in detail[at + 1 + config.warmup_steps :])
    structure = [row.decision.skips for row in handle.trace if row.stage == "structure"]
    assert structure == [step >= config.warmup_steps for step in range(STEPS)]
    assert all(row.diff is None or math.isfinite(row.diff) for row in detail if row.step != at)


@pytest.mark.parametrize("at", [0, 1, 2, 4])
@pytest.mark.parametrize("config", methods(lambda config: not measures(config) and not has_clusters(config)))
def test_what_is_no_number_leaves_a_schedule_s_forecasts(transformer, config, at):
    """A schedule looks at nothing, so it remembers what is not finite in a step that it computes, and forecasts from
    it. Differences reach back over `order + 1` computed steps: so many of them later it is gone. (Clusters write
    forecasts into what is remembered, so that theirs do not recover; it is a lost image, see below.)"""
    outputs, handle = poisoned_run(transformer, config, transformer.x_embedder, math.nan, at, steps=20)
    computed = [row.step for row in handle.trace if row.stage == config.compose()[0].name and not row.decision.skips]
    assert not outputs[at].isfinite().all()
    assert all(outputs[step].isfinite().all() for step in computed if step != at)
    gone = [step for step in computed if step > at][config.compose()[0].forecast.order]
    assert gone < 15 and all(output.isfinite().all() for output in outputs[gone:])


@pytest.mark.parametrize("config", METHODS)
def test_a_bad_run_leaves_the_next_one_alone(transformer, config):
    with h2cache.apply(transformer, config):
        expected = denoise(transformer)

    def spoil(step, call):
        if step == 2:
            call["hidden_states"] = call["hidden_states"] * math.nan

    with h2cache.apply(transformer, config):
        assert denoise(transformer, before_step=spoil).isnan().all()
        assert torch.equal(denoise(transformer), expected)


@pytest.mark.parametrize("at", [0, 1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("config", METHODS)
def test_one_bad_sample_leaves_the_others_alone(transformer, config, value, at):
    config = always_hitting(config)
    first = watched(config, transformer)
    clean, unharmed = poisoned_run(transformer, config, first, value, at=None, batch=3)
    outputs, harmed = poisoned_run(transformer, config, first, value, at=at, sample=1, batch=3)
    for step in range(STEPS):
        for sample in (0, 2):
            torch.testing.assert_close(outputs[step][sample], clean[step][sample], rtol=1e-4, atol=1e-5)

    def others(handle):
        return [(row.step, row.stage, row.sample, row.decision) for row in handle.trace if row.sample != 1]

    assert others(harmed) == others(unharmed)
