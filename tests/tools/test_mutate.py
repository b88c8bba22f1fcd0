"""`python -m tools.mutate`: which changes it makes, and in which order it tries the tests on one."""

import ast

import pytest
from repository import REPOSITORY

from tools import mutate
from tools.mutate import Change, Noting, candidates, chosen, in_order

SOURCE = '''"""A docstring: 1 < 2."""
import math

LIMIT: int = 3


def stride(tokens, target=None, *, least=1):
    """Not 4 < 5."""
    if target is None or not tokens:
        raise ValueError(f"tokens {tokens + 1}")
    return max(least, tokens // target)
'''


@pytest.fixture
def changes(tmp_path, monkeypatch) -> dict[str, Change]:
    """Each change of SOURCE, by the line that it makes."""
    monkeypatch.setattr(mutate, "REPOSITORY", tmp_path)
    (tmp_path / "stride.py").write_text(SOURCE)
    made = {}
    for change in candidates(tmp_path / "stride.py"):
        (line,) = set(change.applied(SOURCE).splitlines()) - set(SOURCE.splitlines())
        made[line.strip()] = change
    return made


def test_they_are_the_small_mistakes_that_people_make(changes):
    assert set(changes) == {
        "LIMIT: int = 4",
        "def stride(tokens, target=None, *, least=2):",
        "if (target is not None) or not tokens:",
        "if (target is None and (not tokens)):",
        "if target is None or (tokens):",
        "return None",
        "return min(least, tokens // target)",
        "return max(least, (-(-tokens // target)))",
    }
    assert {change.statement for change in changes.values()} == {4, 7, 9, 11}


def test_the_same_seed_makes_the_same_changes_one_a_line_and_all_can_be_read():
    made = chosen(100, seed=1)
    assert made == chosen(100, seed=1) != chosen(100, seed=2)
    assert len({(change.path, change.line) for change in made}) == 100
    for change in made:
        source = (REPOSITORY / change.path).read_text()
        assert ast.dump(ast.parse(change.applied(source))) != ast.dump(ast.parse(source))


def test_every_statement_of_a_function_says_that_it_ran():
    tree = ast.fix_missing_locations(Noting("stride.py").visit(ast.parse(SOURCE)))
    reached: set = set()
    space: dict = {"__reached__": reached.add}
    exec(compile(tree, "stride.py", "exec"), space)
    assert (reached, space["stride"].__doc__) == (set(), "Not 4 < 5.")
    assert space["stride"](7, 2) == 3
    assert reached == {("stride.py", 9), ("stride.py", 11)}
    with pytest.raises(ValueError, match="tokens 8"):
        space["stride"](7)
    assert ("stride.py", 10) in reached


def test_a_files_own_tests_come_first_then_those_that_reach_least_and_the_cheapest_case_of_each(changes):
    rows = [
        {"case": "tests/test_all.py::test_all[a]", "seconds": 2, "lines": {"stride.py": [9, 11], "x.py": [1, 2]}},
        {"case": "tests/test_all.py::test_all[b]", "seconds": 1, "lines": {"stride.py": [9, 11], "x.py": [1, 2]}},
        {"case": "tests/test_few.py::test_few", "seconds": 9, "lines": {"stride.py": [9, 11]}},
        {
            "case": "tests/test_stride.py::test_own",
            "seconds": 5,
            "lines": {"stride.py": [9, 11], "other.py": [1, 2, 3]},
        },
        {"case": "tests/test_few.py::test_beside", "seconds": 1, "lines": {}},
        {"case": "tests/test_far.py::test_far", "seconds": 1, "lines": {"x.py": [1]}},
        {"case": "tests/test_all.py::test_refused", "seconds": 1, "lines": {"stride.py": [9, 10]}},
    ]
    names = ["test_own", "test_few", "test_all[b]", "test_all[a]", "test_beside", "test_refused"]
    order = [case.partition("::")[2] for case in in_order(changes["return None"], rows, seconds=60)]
    assert order == names
    assert len(in_order(changes["return None"], rows, seconds=15.5)) == 3
    on_import = in_order(changes["LIMIT: int = 4"], rows, seconds=60)
    assert {*on_import} == {row["case"] for row in rows} - {"tests/test_far.py::test_far"}, "nothing reaches the line"
