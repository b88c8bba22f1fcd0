"""Which run a call of the model belongs to, as far as can be told without reading its timestep."""

import pytest
import torch

from h2cache.adapters.base import ModelCall
from h2cache.runtime.runs import Runs, TablePlace

TABLE = torch.linspace(1, 0, 5)[:4]
PROMPT = torch.zeros(1, 2, 3)
SHAPE = (1, 16)


def call(step: int, run: tuple[object, ...] = (), prompt: torch.Tensor = PROMPT) -> ModelCall:
    return ModelCall(torch.zeros(1, 4), 1, TABLE[step].expand(1), run, (prompt,))


def found(runs: Runs, given: ModelCall):
    return runs.find(given, SHAPE, TablePlace.of(given.timestep))


def begun(runs: Runs, given: ModelCall):
    run = runs.begin(given, 0, SHAPE)
    run.note_place(TablePlace.of(given.timestep))
    return run


def test_with_the_embeddings_of_the_run_before_the_place_in_the_schedulers_table_tells():
    """A pipeline hands a view of its timesteps to the model; where it goes back, another run has begun."""
    runs = Runs()
    run = begun(runs, call(1))
    assert found(runs, call(2)) is found(runs, call(1)) is run
    assert found(runs, call(0)) is None
    assert run.goes_on_at(TablePlace.of(TABLE[2])) and run.goes_on_at(None) is None
    assert run.goes_on_at(TablePlace.of(TABLE.clone()[2])) is None, "of another table nothing is known"


@pytest.mark.parametrize("named_by_tensor", [True, False], ids=["tensor-and-list", "list"])
def test_lists_that_pipelines_make_for_a_run_name_it_by_their_identity(named_by_tensor):
    runs, names = Runs(), (torch.zeros(2),) * named_by_tensor
    sizes, equal = [(4, 4)], [(4, 4)]
    run = begun(runs, call(0, run=(*names, sizes)))
    assert found(runs, call(1, run=(*names, sizes))) is run
    assert found(runs, call(1, run=(*names, equal))) is None


def test_what_has_a_name_of_its_own_may_begin_anywhere():
    """Its name ends with it, so that a call at an earlier place, as of a solver with two calls a step, is still its."""
    runs, name = Runs(), torch.zeros(2)
    run = begun(runs, call(2, run=(name,)))
    assert found(runs, call(1, run=(name,))) is run
    assert found(runs, call(1, run=(torch.zeros(2),))) is None
    assert runs.find(call(3, run=(name,)), (2, 16), None) is None, "another batch"
