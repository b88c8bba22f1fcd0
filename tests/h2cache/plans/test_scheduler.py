"""A plan as a scheduler: a run is the weighted sum written down by hand, and pipelines find what they expect."""

import copy
import json
import math

import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from plans import PLAN, plans

from h2cache import Plan, PlanScheduler
from h2cache.plans.conditions import Conditions, described
from h2cache.plans.plan import normalized

EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
EVERYTHING = Plan(Conditions(steps=8), tuple(range(8)), {})
SHAPE = (2, 5, 3)


def velocity(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A model's output, which is not linear in anything."""
    return torch.sin(3 * sample) + sample * (timestep.to(sample.dtype) / 1000).square()


def noise(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(scheduler, sample: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """The pipelines' loop, over the entries of `timesteps` from `start` to `stop`."""
    if not start:
        scheduler.set_begin_index(0)  # else the first timestep says where the run starts
    for timestep in scheduler.timesteps[start:stop]:
        sample = scheduler.step(velocity(sample, timestep), timestep, sample, return_dict=False)[0]
    return sample


def drawn(plan: Plan, sample: torch.Tensor, base=EULER, **options) -> torch.Tensor:
    scheduler = PlanScheduler(plan, base)
    scheduler.set_timesteps(plan.steps)
    return run(scheduler, sample, **options)


def by_hand(plan: Plan, sample: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Every step of the run from the computed step number `start` on, one after another, in double precision."""
    base = copy.deepcopy(EULER)
    base.set_timesteps(plan.steps)
    sample, outputs = sample.double(), []
    for step in range(plan.computed[start], plan.steps):
        if step in plan.computed:
            outputs.insert(0, velocity(sample, base.timesteps[step]))
        weights = normalized(plan.weights.get(step, (1.0,))[: len(outputs)])
        output = sum(weight * output for weight, output in zip(weights, outputs, strict=False))
        sample = sample + (base.sigmas[step + 1] - base.sigmas[step]).double() * output
    return sample


@given(plan=plans())
def test_a_run_is_what_the_plan_says(plan):
    sample = noise()
    torch.testing.assert_close(drawn(plan, sample), by_hand(plan, sample).float(), rtol=1e-4, atol=1e-5)


@given(plan=plans(), part=st.floats(0, 0.99))
def test_a_run_may_start_in_the_middle(plan, part):
    """As image-to-image does. Weights of outputs that were never computed fall on the newest."""
    start, sample = int(part * len(plan.computed)), noise()
    expected = by_hand(plan, sample, start).float()
    torch.testing.assert_close(drawn(plan, sample, start=start), expected, rtol=1e-4, atol=1e-5)


@given(plan=plans())
def test_each_image_of_a_batch_is_the_image_made_alone(plan):
    sample = noise()
    alone = [drawn(plan, image) for image in sample.split(1)]
    assert torch.equal(drawn(plan, sample), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "base", [EULER, FlowMatchEulerDiscreteScheduler(invert_sigmas=True)], ids=["falling", "rising"]
)
def test_computing_every_step_changes_no_bit(base, dtype):
    plain = copy.deepcopy(base)
    plain.set_timesteps(8)
    assert torch.equal(drawn(EVERYTHING, noise(dtype), base), run(plain, noise(dtype)))


def test_the_sum_is_made_in_float32_and_rounded_once():
    """One computed step and all others behind it: the start, moved once by the whole of the noise."""
    plan = Plan(Conditions(steps=50), (0,), {step: (1.0,) for step in range(1, 50)})
    sample = noise(torch.bfloat16)
    expected = sample.float() - velocity(sample, torch.tensor(1000.0)).float()
    assert torch.equal(drawn(plan, sample), expected.bfloat16())


@pytest.mark.parametrize("plan", [PLAN, EVERYTHING], ids=["plan", "everything"])
def test_the_result_has_the_dtype_of_the_sample(plan):
    scheduler = PlanScheduler(plan, EULER)
    scheduler.set_timesteps(8)
    output = velocity(noise(), scheduler.timesteps[0]).bfloat16()
    assert scheduler.step(output, scheduler.timesteps[0], noise()).prev_sample.dtype is torch.float32


def test_only_computed_steps_are_in_the_loop():
    scheduler, base = PlanScheduler(PLAN, EULER), copy.deepcopy(EULER)
    scheduler.set_timesteps(8)
    base.set_timesteps(8)
    assert torch.equal(scheduler.timesteps, base.timesteps[[0, 1, 3, 6]])
    assert torch.equal(scheduler.sigmas, base.sigmas[[0, 1, 3, 6, 8]])
    assert (scheduler.num_inference_steps, scheduler.order, scheduler.init_noise_sigma) == (8, 1, 1.0)
    assert scheduler.begin_index is scheduler.step_index is None
    run(scheduler, noise(), stop=2)
    assert (scheduler.begin_index, scheduler.step_index) == (0, 2)
    assert scheduler.index_for_timestep(base.timesteps[6]) == 3


def test_a_begin_index_says_where_the_run_starts():
    scheduler, sample = PlanScheduler(PLAN, EULER), noise()
    sigmas = PlanScheduler(EVERYTHING, FlowMatchEulerDiscreteScheduler())
    sigmas.set_timesteps(8)
    scheduler.set_timesteps(sigmas=sigmas.sigmas[:8].tolist())
    scheduler.set_begin_index(2)
    for timestep in scheduler.timesteps[2:]:
        sample = scheduler.step(velocity(sample, timestep), timestep, sample).prev_sample
    assert (scheduler.begin_index, scheduler.step_index) == (2, 4)
    by_timestep = PlanScheduler(PLAN, EULER)
    by_timestep.set_timesteps(sigmas=sigmas.sigmas[:8].tolist())
    assert torch.equal(sample, run(by_timestep, noise(), start=2))


@pytest.mark.parametrize(
    "request_",
    [
        dict(num_inference_steps=8, mu=0.8),
        dict(sigmas=[1 - step / 8 for step in range(8)], mu=0.6),
        dict(timesteps=[1000 - 120 * step for step in range(8)], sigmas=[1 - step / 8 for step in range(8)], mu=0.6),
    ],
    ids=lambda request: "-".join(request),
)
def test_the_base_makes_the_timesteps(request_):
    base = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler = PlanScheduler(PLAN, base)
    scheduler.set_timesteps(**request_)
    base.set_timesteps(**request_)
    assert torch.equal(scheduler.timesteps, base.timesteps[[0, 1, 3, 6]])
    assert torch.equal(scheduler.sigmas, base.sigmas[[0, 1, 3, 6, 8]])


def test_a_changed_shift_is_the_base_s():
    base = FlowMatchEulerDiscreteScheduler(shift=1.0)
    base.set_shift(3.0)
    scheduler, late = PlanScheduler(PLAN, base), PlanScheduler(PLAN)
    late.set_shift(3.0)
    base.set_timesteps(8)
    for each in (scheduler, late):
        each.set_timesteps(8)
        assert torch.equal(each.sigmas, base.sigmas[[0, 1, 3, 6, 8]])


def test_a_whole_run_reads_nothing_from_the_device():
    """On the meta device there is nothing to read."""
    scheduler = PlanScheduler(PLAN, EULER)
    scheduler.set_timesteps(8, device="meta")
    scheduler.set_begin_index(0)
    sample = torch.empty(SHAPE, device="meta")
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.empty(SHAPE, device="meta"), timestep, sample).prev_sample
    assert sample.is_meta and sample.shape == SHAPE
    assert scheduler.timesteps.is_meta and scheduler.sigmas.is_meta


def test_it_holds_the_outputs_that_the_next_sum_needs_and_lets_them_go():
    scheduler, sample = PlanScheduler(PLAN, EULER), noise(torch.bfloat16)
    scheduler.set_timesteps(8)
    held = []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(sample, timestep), timestep, sample).prev_sample
        held.append(scheduler.held_bytes() / (sample.nbytes))
    assert held == [1, 2, PLAN.history - 1, 0]


def test_what_a_caller_does_to_an_output_is_not_remembered():
    expected = drawn(PLAN, noise())
    scheduler, sample = PlanScheduler(PLAN, EULER), noise()
    scheduler.set_timesteps(8)
    for timestep in scheduler.timesteps:
        output = velocity(sample, timestep)
        sample = scheduler.step(output, timestep, sample).prev_sample
        output.fill_(math.nan)
    assert torch.equal(sample, expected)


@pytest.mark.parametrize("plan", [PLAN, EVERYTHING], ids=["plan", "everything"])
def test_what_is_given_is_not_written_to(plan):
    scheduler, sample = PlanScheduler(plan, EULER), noise()
    scheduler.set_timesteps(8)
    output = velocity(sample, scheduler.timesteps[0])
    kept = output.clone()
    scheduler.step(output, scheduler.timesteps[0], sample)
    assert torch.equal(sample, noise()) and torch.equal(output, kept)


def test_the_next_run_knows_nothing_of_one_that_broke_off():
    expected = drawn(PLAN, noise())
    scheduler = PlanScheduler(PLAN, EULER)
    scheduler.set_timesteps(8)
    run(scheduler, 5 * noise(), stop=3)
    assert scheduler.held_bytes() > 0
    scheduler.set_timesteps(8)
    assert scheduler.held_bytes() == 0
    assert torch.equal(run(scheduler, noise()), expected)


def test_a_step_that_fails_may_be_made_again():
    scheduler, sample = PlanScheduler(PLAN, EULER), noise()
    scheduler.set_timesteps(8)
    sample = run(scheduler, sample, stop=2)
    timestep = scheduler.timesteps[2]
    with pytest.raises(RuntimeError):
        scheduler.step(torch.zeros(7), timestep, sample)
    for timestep in scheduler.timesteps[2:]:
        sample = scheduler.step(velocity(sample, timestep), timestep, sample).prev_sample
    assert torch.equal(sample, drawn(PLAN, noise()))


def test_gradients_flow_through_all_outputs():
    """As through any solver: doubling the model's outputs changes the result as the gradient says."""
    factor = torch.ones((), dtype=torch.float32, requires_grad=True)
    scheduler, sample = PlanScheduler(PLAN, EULER), noise()
    scheduler.set_timesteps(8)
    for timestep in scheduler.timesteps:
        output = factor * velocity(noise(), timestep)  # not of the sample, so that the result is linear in the factor
        sample = scheduler.step(output, timestep, sample).prev_sample
    sample.sum().backward()
    assert factor.grad.item() == pytest.approx((sample - noise()).sum().item(), rel=1e-4)


def test_steps_come_between_set_timesteps_and_the_end():
    scheduler = PlanScheduler(PLAN, EULER)
    with pytest.raises(ValueError, match="call set_timesteps before"):
        scheduler.step(noise(), torch.tensor(1000.0), noise())
    scheduler.set_timesteps(8)
    run(scheduler, noise())
    with pytest.raises(ValueError, match="run of 4 timesteps is over"):
        scheduler.step(noise(), scheduler.timesteps[-1], noise())


@pytest.mark.parametrize("where", ["before", "during", "after", "by timestep"])
def test_noise_is_added_as_the_base_adds_it(where):
    """Image-to-image adds it before the first step, inpainting after each, training at any timestep."""
    scheduler, base = PlanScheduler(PLAN, EULER), copy.deepcopy(EULER)
    scheduler.set_timesteps(sigmas=[1 - step / 8 for step in range(8)])
    base.timesteps, base.sigmas = scheduler.timesteps, scheduler.sigmas
    for each in (scheduler, base):
        if where != "by timestep":
            each.set_begin_index(1)
        for timestep in each.timesteps[1 : {"during": 3, "after": 4}.get(where, 1)]:
            each.step(velocity(noise(), timestep), timestep, noise())
    timestep = scheduler.timesteps[1].repeat(2)
    clean = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    noisy = [each.scale_noise(clean, timestep, noise()) for each in (scheduler, base)]
    assert torch.equal(*noisy)


def test_a_caller_that_counts_steps_is_told_that_timesteps_are_fewer():
    """Pipelines for image-to-image find their start by the number of steps that they asked for, or by the length of
    `timesteps` where they gave the noise levels."""
    scheduler = PlanScheduler(PLAN, EULER)
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    with pytest.raises(ValueError, match=r"counts 8 steps and starts at step 3.*leaves 4 timesteps.*sigmas="):
        scheduler.set_begin_index(3)
    scheduler.set_timesteps(sigmas=[1 - step / 8 for step in range(8)])
    scheduler.set_begin_index(3)
    everything = PlanScheduler(EVERYTHING, EULER)
    everything.set_timesteps(8)
    everything.set_begin_index(3)


@pytest.mark.parametrize(
    ("known", "request_", "named"),
    [
        ({}, dict(num_inference_steps=6), "steps 8 and is run with 6"),
        (dict(scheduler="Other {}"), {}, r'scheduler Other \{\} and is run with FlowMatchEuler.*"shift": 3.0'),
        (dict(sigmas=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1)), {}, "sigma 0.7 at step 3 and is run with 0.8"),
    ],
)
def test_a_run_under_other_conditions_is_refused_unless_allowed(known, request_, named):
    plan = Plan(Conditions(**dict(steps=8) | known), PLAN.computed, PLAN.weights)
    request = dict(num_inference_steps=8) | request_
    scheduler = PlanScheduler(plan, EULER)
    with pytest.raises(ValueError, match=f"made for {named}.*allow_transfer"):
        scheduler.set_timesteps(**request)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(noise(), torch.tensor(1000.0), noise())
    allowed = PlanScheduler(plan, EULER, allow_transfer=True)
    allowed.set_timesteps(**request)
    assert len(allowed.timesteps) == len(PLAN.resampled(request["num_inference_steps"]).computed)


def test_nothing_steps_on_after_a_refusal():
    """With the noise levels of the run before."""
    scheduler = PlanScheduler(PLAN, EULER)
    scheduler.set_timesteps(8)
    run(scheduler, noise(), stop=1)
    with pytest.raises(ValueError, match="run with 6"):
        scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="call set_timesteps before"):
        scheduler.step(noise(), scheduler.timesteps[0], noise())


def test_another_resolution_is_refused_at_the_first_step():
    plan = Plan(Conditions(steps=8, image_tokens=7), PLAN.computed, PLAN.weights)
    scheduler = PlanScheduler(plan, EULER)
    scheduler.set_timesteps(8)
    with pytest.raises(ValueError, match="image tokens 7 and is run with 5"):
        run(scheduler, noise())


@pytest.mark.parametrize("steps", [1, 3, 5, 16, 21])
def test_an_allowed_run_of_other_steps_follows_the_resampled_plan(steps):
    scheduler = PlanScheduler(PLAN, EULER, allow_transfer=True)
    scheduler.set_timesteps(steps)
    assert torch.equal(run(scheduler, noise()), drawn(PLAN.resampled(steps), noise()))
    scheduler.set_timesteps(8)
    assert torch.equal(run(scheduler, noise()), drawn(PLAN, noise()))


@pytest.mark.parametrize("base", [HeunDiscreteScheduler(), EulerAncestralDiscreteScheduler()])
def test_other_schedulers_are_refused(base):
    with pytest.raises(TypeError, match=f"UniPCMultistepScheduler, not of {type(base).__name__}"):
        PlanScheduler(PLAN, base)
    for config in (base.config, {**base.config, "_class_name": type(base).__name__}):  # as made, as loaded
        with pytest.raises(TypeError, match=f"not of (another scheduler|{type(base).__name__})"):
            PlanScheduler.from_config(config, plan=PLAN)


def test_a_scheduler_that_adds_noise_is_refused():
    with pytest.raises(ValueError, match="stochastic_sampling"):
        PlanScheduler(PLAN, FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


def test_it_is_made_from_another_scheduler_s_config_and_says_what_that_says():
    scheduler = PlanScheduler.from_config(EULER.config, plan=PLAN, allow_transfer=True)
    assert scheduler.plan == PLAN and scheduler.allow_transfer and len(scheduler) == len(EULER)
    assert described(scheduler.base) == described(EULER)
    settings = {name: value for name, value in EULER.config.items() if not name.startswith("_")}
    assert settings.items() <= dict(scheduler.config).items()
    with pytest.raises(TypeError, match="no plan"):
        PlanScheduler.from_config(EULER.config)


def test_it_is_saved_and_loaded_with_its_plan(tmp_path):
    scheduler = PlanScheduler(PLAN, EULER, allow_transfer=True)
    scheduler.save_pretrained(tmp_path)
    loaded = PlanScheduler.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["plan"]["computed"] == [0, 1, 3, 6]
    again = PlanScheduler.from_config(loaded.config, allow_transfer=False)
    assert (loaded.plan, loaded.allow_transfer, again.allow_transfer) == (PLAN, True, False)
    for each in (loaded, again):
        each.set_timesteps(8)
        assert torch.equal(run(each, noise()), drawn(PLAN, noise()))


def test_a_pipeline_is_saved_and_loaded_with_it(tiny_pipe, tmp_path):
    scheduler = tiny_pipe.scheduler
    try:
        tiny_pipe.scheduler = PlanScheduler(PLAN, scheduler)
        tiny_pipe.save_pretrained(tmp_path)
    finally:
        tiny_pipe.scheduler = scheduler
    loaded = FluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(loaded.scheduler, PlanScheduler) and loaded.scheduler.plan == PLAN
    assert described(loaded.scheduler.base) == described(scheduler)


def test_a_plan_may_be_given_by_its_file_and_a_base_by_a_scheduler_with_a_plan(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    first = PlanScheduler(tmp_path / "plan.json", EULER)
    assert first.plan == PLAN
    second = PlanScheduler(EVERYTHING, first)
    assert second.plan == EVERYTHING and described(second.base) == described(EULER)


def test_a_copy_goes_its_own_way():
    """Some pipelines copy their scheduler for a second modality; nobody is told of that one's steps."""

    class Watcher:
        told = 0

        def conditions(self):
            return Conditions()

        def note(self, *_):
            self.told += 1

    scheduler = PlanScheduler(PLAN, EULER)
    scheduler.watcher = watcher = Watcher()
    scheduler.set_timesteps(8)
    half = run(scheduler, noise(), stop=2)
    other = copy.deepcopy(scheduler)
    other.set_timesteps(8)
    assert torch.equal(run(other, noise()), drawn(PLAN, noise()))
    assert watcher.told == 2 and scheduler.watcher is watcher
    for timestep in scheduler.timesteps[2:]:
        half = scheduler.step(velocity(half, timestep), timestep, half).prev_sample
    assert torch.equal(half, drawn(PLAN, noise()))
