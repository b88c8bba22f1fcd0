"""Plans on other schedulers than flow matching's: a run is the sum written by hand, in each scheduler's own terms."""

import copy
import inspect
import math
from dataclasses import replace

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from plan_pipelines import made
from plans import PLAN

import h2cache
from h2cache import Plan, PlanConfig, PlanScheduler
from h2cache.plans import record
from h2cache.plans.bases import FlowForm
from h2cache.plans.conditions import Conditions, described, tokens_of
from h2cache.plans.plan import normalized

EVERYTHING = Plan.euler(8)
UNCLIPPED = dict(clip_sample=False)
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
SINGLE_STEP = [
    *(EulerDiscreteScheduler(prediction_type=kind) for kind in ("epsilon", "sample", "v_prediction")),
    EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, beta_schedule="scaled_linear"),
    EulerDiscreteScheduler(timestep_spacing="trailing", use_karras_sigmas=True),
    *(DDIMScheduler(prediction_type=kind, **UNCLIPPED) for kind in ("epsilon", "sample", "v_prediction")),
    DDIMScheduler(set_alpha_to_one=False, steps_offset=1, **UNCLIPPED),
    DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", **UNCLIPPED
    ),
    CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=1.0, timestep_spacing="trailing"),
]
MULTISTEP = [
    *(
        kind(**options)
        for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
        for options in ({}, dict(prediction_type="v_prediction"), dict(prediction_type="sample"), FLOW)
    ),
    DPMSolverMultistepScheduler(algorithm_type="dpmsolver", use_karras_sigmas=True, final_sigmas_type="sigma_min"),
    UniPCMultistepScheduler(predict_x0=False),
]


def named(base) -> str:
    return f"{type(base).__name__}-{base.config.prediction_type}"


single_step = pytest.mark.parametrize("base", SINGLE_STEP, ids=named)
multistep = pytest.mark.parametrize("base", MULTISTEP, ids=named)
every_base = pytest.mark.parametrize("base", SINGLE_STEP + MULTISTEP, ids=named)


def output(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A model's, which is not linear in anything."""
    return torch.sin(2 * sample) + sample * (timestep.to(sample.dtype) / 1000).square()


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def run(scheduler, steps: int = 8, start: torch.Tensor | None = None) -> torch.Tensor:
    """The loop of the pipelines."""
    scheduler.set_timesteps(steps)
    sample = (noise() if start is None else start) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        found = output(scheduler.scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(found, timestep, sample, return_dict=False)[0]
    return sample


def alphas_and_sigmas(base) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the levels of its run, as its paper has them."""
    if isinstance(base, DDIMScheduler | CogVideoXDDIMScheduler):
        end = int(base.timesteps[-1]) - 1000 // base.num_inference_steps
        last = base.alphas_cumprod[end] if end >= 0 else base.final_alpha_cumprod
        squares = torch.tensor([*base.alphas_cumprod[base.timesteps], last], dtype=torch.float64)
        return squares.sqrt(), (1 - squares).sqrt()
    sigmas = base.sigmas.double()
    if isinstance(base, EulerDiscreteScheduler):
        return torch.ones_like(sigmas), sigmas
    if base.config.use_flow_sigmas:
        return 1 - sigmas, sigmas
    return (1 + sigmas**2) ** -0.5, sigmas * (1 + sigmas**2) ** -0.5


def clean_and_noise(kind: str, found, sample, alpha, sigma):
    """What a model's output says of a sample."""
    if kind == "flow_prediction":
        return sample - sigma * found, sample + (1 - sigma) * found
    if kind == "epsilon":
        return (sample - sigma * found) / alpha, found
    if kind == "sample":
        return found, (sample - alpha * found) / sigma
    length = math.hypot(alpha, sigma)  # v rotates a sample of unit variance
    cosine, sine, unit = alpha / length, sigma / length, sample / length
    return cosine * unit - sine * found, sine * unit + cosine * found


def by_hand(plan: Plan, base) -> torch.Tensor:
    """All steps one after another, as DDIM makes them, in double precision."""
    base = copy.deepcopy(base)
    base.set_timesteps(plan.steps)
    alphas, sigmas = (each.tolist() for each in alphas_and_sigmas(base))
    sample, known = noise().double() * base.init_noise_sigma, []
    for step, timestep in enumerate(base.timesteps):
        alpha, sigma = alphas[step], sigmas[step]
        if step in plan.computed:
            scale = math.hypot(1, sigma) if isinstance(base, EulerDiscreteScheduler) else 1
            found = output(sample / scale, timestep)
            clean, eps = clean_and_noise(base.config.prediction_type, found, sample, alpha, sigma)
            known.insert(0, eps - clean)
        weights = normalized(plan.weights.get(step, (1.0,))[: len(known)])
        change = sum(weight * each for weight, each in zip(weights, known, strict=False))
        clean = (sample - sigma * change) / (alpha + sigma)
        sample = alphas[step + 1] * clean + sigmas[step + 1] * (clean + change)
    return sample


# --- a run ----------------------------------------------------------------------------------------------------------


@single_step
def test_skipping_nothing_is_the_base_s_own_run_bit_for_bit(base):
    assert torch.equal(run(PlanScheduler(EVERYTHING, base)), run(copy.deepcopy(base)))


@pytest.mark.parametrize("base", MULTISTEP[:-1], ids=named)
def test_skipping_nothing_is_the_first_order_run_of_a_multistep_base(base):
    first_order = type(base).from_config(base.config, solver_order=1, disable_corrector=list(range(8)))
    torch.testing.assert_close(run(PlanScheduler(EVERYTHING, base)), run(first_order), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(run(PlanScheduler(EVERYTHING, base)), run(copy.deepcopy(base)), rtol=1e-3, atol=1e-3)


@every_base
@pytest.mark.parametrize(
    "plan",
    [PLAN, Plan.reuse(8, 3), Plan.taylor(8, 4, order=2), Plan.hermite(8, (0, 1, 4))],
    ids=["weights", "reuse", "taylor", "hermite"],
)
def test_a_run_is_what_the_plan_says(base, plan):
    expected = by_hand(plan, base)
    found = run(PlanScheduler(plan, base))
    assert (found - expected).norm() < 1e-4 * expected.norm()


@single_step
def test_noise_is_added_as_the_base_adds_it(base):
    plain, scheduler = copy.deepcopy(base), PlanScheduler(PLAN, base)
    for each in (plain, scheduler):
        each.set_timesteps(8)
    clean, timesteps = torch.rand(2, 3, 4, 4), scheduler.timesteps[1:2].repeat(2)
    expected = plain.add_noise(clean, noise(), timesteps)
    torch.testing.assert_close(scheduler.add_noise(clean, noise(), timesteps), expected)


def test_levels_fall_from_one_to_zero_and_flow_matching_s_are_its_own():
    for base in SINGLE_STEP + MULTISTEP:
        base = copy.deepcopy(base)
        base.set_timesteps(8)
        levels = FlowForm.of(base).levels
        assert 1 >= levels[0] > 0.9 and 0 <= levels[-1] < 0.2 and list(levels) == sorted(levels, reverse=True)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(8)
    form = FlowForm.of(flow)
    assert form.levels == tuple(flow.sigmas.tolist()) and set(form.scales) == {1} and set(form.parts) == {(0, 1)}


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (EulerAncestralDiscreteScheduler(), TypeError, "EulerDiscreteScheduler.*not of EulerAncestralDiscrete"),
        (DDPMScheduler(), TypeError, "not of DDPMScheduler"),
        (DDIMScheduler(), ValueError, "clip_sample=True, whose steps are not linear"),
        (UniPCMultistepScheduler(thresholding=True), ValueError, "thresholding=True, whose steps are not linear"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), ValueError, "adds noise"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), ValueError, "adds noise"),
        (DDIMScheduler(prediction_type="other", **UNCLIPPED), ValueError, "must be one of flow_prediction, epsilon"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_plan_cannot_follow_is_refused(base, error, message):
    with pytest.raises(error, match=message):
        PlanScheduler(PLAN, base)


def test_an_eta_is_refused():
    scheduler = PlanScheduler(PLAN, SINGLE_STEP[5])
    scheduler.set_timesteps(8)
    assert "eta" in inspect.signature(scheduler.step).parameters  # where pipelines look
    with pytest.raises(ValueError, match=r"eta=0.5, which add noise"):
        scheduler.step(noise(), scheduler.timesteps[0], noise(), eta=0.5)


@pytest.mark.parametrize(
    ("made_for", "other"),
    [
        (DDIMScheduler(**UNCLIPPED), EulerDiscreteScheduler()),
        (DDIMScheduler(**UNCLIPPED), DDIMScheduler(prediction_type="v_prediction", **UNCLIPPED)),
        (UniPCMultistepScheduler(**FLOW), FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
    ids=["base", "prediction", "flow"],
)
def test_a_plan_for_another_base_or_prediction_is_refused(made_for, other):
    plan = replace(PLAN, made_for=Conditions(steps=8, scheduler=described(made_for)))
    PlanScheduler(plan, made_for).set_timesteps(8)
    with pytest.raises(
        ValueError, match=f"made for scheduler {type(made_for).__name__}.* run with {type(other).__name__}"
    ):
        PlanScheduler(plan, other).set_timesteps(8)
    PlanScheduler(plan, other, allow_transfer=True).set_timesteps(8)


# --- as a scheduler -------------------------------------------------------------------------------------------------


@every_base
def test_it_is_saved_and_loaded_with_its_base(base, tmp_path):
    scheduler = PlanScheduler(PLAN, base)
    scheduler.save_pretrained(tmp_path)
    expected = run(scheduler)
    for each in (
        PlanScheduler.from_pretrained(tmp_path),
        PlanScheduler.from_config(scheduler.config),
        PlanScheduler.from_config(base.config, plan=PLAN),
    ):
        assert described(each.base) == described(base) and torch.equal(run(each), expected)


# --- in a pipeline --------------------------------------------------------------------------------------------------

STEPS = 8
QUICK = dict(tries=1, few=1, rounds=1, batch_size=2)
PROMPTS = ["a red sign", "TEA", "a blue label", "BREAD"]
OTHERS = ["a green shirt", "NEW", "an old car", "seven"]
CLASSES, OTHER_CLASSES = [3, 7, 11, 20], [5, 9, 1, 2]


def drawn(pipe, prompts, call, plan: Plan | None = None) -> torch.Tensor:
    """Images, or the frames of videos."""
    if plan is not None:
        with h2cache.apply(pipe, PlanConfig(plan)):
            return drawn(pipe, prompts, call)
    generators = [torch.Generator().manual_seed(100 + place) for place in range(len(prompts))]
    return pipe(prompts, generator=generators, num_inference_steps=STEPS, output_type="pt", **call)[0]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("sdxl", None),  # Euler, epsilon; a doubled batch and a U-Net
        ("dit", None),  # DDIM; its pipeline takes no latents
        ("dit", DDIMScheduler(prediction_type="v_prediction", **UNCLIPPED)),
        ("dit", DPMSolverMultistepScheduler(beta_end=0.002)),
        ("wan", None),  # UniPC with flow sigmas; two calls a step
        ("qwen-image", None),  # two calls a step, combined by their norms; a negative prompt for each prompt
        ("sd3", None),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_calibrated_plan_is_nearer_than_reuse_on_other_prompts(name, base, monkeypatch):
    pipe, call = made(name)
    scheduler = base or pipe.scheduler
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    prompts, others = (CLASSES, OTHER_CLASSES) if name == "dit" else (PROMPTS, OTHERS)
    own, before = drawn(pipe, others, call), dict(vars(pipe))
    plan = h2cache.calibrate(pipe, prompts, 2, STEPS, **QUICK, **call)
    assert pipe.scheduler is scheduler and vars(pipe).keys() == before.keys()
    assert Plan.from_json(plan.to_json()) == plan and plan.made_for.scheduler == described(scheduler)
    if not isinstance(scheduler, DPMSolverMultistepScheduler | UniPCMultistepScheduler):
        assert torch.equal(drawn(pipe, others, call, EVERYTHING), own)
    planned, reused = (drawn(pipe, others, call, each) for each in (plan, Plan.reuse(STEPS, plan.computed)))
    assert (planned - own).norm() < 0.7 * (reused - own).norm()
    assert torch.equal(drawn(pipe, others, call), own)
    broken = replace(plan, made_for=replace(plan.made_for, image_tokens=7))
    with pytest.raises(ValueError, match="image tokens 7 and is run with"):
        drawn(pipe, others, call, broken)


@pytest.mark.parametrize("name", ["sdxl", "dit"])
def test_a_recording_ends_with_the_pipeline_s_own_images(name, monkeypatch):
    """Also where a run ends with a little noise, so that its last sample is scaled."""
    pipe, call = made(name)
    monkeypatch.setattr(pipe, "scheduler", DDIMScheduler(set_alpha_to_one=False, steps_offset=1, **UNCLIPPED))
    prompts = CLASSES if name == "dit" else PROMPTS
    runs = record(pipe, prompts, STEPS, seed=100, batch_size=3, **call)
    torch.testing.assert_close(runs.images, drawn(pipe, prompts, call), rtol=1e-3, atol=1e-4)


def test_image_tokens_are_counted_for_each_shape_of_latents():
    assert [tokens_of(torch.empty(shape)) for shape in [(2, 16, 3), (2, 4, 8, 8), (2, 4, 3, 8, 8)]] == [16, 64, 192]


def test_a_pipeline_whose_step_depends_on_more_than_its_latents_is_refused(monkeypatch):
    pipe, call = made("dit")
    forward, calls = pipe.transformer.forward, []

    def drifting(*args, **kwargs):
        calls.append(None)
        found = forward(*args, **kwargs)
        found.sample = found.sample * len(calls)
        return found

    monkeypatch.setattr(pipe.transformer, "forward", drifting)
    with pytest.raises(ValueError, match="cannot run step 1 of this DiTPipeline by itself"):
        h2cache.calibrate(pipe, CLASSES, 3, STEPS, **QUICK, **call)


def test_only_flow_matching_is_divided_for_the_converged_reference():
    pipe, call = made("dit")
    with pytest.raises(ValueError, match=r"'converged' with DDIMScheduler.*use reference='uncached'"):
        h2cache.calibrate(pipe, CLASSES, 3, STEPS, reference="converged", **QUICK, **call)
