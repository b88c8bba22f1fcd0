"""The polish of weights by their gradient: what it turns, that it helps, when it stops."""

import pytest
import torch
from tiny import TEXT_TOKENS

from h2cache import Plan
from h2cache.plans import record
from h2cache.plans.polish import Knobs, _decibels, polish
from h2cache.plans.simulate import Simulation

CALL = dict(height=32, width=64, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS)
PROMPTS = ["a red sign", "TEA", "a blue label", "BREAD"]
STEPS, COMPUTED = 9, (0, 1, 4, 7)


@pytest.fixture
def runs(tiny_pipe):
    """Two batches of two."""
    return record(tiny_pipe, PROMPTS, STEPS, seed=0, batch_size=2, **CALL)


@pytest.fixture
def fitted(runs):
    return Simulation(runs, history=3, ridge=1e-4).run(COMPUTED).weights


def followed(runs, weights):
    plan = Plan(runs.conditions, COMPUTED, weights)
    return Simulation(runs, history=3, ridge=1e-4).follow(plan).latents


def test_turned_knobs_are_the_weights_that_they_are_written_as(runs, fitted):
    """A run with knobs turned ends where the plan with the new weights ends, which still sum to one."""
    knobs = Knobs(runs, COMPUTED, fitted, 3, batch=0)
    assert [len(each) for each in knobs.turned] == [0, 1, 2, 2]
    turned = [torch.full_like(each, 0.01) for each in knobs.turned]
    weights = knobs.weights(turned)
    assert all(sum(each) == pytest.approx(1) for each in weights.values())
    assert weights != fitted and set(weights) == set(fitted)
    knobs.turned = turned
    with torch.no_grad():
        reached = _decibels(knobs, runs, 0)
    assert reached.tolist() == pytest.approx(runs.decibels(followed(runs, weights))[:2].tolist(), abs=0.05)


def test_each_knob_moves_the_latents_alike(runs, fitted):
    knobs = Knobs(runs, COMPUTED, fitted, 3, batch=0)
    with torch.no_grad():
        for index, (latents, outputs) in enumerate(knobs._followed(runs, 0)):
            still = knobs.step(index, latents, outputs)
            for knob in range(len(knobs.turned[index])):
                knobs.turned[index][knob] = 1.0
                moved = (knobs.step(index, latents, outputs) - still).flatten(1).norm(dim=1).square().mean().sqrt()
                knobs.turned[index][knob] = 0.0
                assert moved.item() == pytest.approx(
                    latents.flatten(1).norm(dim=1).square().mean().sqrt().item(), rel=1e-2
                )


def test_it_brings_images_nearer_that_it_did_not_learn_from(runs):
    """From the last outputs reused, which leave much to gain."""
    reused = Plan.reuse(STEPS, COMPUTED).weights
    polished = polish(runs, COMPUTED, reused, 3, rounds=20)
    before, after = (runs.decibels(followed(runs, each)) for each in (reused, polished))
    assert after[:2].mean() > before[:2].mean() + 1
    assert after[2:].mean() > before[2:].mean()


def test_where_it_does_not_help_others_nothing_is_changed(runs, fitted):
    """The last batch is of the same noise with the images of other prompts: whatever is learnt is wrong there."""
    runs.images[2:] = runs.decode(followed(runs, fitted))[2:]
    polished = polish(runs, COMPUTED, fitted, 3, rounds=3)
    assert all(polished[step] == pytest.approx(weights) for step, weights in fitted.items())
    assert (
        polish(runs.first(2), COMPUTED, fitted, 3, rounds=3) is fitted
        and polish(runs, COMPUTED, fitted, 3, 0) is fitted
    )


def test_the_model_is_left_without_gradients(tiny_pipe, runs, fitted):
    polish(runs, COMPUTED, fitted, 3, rounds=2)
    assert all(parameter.grad is None for parameter in tiny_pipe.transformer.parameters())
