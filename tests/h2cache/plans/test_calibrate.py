"""Calibration: what it fits, how it searches, and that its plan does what it simulated."""

from contextlib import contextmanager

import pytest
import torch
from loops import attentions
from plans import PLAN
from tiny import TEXT_TOKENS

import h2cache
from h2cache import H2CacheConfig, Plan, PlanConfig
from h2cache.plans import Calibration, record
from h2cache.plans.search import climb, neighbours
from h2cache.plans.simulate import Simulation
from h2cache.plans.weights import fit_weights

CALL = dict(height=32, width=64, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS)
PROMPTS = ["a red sign", "TEA", "a blue label"]
QUICK = dict(tries=8, few=2, rounds=3, batch_size=2)
STEPS = 9


def calibrated(pipe, budget=3, **changes):
    return h2cache.calibrate(pipe, PROMPTS, budget, STEPS, **{**QUICK, **CALL, **changes})


@pytest.fixture(scope="module")
def plan(_shared_tiny_pipe):
    """What a calibration for a budget of 3 gives, made once."""
    return calibrated(_shared_tiny_pipe)


def test_the_budget_is_kept_and_the_conditions_are_noted(tiny_pipe, plan):
    tiny_pipe("", num_inference_steps=STEPS, output_type="latent", **CALL)  # sets the scheduler's sigmas
    assert len(plan.computed) == 3 and plan.computed[0] == 0 and plan.history <= 3
    made_for = plan.made_for
    assert (made_for.steps, made_for.guidance, made_for.image_tokens) == (STEPS, 3.5, 8)
    assert made_for.model.startswith("FluxTransformer2DModel") and '"shift": 3.0' in made_for.scheduler
    assert made_for.sigmas == pytest.approx(tiny_pipe.scheduler.sigmas[:-1].tolist(), rel=1e-3)
    assert all(sigma == float(f"{sigma:.6g}") for sigma in made_for.sigmas), "more digits than a file needs"
    assert len(calibrated(tiny_pipe, budget=2.4).computed) == 3  # of 9 steps at most 3.75


def test_its_plan_is_followed_in_the_pipeline_as_it_was_simulated(tiny_pipe, plan):
    """The same final latents, and no complaint about the conditions."""
    runs = record(tiny_pipe, PROMPTS, STEPS, seed=0, batch_size=3, **CALL)
    with h2cache.apply(tiny_pipe, PlanConfig(plan)):
        noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
        drawn = tiny_pipe(PROMPTS, generator=noise, num_inference_steps=STEPS, output_type="latent", **CALL).images
    simulated = Simulation(runs, history=3, ridge=1e-4).follow(plan).latents
    torch.testing.assert_close(drawn, simulated, rtol=1e-3, atol=1e-3)
    assert plan.notes["psnr"] == pytest.approx(runs.decibels(drawn).mean().item(), abs=0.05)


def test_towards_the_converged_solution_it_is_nearer_to_that(tiny_pipe, plan):
    """Where twice as many steps of a better solver lead; the other plan is nearer to the run of these steps."""
    plans = {"uncached": plan, "converged": calibrated(tiny_pipe, reference="converged")}
    assert plans["converged"].notes["reference"] == "converged"
    ends = {}
    for name, parts in (("uncached", 1), ("converged", 2)):
        runs = record(tiny_pipe, PROMPTS, STEPS, seed=0, batch_size=3, parts=parts, **CALL)
        ends[name] = runs.latents[-1]
    noise = {name: [torch.Generator().manual_seed(seed) for seed in range(3)] for name in plans}

    def distance(plan: str, target: str) -> float:
        with h2cache.apply(tiny_pipe, PlanConfig(plans[plan])):
            made = tiny_pipe(
                PROMPTS, generator=noise[plan], num_inference_steps=STEPS, output_type="latent", **CALL
            ).images
        noise[plan] = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return (made - ends[target]).norm().item()

    assert distance("converged", "converged") < distance("uncached", "converged")
    assert distance("uncached", "uncached") < distance("converged", "uncached")
    assert not torch.equal(ends["uncached"], ends["converged"])


def test_another_seed_gives_another_plan(tiny_pipe, plan):
    assert calibrated(tiny_pipe, seed=1).weights != plan.weights


def test_the_same_seed_gives_the_same_plan_and_progress_counts_up(tiny_pipe, plan):
    """The best never falls, and the pipeline is left as it was."""
    before = dict(vars(tiny_pipe.transformer)), len(tiny_pipe.transformer._forward_hooks)
    told = []
    assert calibrated(tiny_pipe, on_progress=lambda *news: told.append(news)) == plan
    assert (dict(vars(tiny_pipe.transformer)), len(tiny_pipe.transformer._forward_hooks)) == before
    done, totals, best = zip(*told, strict=True)
    assert done == tuple(range(1, len(told) + 1)) and len(set(totals)) == 1
    assert done[-1] <= totals[0] == 1 + QUICK["tries"]
    assert list(best) == sorted(best)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(budget=0.5), "budget"),
        (dict(budget=STEPS + 1), "budget"),
        (dict(history=0), "history"),
        (dict(tries=-1), "tries"),
        (dict(batch_size=0), "batch_size"),
        (dict(reference="truth"), "uncached, converged"),
        (dict(few=0), "few"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(tiny_pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        calibrated(tiny_pipe, **changes)


def test_a_pipeline_with_a_cache_or_a_plan_is_refused(tiny_pipe):
    for config in (H2CacheConfig(), PlanConfig(PLAN)):
        with h2cache.apply(tiny_pipe, config), pytest.raises(ValueError, match="uncached"):
            calibrated(tiny_pipe)


def test_recording_is_the_pipeline_s_own_run(tiny_pipe):
    """In batches of two and one; a step of the simulation is a step of the scheduler."""
    runs = record(tiny_pipe, PROMPTS, STEPS, seed=5, batch_size=2, **CALL)
    noise = [torch.Generator().manual_seed(5 + i) for i in range(3)]
    images = tiny_pipe(PROMPTS, generator=noise, num_inference_steps=STEPS, output_type="pt", **CALL).images
    torch.testing.assert_close(runs.images, images, rtol=1e-3, atol=1e-3)
    for step in range(STEPS):
        output = runs.compute(step, runs.latents[step])
        reached = runs.advance(step, runs.latents[step], output)
        torch.testing.assert_close(reached, runs.latents[step + 1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(runs.needed(step, runs.latents[step]), output, rtol=1e-2, atol=1e-2)
    # From anywhere, the needed output leads back onto the uncached trajectory.
    astray = runs.latents[4] + 0.3 * runs.latents[0]
    torch.testing.assert_close(runs.advance(4, astray, runs.needed(4, astray)), runs.latents[5], rtol=1e-3, atol=1e-4)
    assert torch.equal(runs.first(1).latents[3], runs.latents[3][:1])


def test_a_schedule_that_shares_its_beginning_is_run_on_from_there(tiny_pipe):
    runs = record(tiny_pipe, PROMPTS, STEPS, seed=0, batch_size=3, **CALL)
    simulation = Simulation(runs, history=3, ridge=1e-4)
    simulation.run((0, 1, 4, 7))
    with attentions(tiny_pipe.transformer) as calls:
        end = simulation.run((0, 1, 4, 8))
    assert len(calls) == 1  # step 8
    fresh = Simulation(runs, history=3, ridge=1e-4).run((0, 1, 4, 8))
    assert torch.equal(end.latents, fresh.latents) and end.weights == fresh.weights


def test_computing_everything_is_the_uncached_run(tiny_pipe):
    runs = record(tiny_pipe, PROMPTS, STEPS, seed=0, batch_size=3, **CALL)
    end = Simulation(runs, history=3, ridge=1e-4).run(tuple(range(STEPS)))
    torch.testing.assert_close(end.latents, runs.latents[-1], rtol=1e-3, atol=1e-4)


def test_fitted_weights_find_the_combination_and_sum_to_one():
    noise = torch.Generator().manual_seed(0)
    history = [torch.randn(2, 9, generator=noise) for _ in range(3)]
    target = 1.5 * history[0] - 0.75 * history[1] + 0.25 * history[2]
    assert fit_weights(history, target, ridge=0) == pytest.approx((1.5, -0.75, 0.25), abs=1e-5)
    assert fit_weights(history[:1], target, ridge=0) == (1.0,)
    assert sum(fit_weights(history, torch.randn(2, 9, generator=noise), ridge=0.1)) == pytest.approx(1)


def test_a_prompt_that_went_astray_does_not_bend_the_weights_of_the_others():
    """Four prompts that one combination serves but for a little noise, and one that is far off whatever is done."""
    noise = torch.Generator().manual_seed(0)
    history = [torch.randn(5, 400, generator=noise) for _ in range(3)]
    target = 1.5 * history[0] - 0.75 * history[1] + 0.25 * history[2] + 0.01 * torch.randn(5, 400, generator=noise)
    target[4] = 20 * history[2][4]
    weights = fit_weights(history, target, ridge=0)
    assert weights == pytest.approx((1.5, -0.75, 0.25), abs=0.05)
    changes = torch.stack([(output - history[0]).flatten() for output in history[1:]], dim=1)
    squares = torch.linalg.lstsq(changes, (target - history[0]).flatten()).solution
    assert abs(squares[1] - 0.25) > 1


def test_the_ridge_keeps_weights_of_like_outputs_small():
    base, change, little, target = torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(0))
    history = [base, base + change, base + change + 1e-4 * little]
    wild, tame = (fit_weights(history, target, ridge) for ridge in (0, 1e-2))
    assert max(map(abs, tame)) < 10 < max(map(abs, wild))
    same = [base, base, base]
    assert sum(fit_weights(same, base + change, ridge=1e-4)) == pytest.approx(1)


def distance(wanted):
    """A score that is best at `wanted`."""
    return lambda computed: -sum(abs(a - b) for a, b in zip(computed, wanted, strict=True))


def test_climbing_reaches_the_top_where_there_is_one():
    wanted = (0, 2, 9, 17)
    assert climb((0, 5, 10, 15), 20, distance(wanted), lambda each: 0, 1000) == wanted
    asked = []
    climb((0, 5, 10, 15), 20, lambda each: asked.append(each) or 0, lambda each: 0, 3)
    assert len(asked) == 4  # the start, and three neighbours


def test_the_cheapest_neighbours_are_tried_first():
    asked = []
    score = lambda each: asked.append(each) or distance((0, 5, 10, 17))(each)  # noqa: E731
    climb((0, 5, 10, 15), 20, score, lambda each: -each[-1], 1)
    assert asked == [(0, 5, 10, 15), (0, 5, 10, 16)]


def test_neighbours_stay_schedules():
    assert set(neighbours((0, 1, 3), 4)) == {(0, 2, 3), (0, 1, 2)}
    assert neighbours((0,), 4) == []


def test_fitted_weights_are_those_of_the_run_that_fits_them(tiny_pipe):
    """Without a polish, following the plan ends where fitting it ended."""
    plan = calibrated(tiny_pipe, rounds=0)
    runs = record(tiny_pipe, PROMPTS, STEPS, seed=0, batch_size=3, **CALL)
    fitted = Simulation(runs, history=3, ridge=1e-4).run(plan.computed)
    assert {step: pytest.approx(weights, rel=1e-4) for step, weights in plan.weights.items()} == fitted.weights
    followed = Simulation(runs, history=3, ridge=1e-4).follow(plan)
    torch.testing.assert_close(followed.latents, fitted.latents, rtol=1e-3, atol=1e-4)


def test_one_recording_serves_every_budget(tiny_pipe, plan):
    """Each plan is that of a calibration of its own, and costs what was said beforehand."""
    calibration = Calibration(tiny_pipe, PROMPTS, STEPS, **{**QUICK, **CALL})
    for budget, own in ((9, None), (3, plan)):
        with evaluations(tiny_pipe.transformer) as counted:
            made = calibration.plan(budget)
        assert made == (own or calibrated(tiny_pipe, budget=budget))
        assert sum(counted) <= calibration.evaluations(budget)
    assert calibration.recording == len(PROMPTS) * STEPS


@contextmanager
def evaluations(transformer):
    """The number of images in each call of the model."""
    counted = []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        yield counted
    finally:
        hook.remove()


PROMISED = dict(fraction=0.5, confidence=0.6)  # two held-back prompts, of which none may fail


def test_the_fastest_plan_that_keeps_the_quality_is_returned(tiny_pipe):
    prompts = ["a red sign", "TEA", "a blue label", "BREAD"]
    plan = h2cache.calibrate(
        tiny_pipe, prompts, steps=STEPS, quality=h2cache.AtLeast(psnr=1, **PROMISED), **{**QUICK, **CALL}
    )
    assert len(plan.computed) == 1  # of nine steps, eight times fewer: anything has 1 dB
    assert plan.promise.level == 1 and plan.promise.prompts == 2 and plan.promise.failures == 0
    again = Plan.from_json(plan.to_json())
    assert again.promise == plan.promise
    with h2cache.apply(tiny_pipe, PlanConfig(again)) as handle:
        assert handle.summary()["promise"] == str(plan.promise)
        handle.update(allow_transfer=True)
        assert "promise" not in handle.summary()


def test_what_nobody_can_promise_is_refused_with_what_can(tiny_pipe):
    prompts = ["a red sign", "TEA", "a blue label", "BREAD"]
    asked = h2cache.AtLeast(psnr=119, **PROMISED)
    with pytest.raises(ValueError, match=r"the slowest, 4 of 9 steps, can promise \d"):
        h2cache.calibrate(tiny_pipe, prompts, steps=STEPS, quality=asked, **{**QUICK, **CALL})
    with pytest.raises(ValueError, match="takes 90 or more"):
        h2cache.calibrate(tiny_pipe, prompts, steps=STEPS, quality=h2cache.AtLeast(psnr=40), **CALL)
    with pytest.raises(ValueError, match="one of them"):
        h2cache.calibrate(tiny_pipe, prompts, 3, STEPS, quality=asked, **CALL)
