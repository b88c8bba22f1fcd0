"""How many small mistakes in h2cache/ and baselines/ the tests notice: `python -m tools.mutate {map,list,run}`.

`map` runs the tests once on a copy in which every statement notes that it ran, and writes which case reaches which
line. `run` makes seeded changes of one line, one at a time and each in a copy, and runs the cases that reach the line:
first the cheapest case of each test function, those that reach the fewest lines first, then the other cases, up to
`--seconds` of their recorded times. It stops at the first failure. Results are appended to `--results`, and a change
that is there is not tried again. `list` prints the changes.

    python -m tools.mutate map --map reach.jsonl tests/h2cache tests/baselines tests/properties -m "not thorough"
    python -m tools.mutate run --map reach.jsonl --results changes.jsonl --count 100 --seed 0

Changes: a comparison moved by its bound or negated, an operator exchanged (`//` also for rounding up), a constant moved
by one or negated, `and` for `or`, min for max, any for all, a condition negated, a returned value or a keyword argument
dropped, a statement deleted. Docstrings, annotations, imports, strings and what is raised or logged stay as they are.
"""

import argparse
import ast
import builtins
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from h2cache.eval.files import REPOSITORY

PACKAGES = ("h2cache", "baselines")
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}
QUIET = {"warn", "warning", "info", "debug", "error", "exception"}  # methods whose arguments are messages


@dataclass(frozen=True)
class Change:
    """One change of a piece of one line.

    Fields:
        path: the file, relative to the repository.
        line: its line, from 1; `statement` is the line on which the statement around it begins.
        start, end: the piece that is replaced, in bytes of the line; `new` stands in its place.
    """

    path: str
    line: int
    statement: int
    start: int
    end: int
    new: str

    def applied(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        text = lines[self.line - 1].encode()
        lines[self.line - 1] = (text[: self.start] + self.new.encode() + text[self.end :]).decode()
        return "".join(lines)

    def __str__(self) -> str:
        line = (REPOSITORY / self.path).read_text(encoding="utf-8").splitlines()[self.line - 1].encode()
        return f"{self.path}:{self.line}: `{line[self.start : self.end].decode()}` -> `{self.new}`"


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of an expression or a statement."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=right):
            for other in COMPARISONS[type(op)]:
                yield ast.Compare(left, [other()], right)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            yield ast.UnaryOp(ast.USub(), ast.BinOp(ast.UnaryOp(ast.USub(), left), ast.FloorDiv(), right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name) as func, args=args, keywords=keywords):
            if name in NAMES and isinstance(func, ast.Name):
                yield ast.Call(ast.Name(NAMES[name]), args, keywords)
            for index, keyword in enumerate(keywords):
                if keyword.arg is not None:
                    yield ast.Call(func, args, keywords[:index] + keywords[index + 1 :])
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Continue() | ast.Break() | ast.Delete():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()


def candidates(path: Path) -> Iterator[Change]:
    """Every change of a file."""

    def walk(node: ast.AST, statement: int) -> Iterator[tuple[ast.AST, ast.AST, int]]:
        if isinstance(node, ast.stmt):
            statement = node.lineno
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Assert):
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in QUIET:
            return
        yield from ((node, new, statement) for new in replacements(node))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            if name == "test" and isinstance(value, ast.Name | ast.Attribute | ast.Call):
                yield value, ast.UnaryOp(ast.Not(), value), statement
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from walk(child, statement)

    module = ast.parse(path.read_text(encoding="utf-8"))
    for node, new, statement in walk(module, 1):
        if node.lineno == node.end_lineno:
            text = ast.unparse(new)
            text = f"({text})" if isinstance(node, ast.expr) and not isinstance(new, ast.Constant | ast.Call) else text
            yield Change(
                str(path.relative_to(REPOSITORY)), node.lineno, statement, node.col_offset, node.end_col_offset, text
            )


def chosen(count: int, seed: int) -> list[Change]:
    """So many changes, no two of one line: lines are drawn alike, then one of a line's changes."""
    by_line = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for change in candidates(path):
                by_line[change.path, change.line].append(change)
    chance = random.Random(seed)
    return [chance.choice(by_line[line]) for line in chance.sample(sorted(by_line), count)]


# --- which case reaches which line ------------------------------------------------------------------------------------


class Noting(ast.NodeTransformer):
    """Puts `__reached__(path, line)` in front of every statement of a function's body."""

    def __init__(self, path: str) -> None:
        self.path = path

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if any("jit" in ast.unparse(each) for each in node.decorator_list):
            return node  # Triton reads its source
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if not isinstance(node, ast.Module | ast.ClassDef):
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                    setattr(node, name, [each for statement in block for each in self.noted(statement)])
        return node

    def noted(self, statement: ast.stmt) -> list[ast.stmt]:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            return [statement]  # a docstring, which must stay the first
        note = ast.parse(f"__reached__(({self.path!r}, {statement.lineno}))").body[0]
        return [ast.fix_missing_locations(ast.copy_location(note, statement)), statement]


class Reach:
    """A pytest plugin that writes a line of JSON a case: its id, its seconds and the lines that it reached."""

    def __init__(self, file: Path) -> None:
        self.file, self.lines = file, set()
        builtins.__reached__ = self.lines.add

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.lines.clear()
        start = time.perf_counter()
        yield
        by_path = defaultdict(list)
        for path, line in sorted(self.lines):
            by_path[path].append(line)
        row = {"case": item.nodeid, "seconds": round(time.perf_counter() - start, 3), "lines": by_path}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# --- running the tests on a copy --------------------------------------------------------------------------------------


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the repository without its history and environment."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        (copy / ".venv").symlink_to(REPOSITORY / ".venv")
        yield copy


def tested(copy: Path, arguments: list[str], plugins: list[Any], timeout: float) -> int | None:
    """The exit code of pytest on the copy, in a fork of this process; None if it was still running.

    The fork has torch and diffusers loaded, which would take longer than most tests.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(copy)
        sys.path = [str(copy), *(each for each in sys.path if each not in ("", str(REPOSITORY)))]
        for name in [name for name in sys.modules if name.split(".")[0] in (*PACKAGES, "eval", "tools")]:
            del sys.modules[name]
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", "-q", *arguments], plugins=plugins)
        os._exit(int(code))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Chosen:
    """A pytest plugin that runs these cases, in this order, and writes down which failed."""

    def __init__(self, cases: list[str], failed: Path) -> None:
        self.order = {case: index for index, case in enumerate(cases)}
        self.failed = failed

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((each for each in items if each.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.failed.open("a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")


def in_order(change: Change, rows: list[dict], seconds: float) -> list[str]:
    """The cases to try, the most telling first, for so many seconds: see the module.

    Where no case reaches the statement (it runs on import, or in a process that a test starts) the file's own tests and
    those that reach another of its statements stand in. Last come the other cases of the same test files: what a test
    keeps for the others (a recording, a fixture) is reached by the first of them alone.
    """
    own = f"test_{Path(change.path).stem}.py"
    reaching = [row for row in rows if change.statement in row["lines"].get(change.path, ())]
    reaching = reaching or [row for row in rows if change.path in row["lines"] or own in row["case"]]
    cases, files = {row["case"] for row in reaching}, {file_of(row["case"]) for row in reaching}
    beside = [row for row in rows if file_of(row["case"]) in files and row["case"] not in cases]
    taken, total = [], 0.0
    for row in (*most_telling_first(reaching, own), *most_telling_first(beside, own)):
        total += row["seconds"]
        if total > seconds:
            break
        taken.append(row["case"])
    return taken


def most_telling_first(rows: list[dict], own: str) -> list[dict]:
    """The cheapest case of each function, then the next ones; the file `own` first, then what reaches least."""
    functions = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seconds"]):
        functions[row["case"].partition("[")[0]].append(row)
    width = {name: min(sum(map(len, row["lines"].values())) for row in each) for name, each in functions.items()}
    best = sorted(functions, key=lambda name: (own not in name, width[name]))
    return [row for turn in zip_longest(*(functions[each] for each in best)) for row in turn if row is not None]


def file_of(case: str) -> str:
    return case.partition("::")[0]


def tried(change: Change, rows: list[dict], seconds: float, previous: str | None) -> dict[str, Any]:
    """What became of a change: killed, by which case, or survived, after how many cases."""
    cases = in_order(change, rows, seconds)
    known = [previous] if previous in {row["case"] for row in rows} else []
    rounds = [known, cases[:25], cases[25:]]
    start, count = time.monotonic(), 0
    with copied() as copy:
        file = copy / change.path
        file.write_text(change.applied(file.read_text(encoding="utf-8")), encoding="utf-8")
        failed = copy / "failed.txt"
        for each in filter(None, rounds):
            files = sorted(set(map(file_of, each)))
            code = tested(copy, ["-x", "--timeout=60", *files], [Chosen(each, failed)], 60 + 2 * seconds)
            count += len(each)
            if code != pytest.ExitCode.OK:
                by = (
                    failed.read_text().splitlines()[0]
                    if failed.exists()
                    else "collection"
                    if code is not None
                    else "timeout"
                )
                return {"result": "killed", "by": by, "seconds": round(time.monotonic() - start, 1)}
    return {"result": "survived", "cases": count, "seconds": round(time.monotonic() - start, 1)}


def proving_nothing(results: Iterable[dict]) -> set[str]:
    """The cases that killed a change and fail without it too, as one that needs another case before it."""
    cases = sorted({row["by"] for row in results if "::" in row.get("by", "")})
    with copied() as copy:
        failed = copy / "failed.txt"
        tested(copy, ["--timeout=60", *sorted(set(map(file_of, cases)))], [Chosen(cases, failed)], float("inf"))
        return set(failed.read_text().splitlines()) if failed.exists() else set()


def read(path: Path | None) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def load() -> None:
    """Imports what takes long and is not ours, for the forks to have."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    import diffusers
    import hypothesis  # noqa: F401
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import torch

    torch.set_num_threads(1)
    for name in ("FluxPipeline", "FluxControlNetPipeline", "WanPipeline", "StableDiffusion3Pipeline", "ZImagePipeline"):
        getattr(diffusers, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["map", "list", "run"])
    parser.add_argument("--map", type=Path, help="the file that `map` writes and `run` reads")
    parser.add_argument("--results", type=Path, help="where `run` appends a line of JSON a change")
    parser.add_argument("--before", type=Path, help="results of other tests, whose killing cases are tried first")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of recorded time, the most that a change may take"
    )
    options, arguments = parser.parse_known_args()
    changes = chosen(options.count, options.seed)
    if options.what == "list":
        print(*changes, sep="\n")
        return
    load()
    if options.what == "map":
        options.map.unlink(missing_ok=True)
        with copied() as copy:
            for package in PACKAGES:
                for path in (copy / package).rglob("*.py"):
                    tree = Noting(str(path.relative_to(copy))).visit(ast.parse(path.read_text(encoding="utf-8")))
                    path.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
            tested(copy, arguments, [Reach(options.map.resolve())], float("inf"))
        return
    rows = read(options.map)
    before = {row["change"]: row.get("by") for row in read(options.before)}
    while True:
        done = {row["change"]: row for row in read(options.results)}
        for change in changes:
            if str(change) not in done:
                row = {"change": str(change)} | tried(change, rows, options.seconds, before.get(str(change)))
                done[str(change)] = row
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(row["result"], row["change"], row.get("by", ""), f"{row['seconds']} s", flush=True)
        unfit = proving_nothing(done.values())
        if not unfit:
            break
        print("fail on unchanged code, and are left out:", *sorted(unfit), sep="\n", flush=True)
        rows = [row for row in rows if row["case"] not in unfit]
        kept = [row for row in done.values() if row.get("by") not in unfit]
        options.results.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    survived = [row["change"] for row in done.values() if row["result"] == "survived"]
    print(f"{len(survived)} of {len(done)} survived", *survived, sep="\n")


if __name__ == "__main__":
    main()
