"""`python -m tools.coverage_matrix` says what tests there are, and no more."""

from types import SimpleNamespace
from typing import Any

import pytest

from h2cache import H2CacheConfig
from tools.coverage_matrix import BEGIN, END, cell, coverage, inserted

METHODS = {"default": H2CacheConfig(), "bold": H2CacheConfig(tau1=0.5)}


def item(name: str, fixtures: tuple[str, ...] = (), file: str = "test_x", **params: Any) -> Any:
    """What pytest collects, as far as it is looked at."""
    return SimpleNamespace(
        originalname=name,
        nodeid=f"{file}.py::{name}",
        path=SimpleNamespace(stem=file),
        fixturenames=[*fixtures, *params],
        callspec=SimpleNamespace(params=params),
    )


def test_tests_are_sorted_by_the_configuration_and_the_transformer_that_they_run_on():
    default, bold = METHODS.values()
    items = [
        SimpleNamespace(originalname="test_without_parameters"),
        item("test_of_another_method", config=H2CacheConfig(tau1=0.9)),
        item("test_on_diffusers", config=default),
        item("test_on_a_subject", config=bold, subject="v1-nunchaku"),
        item("test_like_diffusers", ("nunchaku",), config=bold, generation="v2"),
        item("test_of_v1", ("v1", "nunchaku"), config=default),
        item("test_of_offload", ("nunchaku",), file="test_nunchaku_v1", config=default),
    ]
    assert coverage(items, METHODS) == {
        "default": {"diffusers": {"test_on_diffusers"}, "v1-standin": {"test_of_v1", "test_of_offload"}},
        "bold": {
            "v1-nunchaku": {"test_on_a_subject"},
            "v2-standin": {"test_like_diffusers"},
            "diffusers": {"test_like_diffusers"},
        },
    }


def test_a_test_of_which_it_is_not_clear_what_it_runs_on_stops_the_table():
    with pytest.raises(SystemExit, match="does not say which"):
        coverage([item("test_unclear", ("nunchaku",), config=METHODS["bold"])], METHODS)


@pytest.mark.parametrize(
    ("column", "tests", "skipped", "words"),
    [
        ("diffusers", {"test_a"}, None, "tested against diffusers"),
        ("v1-standin", {"test_a", "test_is_refused"}, None, "tested against stand-in"),
        ("v1-standin", {"test_is_refused"}, None, "does not exist there; refused with the alternative"),
        ("v2-standin", set(), None, "not tested"),
        ("v2-nunchaku", {"test_a"}, "nunchaku is not installed", "not run on real nunchaku"),
    ],
)
def test_what_is_said(column, tests, skipped, words):
    assert cell(column, tests, skipped) == words


def test_the_table_goes_between_the_marks_of_a_page():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert inserted(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(SystemExit, match="has no lines"):
        inserted("a page without marks", "new")
