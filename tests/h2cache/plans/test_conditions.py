"""The conditions of a run: where two of them differ, and how models and schedulers are told apart."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_transformer

from h2cache.plans.conditions import Conditions, described, digest

SIGMAS = (1.0, 0.75, 0.5, 0.25)
KNOWN = Conditions("Flux 0123", "Euler {}", 4, 3.5, 64, SIGMAS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(model="Flux 4567"), "model Flux 0123 and is run with Flux 4567"),
        (dict(scheduler="Heun {}"), "scheduler Euler {} and is run with Heun {}"),
        (dict(steps=5), "steps 4 and is run with 5"),
        (dict(guidance=5.0), "guidance 3.5 and is run with 5.0"),
        (dict(image_tokens=16), "image tokens 64 and is run with 16"),
        (dict(sigmas=(1.0, 0.74, 0.4, 0.25)), "sigma 0.5 at step 2 and is run with 0.4"),
    ],
)
def test_a_difference_says_what_both_are(changes, named):
    assert KNOWN.differences(replace(KNOWN, **changes)) == [named]


def test_differences_are_named_together():
    found = KNOWN.differences(replace(KNOWN, steps=5, guidance=5.0))
    assert found == ["steps 4 and is run with 5", "guidance 3.5 and is run with 5.0"]


@pytest.mark.parametrize("name", ["model", "scheduler", "steps", "guidance", "image_tokens", "sigmas"])
def test_what_one_of_them_does_not_know_is_no_difference(name):
    unknown = replace(KNOWN, **{name: None})
    assert KNOWN.differences(unknown) == unknown.differences(KNOWN) == []


def test_noise_levels_may_differ_by_rounding():
    rounded = replace(KNOWN, sigmas=tuple(sigma + 5e-4 for sigma in SIGMAS))
    assert KNOWN.differences(rounded) == []


def test_noise_levels_of_other_steps_are_not_compared():
    """The number of steps is what is named then."""
    other = replace(KNOWN, steps=2, sigmas=(1.0, 0.2))
    assert KNOWN.differences(other) == ["steps 4 and is run with 2"]


def test_a_model_is_known_by_its_class_and_configuration():
    one, same, other = tiny_transformer(seed=0), tiny_transformer(seed=1), tiny_transformer(single=4)
    assert digest(one) == digest(same) != digest(other)
    assert digest(one).startswith("FluxTransformer2DModel ")


def test_a_scheduler_is_described_by_its_class_and_settings_without_the_library_s_own(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(tmp_path)  # notes the class and the version of diffusers in the configuration
    loaded = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert described(loaded) == described(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert '"shift": 3.0' in described(loaded) and "_diffusers_version" not in described(loaded)
    assert "torch.float16" in described(SimpleNamespace(config={"dtype": torch.float16})), "what JSON does not know"
