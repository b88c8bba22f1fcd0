"""Which method is tested on which transformer: `python -m tools.coverage_matrix [nunchaku | families]`.

The tables are made from the tests that pytest collects, by their parameters. `nunchaku` (docs/nunchaku.md): the
configurations in `tests/support/methods_under_test.py` and the transformer that a test runs on. `families`
(docs/models.md): see `tools/coverage_families.py`. `--write PAGE` puts the table between the two marks in a page,
`--check PAGE` exits with 1 where the page says something else.
"""

import argparse
import contextlib
import io
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from h2cache.eval.files import REPOSITORY
from tools import coverage_families

BEGIN, END = "<!-- tools.coverage_matrix: begin -->", "<!-- tools.coverage_matrix: end -->"
DIFFUSERS = "diffusers"
COLUMNS = {
    DIFFUSERS: "diffusers",
    "v1-standin": "nunchaku V1, stand-in",
    "v2-standin": "nunchaku V2, stand-in",
    "v1-nunchaku": "nunchaku V1, real",
    "v2-nunchaku": "nunchaku V2, real",
}


class Collector:
    """A pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def collect() -> list[pytest.Item]:
    """Every test. SystemExit, with pytest's report, where one file cannot be collected."""
    collector, report = Collector(), io.StringIO()
    with contextlib.chdir(REPOSITORY), contextlib.redirect_stdout(report), contextlib.redirect_stderr(report):
        code = pytest.main(["--collect-only", "-q", "tests"], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise SystemExit(f"pytest could not collect the tests:\n{report.getvalue()[-3000:]}")
    return collector.items


def transformers_of(item: pytest.Item) -> Iterable[str]:
    """The columns that a test of one configuration belongs to."""
    params = item.callspec.params
    if "subject" in params:
        return (params["subject"],)
    if "generation" in params:  # compared with diffusers
        return (f"{params['generation']}-standin", DIFFUSERS)
    names = [name for name in ("v1", "v2") if name in item.fixturenames]
    if not names and "nunchaku" in item.fixturenames:
        names = [name for name in ("v1", "v2") if f"_{name}_" in f"{item.path.stem}_{item.originalname}_"]
        if not names:
            raise SystemExit(f"{item.nodeid} does not say which of nunchaku's generations it runs on")
    return [f"{name}-standin" for name in names] or (DIFFUSERS,)


def coverage(items: Iterable[pytest.Item], methods: dict[str, Any]) -> dict[str, dict[str, set[str]]]:
    """The names of the test functions, by method and column."""
    found: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in methods}
    for item in items:
        for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
            for name, config in methods.items():
                if type(value) is type(config) and value == config:
                    for column in transformers_of(item):
                        found[name][column].add(item.originalname)
    return found


def cell(column: str, tests: set[str], skipped: str | None) -> str:
    """What may truthfully be said of a method on a transformer."""
    if not tests:
        return "not tested"
    if column.endswith("-nunchaku") and skipped is not None:
        return "not run on real nunchaku"
    if all("refused" in test for test in tests):
        return "does not exist there; refused with the alternative"
    return {DIFFUSERS: "tested against diffusers"}.get(
        column, "tested against stand-in" if column.endswith("-standin") else "tests for real nunchaku collected here"
    )


def families_table() -> str:
    """The table of families in Markdown."""
    items = collect()
    return coverage_families.table(items, [family.name for family in sys.modules["families"].FAMILIES])


def nunchaku_table() -> str:
    """The table of nunchaku's transformers in Markdown, and why nothing was run on the real ones."""
    items = collect()
    methods = {method.id: method.values[0] for method in sys.modules["methods_under_test"].METHODS}
    skipped = sys.modules["nunchakus"].reason_to_skip()
    found = coverage(items, methods)
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in methods:
        cells = [cell(column, found[name][column], skipped) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if skipped is not None:
        lines += ["", f"Nothing was run on the real nunchaku where this was written: {skipped}."]
    return "\n".join(lines)


TABLES = {"nunchaku": nunchaku_table, "families": families_table}


def inserted(page: str, text: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """The page with `text` between its marks. SystemExit where it has none."""
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise SystemExit(f"the page has no lines {' and '.join(marks)}: add them where the table belongs")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=TABLES, nargs="?", default="nunchaku")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--write", type=Path, metavar="PAGE", help="put the table into a page")
    where.add_argument("--check", type=Path, metavar="PAGE", help="exit with 1 unless the page has this table")
    options = parser.parse_args()
    page = options.write or options.check
    if page is None:
        print(TABLES[options.table]())
        return
    now = page.read_text(encoding="utf-8")
    made = inserted(now, TABLES[options.table]())
    if options.write:
        page.write_text(made, encoding="utf-8")
    elif made != now:
        raise SystemExit(f"{page} is out of date: python -m tools.coverage_matrix {options.table} --write {page}")


if __name__ == "__main__":
    main()
