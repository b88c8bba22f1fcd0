"""Plans: what they say, what they refuse, and that a run that follows one is the weighted sum written down by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import attentions, blocks_of, denoise, denoising, position_ids
from tiny import TEXT_TOKENS
from torch.utils._python_dispatch import TorchDispatchMode

import h2cache
from h2cache import Decision, Plan, PlanConfig
from h2cache.conditions import Conditions
from h2cache.outputs import weighted

# Eight steps, of which 0, 1, 3 and 6 are computed; weights are of the newest output first.
WEIGHTS = {2: (1.6, -0.6), 4: (1.2, 0.3, -0.5), 5: (1.5, -0.2, -0.3), 7: (1.3, -0.4, 0.1)}
PLAN = Plan(Conditions(steps=8), (0, 1, 3, 6), WEIGHTS)
CALL = dict(height=32, width=32, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS, output_type="latent")


def by_hand(transformer, plan: Plan, **run):
    """The latents of a run in which skipped steps are weighted sums of what the model returned before."""
    outputs, step = [], 0

    def answer(module, args, kwargs):
        nonlocal step
        step += 1
        if step - 1 in plan.computed:
            outputs.insert(0, forward(**kwargs)[0])
            return (outputs[0],)
        return (sum(weight * output for weight, output in zip(plan.weights[step - 1], outputs, strict=False)),)

    forward = transformer.forward
    transformer.forward = lambda **kwargs: answer(transformer, (), kwargs)
    try:
        return denoise(transformer, steps=plan.steps, **run)
    finally:
        del transformer.forward


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_is_what_the_plan_says(transformer, batch):
    with h2cache.apply(transformer, PlanConfig(PLAN)):
        cached = denoise(transformer, steps=8, batch=batch)
    torch.testing.assert_close(cached, by_hand(transformer, PLAN, batch=batch), rtol=1e-4, atol=1e-5)


def test_a_skipped_step_runs_nothing_of_the_model(transformer):
    ran = []
    modules = [transformer.x_embedder, transformer.time_text_embed, transformer.proj_out, *blocks_of(transformer)]
    hooks = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in modules]
    with h2cache.apply(transformer, PlanConfig(PLAN)) as handle:
        counts = []
        for _ in denoising(transformer, steps=8):
            counts.append(len(ran))
            ran.clear()
    for hook in hooks:
        hook.remove()
    assert [step for step, count in enumerate(counts) if count] == [0, 1, 3, 6]
    assert set(counts) == {0, len(modules)}
    assert handle.summary()["computed_fraction"] == 0.5
    decisions = [row.decision for row in handle.trace]
    assert decisions[:4] == [Decision.WARMUP, Decision.COMPUTE, Decision.HIT, Decision.COMPUTE]


class Operations(TorchDispatchMode):
    """The names of the operations that calculate something, in order; views and constants are left out."""

    FREE = ("select", "expand", "view", "slice", "unsqueeze", "unbind", "alias", "detach", "full", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.names += [name] if name not in self.FREE else []
        return operation(*args, **(kwargs or {}))


def test_a_skipped_step_calculates_nothing_and_one_product_makes_the_forecasts_up_to_the_next(transformer):
    steps = []
    with h2cache.apply(transformer, PlanConfig(PLAN)):
        run = denoising(transformer, steps=8)
        for _ in range(8):
            with Operations() as operations:
                next(run)
            steps.append(operations.names)
    of_the_loop = ["sub", "mul", "add"]
    assert [step for step, names in enumerate(steps) if names == of_the_loop] == [2, 4, 5, 7]
    behind_the_model = ["cat", "new_empty", "sub", "addmm", "mul", "add"]
    assert all(steps[step][-6:] == behind_the_model for step in (3, 6))  # before 1 the weights are sent to the device


def test_computing_every_step_changes_no_bit(transformer):
    everything = Plan(Conditions(steps=8), tuple(range(8)), {})
    plain = denoise(transformer, steps=8, batch=2)
    with h2cache.apply(transformer, PlanConfig(everything)):
        assert torch.equal(denoise(transformer, steps=8, batch=2), plain)


def test_each_image_of_a_batch_is_the_image_made_alone(transformer):
    with h2cache.apply(transformer, PlanConfig(PLAN)):
        together = denoise(transformer, steps=8, batch=3)
        for image in range(3):
            alone = denoise(transformer, steps=8, seed=image)
            torch.testing.assert_close(together[image : image + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_branches_of_guidance_have_a_memory_each(tiny_pipe):
    call = dict(CALL, negative_prompt="grey", true_cfg_scale=2.0, num_inference_steps=8)

    def drawn():
        return tiny_pipe("a sign", generator=torch.Generator().manual_seed(0), **call).images

    everything = Plan(Conditions(steps=8), tuple(range(8)), {})
    plain = drawn()
    with h2cache.apply(tiny_pipe, PlanConfig(everything)):
        assert torch.equal(drawn(), plain)
    with h2cache.apply(tiny_pipe, PlanConfig(PLAN)) as handle, attentions(tiny_pipe.transformer) as calls:
        first, again = drawn(), drawn()
    assert torch.equal(first, again) and not torch.equal(first, plain)
    assert {row.context for row in handle.trace} == {"cond", "uncond"}
    assert len(calls) == 2 * 2 * 8 and sum(map(any, calls)) == 2 * 2 * len(PLAN.computed)


def test_what_a_caller_does_to_an_output_is_not_remembered(transformer):
    """Also at steps that repeat the only output there is."""
    plan = Plan(Conditions(steps=4), (0,), {1: (1.0,), 2: (1.0,), 3: (1.0,)})

    def outputs(spoil: bool) -> list[torch.Tensor]:
        kept, ids = [], position_ids(4, 4)
        arguments = dict(
            hidden_states=torch.ones(1, 16, 16),
            encoder_hidden_states=torch.ones(1, 3, 24),
            pooled_projections=torch.ones(1, 16),
            img_ids=ids,
            txt_ids=torch.zeros(3, 3),
            guidance=torch.ones(1),
        )
        for step in range(4):
            time = torch.tensor([1 - step / 4])
            with torch.no_grad():
                output = transformer(**arguments, timestep=time, return_dict=step % 2 == 0)
            kept.append(output[0].clone())
            assert hasattr(output, "sample") == (step % 2 == 0)
            if spoil:
                output[0].mul_(math.nan)
        return kept

    with h2cache.apply(transformer, PlanConfig(plan)):
        clean, spoilt = outputs(spoil=False), outputs(spoil=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))


def test_it_holds_the_last_outputs_and_what_it_forecasts_and_lets_them_go(transformer):
    run = denoising(transformer, steps=8, batch=2)
    with h2cache.apply(transformer, PlanConfig(PLAN)) as handle:
        for _ in range(7):
            next(run)
        output, weights = 2 * 16 * 16 * 4, PLAN.steps * 2 * 4  # images x tokens x channels x float32; two a step
        rotary = 2 * (16 + 6) * 16 * 4  # sines and cosines x tokens x head_dim x float32
        # One step is forecast ahead, the last.
        assert handle.held_bytes() == (PLAN.history + 1) * output + weights + rotary
        run.close()
        assert handle.held_bytes() == 0


def test_a_run_of_another_step_count_names_both(tiny_pipe):
    with h2cache.apply(tiny_pipe, PlanConfig(PLAN)), attentions(tiny_pipe.transformer) as calls:
        with pytest.raises(ValueError, match=r"made for steps 8 and is run with 6.*allow_transfer"):
            tiny_pipe("a sign", num_inference_steps=6, **CALL)
        assert not any(map(any, calls))
        tiny_pipe("a sign", num_inference_steps=8, **CALL)


@pytest.mark.parametrize(
    ("known", "changes", "named"),
    [
        (dict(guidance=3.5), dict(guidance_scale=5.0), "guidance 3.5 and is run with 5.0"),
        (dict(image_tokens=4), dict(width=64), "image tokens 4 and is run with 8"),
        (dict(model="Other 0123"), {}, "model Other 0123 and is run with FluxTransformer2DModel"),
        (dict(scheduler="Other {}"), {}, r"scheduler Other \{\} and is run with FlowMatchEuler.*\"shift\": 3.0"),
    ],
)
def test_a_run_under_other_conditions_is_refused_unless_allowed(tiny_pipe, known, changes, named):
    plan = replace(PLAN, made_for=replace(PLAN.made_for, **known))
    call = dict(CALL, num_inference_steps=8) | changes
    with h2cache.apply(tiny_pipe, PlanConfig(plan)), pytest.raises(ValueError, match=named):
        tiny_pipe("a sign", **call)
    with h2cache.apply(tiny_pipe, PlanConfig(plan, allow_transfer=True)) as handle:
        tiny_pipe("a sign", **call)
    assert handle.summary()["computed_fraction"] == 0.5


@pytest.mark.parametrize("steps", [1, 3, 5, 16, 21])
def test_an_allowed_run_of_other_steps_follows_the_resampled_plan(tiny_pipe, steps):
    def drawn(plan):
        with h2cache.apply(tiny_pipe, PlanConfig(plan, allow_transfer=True)):
            noise = torch.Generator().manual_seed(0)
            return tiny_pipe("a sign", generator=noise, num_inference_steps=steps, **CALL).images

    assert torch.equal(drawn(PLAN), drawn(PLAN.resampled(steps)))


def test_a_transformer_on_its_own_refuses_the_step_after_the_plan(transformer):
    with h2cache.apply(transformer, PlanConfig(PLAN)), pytest.raises(ValueError, match="made for steps 8"):
        denoise(transformer, steps=9)
    with h2cache.apply(transformer, PlanConfig(PLAN, allow_transfer=True)) as handle:
        denoise(transformer, steps=10)
    assert [row.step for row in handle.trace if not row.decision.skips] == [0, 1, 3, 6, 8, 9]


def test_the_pipeline_is_asked_only_while_it_runs(tiny_pipe, transformer):
    """Another pipeline, or a loop, may share the transformer: what this pipeline did last is not its business."""
    tiny_pipe("a sign", num_inference_steps=2, **CALL)
    with h2cache.apply(tiny_pipe, PlanConfig(PLAN)) as handle:
        denoise(tiny_pipe.transformer, steps=8)
    assert handle.summary()["computed_fraction"] == 0.5


def test_another_plan_in_the_middle_of_a_run_begins_afresh(transformer):
    """Its weights are for outputs of steps that it would have computed itself."""
    other = Plan(Conditions(steps=8), (0, 2), {step: (1.0,) for step in (1, 3, 4, 5, 6, 7)})
    with h2cache.apply(transformer, PlanConfig(PLAN)) as handle:
        for step, _ in enumerate(denoising(transformer, steps=8)):
            if step == 3:
                handle.update(plan=other)
    assert [row.step for row in handle.trace] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [row.step for row in handle.trace if not row.decision.skips] == [0, 1, 3, 0, 2]


def test_a_plan_is_a_small_file_that_reads_back_equal(tmp_path):
    made_for = Conditions("Flux 0123", "Euler {}", 8, 3.5, 64)
    plan = Plan(made_for, PLAN.computed, WEIGHTS, {"psnr": 45.0})
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.notes == {"psnr": 45.0} and hash(loaded) == hash(plan)
    assert PlanConfig(tmp_path / "plan.json") == PlanConfig(plan)
    assert json.loads((tmp_path / "plan.json").read_text())["made_for"]["steps"] == 8


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "made_for": {"colour": 1}}'])
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    (tmp_path / "no.json").write_text(text)
    with pytest.raises(ValueError, match=r"no\.json"):
        Plan.load(tmp_path / "no.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(computed=(1, 3, 6)), "computed"),
        (dict(computed=(0, 3, 1, 6)), "computed"),
        (dict(computed=(0, 1, 3, 8)), "computed"),
        (dict(weights={2: (1.0,)}), "weights is for steps"),
        (dict(weights={**WEIGHTS, 2: (0.5, 0.25)}), "sum to one"),
        (dict(weights={**WEIGHTS, 2: (1.0, 1.0, -1.0)}), "1 to 2 finite numbers"),
        (dict(weights={**WEIGHTS, 2: (math.nan, 1.0)}), "finite"),
        (dict(made_for=Conditions()), "steps"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **changes)


def test_a_config_needs_a_plan():
    with pytest.raises(ValueError, match="plan"):
        PlanConfig(3)
    with pytest.raises(ValueError, match=r"nowhere\.json.*No such file"):
        PlanConfig("nowhere.json")
    with pytest.raises(ValueError, match="allow_transfer"):
        PlanConfig(PLAN, allow_transfer=1)


def test_resampling_to_the_same_steps_changes_nothing():
    assert PLAN.resampled(8) == PLAN


def test_resampling_keeps_parts_of_the_run_and_interpolates_weights():
    twice = PLAN.resampled(16)
    assert twice.computed == (0, 2, 6, 12) and twice.steps == 16
    assert twice.weights[1] == (1.0,)  # there is one output to repeat
    assert twice.weights[3] == pytest.approx((1.3, -0.3))  # between the computed step and the fitted (1.6, -0.6)
    assert twice.weights[4] == WEIGHTS[2] and twice.weights[10] == pytest.approx(WEIGHTS[5])
    assert twice.weights[9] == pytest.approx((1.35, 0.05, -0.4))  # the mean of steps 4 and 5
    assert PLAN.resampled(4).computed == (0, 2, 3)


def test_resampling_carries_a_change_on_where_nothing_was_fitted():
    plan = Plan(Conditions(steps=4), (0, 1, 2, 3), {})
    assert plan.resampled(8).weights[3] == (1.5, -0.5)


@given(st.integers(1, 40))
def test_resampling_gives_a_valid_plan_for_any_number_of_steps(steps):
    assert PLAN.resampled(steps).steps == steps


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@given(changes=st.lists(st.floats(-3, 3), min_size=3, max_size=3), known=st.integers(1, 4))
def test_forecasts_are_weighted_sums_of_the_outputs_there_are(dtype, changes, known):
    history = torch.randn(known, 2, 3, 5, dtype=dtype)
    rows = torch.tensor([changes, [0.0, 0.0, 0.0]], dtype=dtype)
    weights = [1 - sum(changes[: known - 1]), *changes[: known - 1]]
    made = weighted(history, rows)
    expected = sum(weight * output for weight, output in zip(weights, history, strict=True))
    torch.testing.assert_close(made[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(made[1], history[0]) and made.dtype == dtype
