"""Plans: what they say, what they refuse, how they are kept, and how they are carried over to other steps."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import PLAN, WEIGHTS

from h2cache import Plan, PlanConfig
from h2cache.plans.conditions import Conditions
from h2cache.plans.promise import Promise


def test_a_plan_is_a_small_file_that_reads_back_equal(tmp_path):
    made_for = Conditions("Flux 0123", "Euler {}", 8, 3.5, 64, tuple(1 - step / 8 for step in range(8)))
    plan = Plan(made_for, PLAN.computed, WEIGHTS, {"psnr": 45.0})
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.notes == {"psnr": 45.0} and hash(loaded) == hash(plan)
    assert PlanConfig(tmp_path / "plan.json") == PlanConfig(plan)
    assert json.loads((tmp_path / "plan.json").read_text())["made_for"]["steps"] == 8


def test_a_file_of_another_format_is_refused_by_its_number(tmp_path):
    """Plans that were kept stay readable: the number changes only with what the fields mean."""
    PLAN.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["format"] == 1
    (tmp_path / "plan.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, where 1 is read"):
        Plan.load(tmp_path / "plan.json")


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
    assert plan.resampled(8).weights[3] == plan.resampled(8).weights[5] == (1.5, -0.5)


@given(st.integers(1, 40))
def test_resampling_gives_a_valid_plan_for_any_number_of_steps(steps):
    assert PLAN.resampled(steps).steps == steps


def test_a_resampled_plan_forgets_the_noise_levels_of_other_steps():
    made_for = Conditions(steps=8, sigmas=tuple(1 - step / 8 for step in range(8)))
    plan = replace(PLAN, made_for=made_for)
    assert plan.resampled(8).made_for == made_for
    assert plan.resampled(4).made_for == Conditions(steps=4)


def test_segments_are_a_computed_step_and_the_skipped_ones_after_it():
    assert [PLAN.segment(index) for index in range(4)] == [range(0, 1), range(1, 3), range(3, 6), range(6, 8)]


def test_a_plan_serves_the_conditions_it_was_made_for_and_others_where_that_is_allowed():
    assert PLAN.under(Conditions(steps=8, guidance=3.5)) is PLAN
    with pytest.raises(ValueError, match=r"made for steps 8 and is run with 6: .*allow_transfer=True"):
        PLAN.under(Conditions(steps=6))
    assert PLAN.under(Conditions(steps=6), allow_transfer=True) == PLAN.resampled(6)
    known = replace(PLAN, made_for=replace(PLAN.made_for, guidance=3.5))
    assert known.under(Conditions(guidance=5.0), allow_transfer=True) is known


def test_the_identity_of_a_plan_without_noise_levels_is_that_of_stored_records():
    """They were made before plans knew them."""
    fields = PlanConfig(PLAN).identity()["fields"]
    assert set(fields["plan"]["made_for"]) == {"model", "scheduler", "steps", "guidance", "image_tokens"}
    known = replace(PLAN, made_for=Conditions(steps=2, sigmas=(1.0, 0.5)), computed=(0, 1), weights={})
    assert PlanConfig(known).identity()["fields"]["plan"]["made_for"]["sigmas"] == (1.0, 0.5)


def test_a_transfer_that_skips_nothing_says_so(caplog):
    """Of eight steps PLAN computes four; of three, all."""
    assert len(PLAN.resampled(3).computed) == 3
    assert "skips none of 3 steps" in caplog.text
    caplog.clear()
    assert len(PLAN.resampled(6).computed) < 6 and Plan.euler(8).resampled(4).steps == 4
    assert not caplog.text


def test_a_promise_is_not_transferred():
    promise = Promise("PSNR", 40.0, 0.95, 0.9, "uncached", 80, 1)
    plan = PLAN.promising(promise)
    assert plan == PLAN and Plan.from_json(plan.to_json()).promise == promise
    assert plan.resampled(6).promise is None and PLAN.promise is None
