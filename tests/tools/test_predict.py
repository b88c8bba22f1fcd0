"""`python -m tools.predict`: the formula, and what it is fed with."""

import math
from types import SimpleNamespace

import pytest
from repository import REPOSITORY

from h2cache import H2CacheConfig
from h2cache.baselines import HiCacheConfig
from h2cache.eval.experiments.settings import Setting
from tools.coverage_matrix import inserted
from tools.predict import (
    CARDS,
    MARKS,
    MODELS,
    REACHED,
    Card,
    Work,
    computed_steps,
    most_evaluations,
    paper_table,
    seconds_of_call,
    tables,
    work,
)

CARD = Card("a card", memory=24, bfloat16=100, four_bits=400, bandwidth=1000)
FLUX = next(model for model in MODELS if model.config == "flux1-dev")


def test_a_call_takes_its_operations_over_the_rate_that_is_reached():
    one = Work(linear=60e12, attention=15e12, weight_bytes=24e9)
    assert seconds_of_call(one, CARD) == pytest.approx(0.75 / REACHED)
    assert seconds_of_call(one, CARD, four_bits=True) == pytest.approx((0.15 + 0.15) / REACHED)


def test_a_call_takes_at_least_the_time_to_read_the_weights():
    one = Work(linear=1e9, attention=0, weight_bytes=24e9)
    assert seconds_of_call(one, CARD) == pytest.approx(0.024)
    assert seconds_of_call(one, CARD, four_bits=True) == pytest.approx(0.006)


def test_a_card_without_kernels_has_no_time_in_four_bits():
    hopper = next(card for card in CARDS if card.name == "H200")
    assert math.isnan(seconds_of_call(Work(1, 1, 1), hopper, four_bits=True))


def test_the_operations_of_flux_are_those_of_its_shapes():
    """512 + 4096 tokens of width 3072 in 57 blocks, by hand: the products of attention are 4 N N D a block."""
    counted = work(FLUX)
    assert counted.attention == 57 * 4 * 4608**2 * 3072
    assert counted.total == pytest.approx(74.5e12, rel=0.005)  # the published figure
    assert counted.weight_bytes == pytest.approx(23.8e9, rel=0.001)


@pytest.mark.parametrize(("steps", "interval", "computed"), [(50, 5, 12), (50, 1, 50), (4, 3, 3), (7, 3, 4)])
def test_steps_of_a_schedule(steps, interval, computed):
    """Steps 0, 1, 2 and then every `interval`-th."""
    assert computed_steps(steps, interval) == computed == len({0, 1, 2} | set(range(2, steps, interval)))


def test_a_table_without_a_single_hit():
    """A threshold computes all of its steps, a schedule its own, a solver as many as it is given."""
    settings = [Setting("Baseline", "Baseline", None), Setting("H2-Cache", "H2-Cache", H2CacheConfig())]
    settings.append(Setting("HiCache", "HiCache", HiCacheConfig(interval=5)))
    settings.append(Setting("UniPC", "UniPC", None, steps=24, scheduler="unipc"))
    study = SimpleNamespace(experiments=[SimpleNamespace(settings=settings, steps=100)])
    assert most_evaluations(study) == 100 + 100 + 22 + 24


def test_the_papers_table_is_the_experiment_on_the_papers_prompts():
    study = paper_table("flux1-dev")
    (experiment,) = study.experiments
    assert (experiment.name, experiment.steps, len(study.prompts[experiment.prompts])) == ("table1", 100, 80)


@pytest.mark.thorough
def test_the_page_has_these_tables():
    page = (REPOSITORY / "docs/gpu.md").read_text(encoding="utf-8")
    assert inserted(page, tables(), MARKS) == page, "python -m tools.predict --write docs/gpu.md"
