"""Products of cases of which `make test` runs a selection, and `make test-thorough` the rest."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest


def named(values: Mapping[str, Any]) -> list:
    """An axis of a product: the values, known by their keys."""
    return [pytest.param(value, id=name) for name, value in values.items()]


def product(
    names: str, *axes: Sequence, kept: Callable[..., bool], indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Every combination of the axes' cases, each a `pytest.param` with an id.

    Args:
        names: the test's arguments, those of the first axis first.
        axes: the cases of each.
        kept: (an id of each axis) -> whether `make test` runs the combination. The others are thorough.
        indirect: those of the arguments that are fixtures, as pytest's.
    """
    cases = []
    for combination in itertools.product(*axes):
        ids = [case.id for case in combination]
        marks = [mark for case in combination for mark in case.marks]
        values = [value for case in combination for value in case.values]
        marks += [] if kept(*ids) else [pytest.mark.thorough]
        cases.append(pytest.param(*values, id="-".join(ids), marks=marks))
    return pytest.mark.parametrize(names, cases, indirect=list(indirect))
