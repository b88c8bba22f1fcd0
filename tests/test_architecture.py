"""The shape of the code: which way dependencies point, and what the engine may not know.

Reads the source as syntax trees, so that docstrings and comments may say what code may not do.
"""

import ast
import importlib
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

from repository import REPOSITORY

import h2cache

ENGINE = sorted((REPOSITORY / "h2cache").rglob("*.py"))
BASELINES = sorted((REPOSITORY / "baselines").rglob("*.py"))
EVAL = sorted((REPOSITORY / "eval").rglob("*.py"))
ADAPTERS = REPOSITORY / "h2cache" / "adapters"


def every(paths: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """One test of a rule for all these files; where it fails, a note names the file."""

    def of_all(rule: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            assert paths
            for path in paths:
                try:
                    rule(path)
                except AssertionError as error:
                    error.add_note(f"in {path.relative_to(REPOSITORY)}")
                    raise

        return test

    return of_all


every_engine_file = every(ENGINE)
every_library_file = every(ENGINE + BASELINES)


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def statements(path: Path) -> list[ast.AST]:
    """The nodes that run: without the bodies of `if TYPE_CHECKING:`, which no program sees."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return list(ast.walk(tree))


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it. Relative imports stay inside the package.

    `h2cache.baselines` and `h2cache.eval` count as `baselines` and `eval`, the folders that hold them.
    """
    names = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    folders = re.compile(r"h2cache\.(?=(baselines|eval)\b)")
    return {folders.sub("", name).split(".")[0] for name in names}


def part_of(path: Path) -> str:
    """The part of `h2cache` that a file belongs to: a subpackage, or a module beside them."""
    return path.relative_to(REPOSITORY / "h2cache").with_suffix("").parts[0]


def imported_parts(path: Path) -> set[str]:
    """The parts of `h2cache` that a file imports when it runs, anywhere in it, also by an absolute import."""
    package = path.relative_to(REPOSITORY).parent.parts
    parts = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
        else:
            continue
        parts |= {name[1] for name in names if name[0] == "h2cache" and len(name) > 1}
    return parts


@every_engine_file
def test_the_engine_depends_on_nothing_of_ours(path):
    assert imported_packages(path).isdisjoint({"baselines", "eval", "tools", "benchmarks", "run", "tests"})


@every(BASELINES)
def test_baselines_depend_on_the_engine_alone(path):
    assert imported_packages(path).isdisjoint({"eval", "tools", "benchmarks", "run", "tests"})


@every(EVAL)
def test_the_evaluation_depends_on_no_tool(path):
    assert imported_packages(path).isdisjoint({"tools", "benchmarks", "run", "tests"})


# Which parts of `h2cache` each part may import beside itself. `config` and `trace` are leaves.
MAY_IMPORT = {
    "clone": set(),
    "policy": set(),
    "config": {"policy"},
    "trace": {"policy"},
    "adapters": {"policy"},
    "runtime": {"policy", "config", "trace", "adapters"},
    "h2": {"policy", "config"},
    "handle": {"policy", "config", "trace", "adapters", "runtime"},
    "plans": {"policy", "config", "trace", "adapters", "runtime", "handle"},
    "tuning": {"policy", "config", "trace", "handle"},
}
MAY_IMPORT["__init__"] = set(MAY_IMPORT)


@every_engine_file
def test_imports_point_one_way(path):
    """No exception for imports inside functions, which would hide a circle."""
    assert imported_parts(path) <= MAY_IMPORT[part_of(path)] | {part_of(path)}


def test_no_circle_between_the_parts():
    """What a part may import, and what that may import, never leads back to it."""
    for part, below in MAY_IMPORT.items():
        reached = set(below)
        while True:
            further = set().union(reached, *(MAY_IMPORT[name] for name in reached))
            if further == reached:
                break
            reached = further
        assert part not in reached


def test_importing_is_light():
    """In a process of its own: whoever embeds the engine does not get pipelines, plots or tables with it."""
    heavy = ("diffusers.pipelines", "transformers", "hydra", "omegaconf", "pandas", "matplotlib", "PIL")
    imports = "import sys, h2cache.handle, baselines"
    program = f"{imports}; print([name for name in sys.modules if name.startswith({heavy!r})])"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_public_names():
    assert set(h2cache.__all__) >= {"H2CacheConfig", "apply"}
    assert all(hasattr(h2cache, name) for name in h2cache.__all__)


@every_engine_file
def test_no_file_over_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


MUTABLE = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp


def assignments(body: list[ast.stmt]) -> list[tuple[str, ast.expr]]:
    """The names that a module or class body assigns to, each with its value."""
    found = []
    for statement in body:
        if isinstance(statement, ast.Assign):
            found += [(ast.unparse(target), statement.value) for target in statement.targets]
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            found.append((ast.unparse(statement.target), statement.value))
    return found


def is_constant(path: Path, name: str) -> bool:
    """Whether what a call at module level made is a logger or a frozen dataclass."""
    module = importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    made = getattr(module, name)
    return isinstance(made, logging.Logger) or (is_dataclass(made) and type(made).__dataclass_params__.frozen)


@every_library_file
def test_no_global_state(path):
    """No `global`, and nothing at the level of a module or class that a run could write to.

    The registry of adapters is the exception: `h2cache.register_adapter` is about all that comes after it.
    """
    assert not [node for node in nodes(path) if isinstance(node, ast.Global | ast.Nonlocal)]
    module = ast.parse(path.read_text(encoding="utf-8"))
    for name, value in assignments(module.body):
        assert not isinstance(value, MUTABLE) or name == "__all__", name
        assert not isinstance(value, ast.Call) or is_constant(path, name), name
    classes = [node for node in ast.walk(module) if isinstance(node, ast.ClassDef)]
    for owner in classes:
        assert not [name for name, value in assignments(owner.body) if isinstance(value, MUTABLE)], owner.name
    written = {
        node.value.id
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
    }
    written = {name for name in written if name[:1].isupper() or name == "cls"}  # attributes of classes
    assert written <= ({"Registry"} if path == ADAPTERS / "__init__.py" else set())


METHOD_WORDS = {
    *("h2", "h2cache", "block", "blockcache", "firstblock", "teacache", "taylorseer", "hicache", "clusca", "hiclusca"),
    *("none", "reuse", "taylor", "hermite", "auto", "interval", "structure", "detail", "network", "both"),
    *("double", "single", "modules", "module", "stage", "output", "input"),
    *("h2cacheconfig", "blockcacheconfig", "teacacheconfig", "taylorseerconfig", "hicacheconfig", "cluscaconfig"),
}


def compared_strings(path: Path) -> set[str]:
    """String literals that code branches on: compared, matched, or passed to startswith and the like."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("swith"):
            operands = node.args
        else:
            continue
        for operand in operands:
            found |= {
                part.value
                for part in ast.walk(operand)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            }
    return found


@every([path for path in ENGINE if path.name != "h2.py"])
def test_no_method_is_told_apart_by_name(path):
    """A method is a composition. Its own file (h2.py) reads its own settings; nobody else asks which method it is."""
    words = {word.lower().replace("-", "").replace("_", "") for word in compared_strings(path)}
    assert words.isdisjoint(METHOD_WORDS)
    configs = {"H2CacheConfig", "BlockCacheConfig", "TeaCacheConfig", "TaylorSeerConfig", "HiCacheConfig"}
    configs.add("ClusCaConfig")
    if path.name != "__init__.py":  # the package exports what it contains
        assert configs.isdisjoint({node.id for node in nodes(path) if isinstance(node, ast.Name)})


@every_library_file
def test_nothing_is_counted_that_can_be_derived(path):
    """FLUX.1-dev's 19 + 38 blocks, 4096 + 512 tokens and width 3072 occur in configurations and tests only."""
    numbers = {node.value for node in nodes(path) if isinstance(node, ast.Constant) and isinstance(node.value, int)}
    assert numbers.isdisjoint({18, 19, 37, 38, 56, 57, 512, 3072, 4096, 4608})


@every([path for path in ENGINE if not path.is_relative_to(ADAPTERS)])
def test_only_adapters_know_a_transformer(path):
    """Neither as a name nor in a string. Plans alone may import diffusers beside them, for its schedulers."""
    known = nodes(path)
    names = {node.attr for node in known if isinstance(node, ast.Attribute)}
    names |= {node.id for node in known if isinstance(node, ast.Name)}
    names |= {alias.name for node in known if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not [name for name in names if re.search(r"[23]DModel|transformer_blocks$", name)]
    assert part_of(path) == "plans" or "diffusers" not in imported_packages(path)


@every([path for path in ENGINE + BASELINES if not path.is_relative_to(ADAPTERS)])
def test_only_adapters_name_a_class_in_a_string(path):
    """Messages and docstrings may; what code compares or looks up may not."""
    words = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier()
    }
    assert not [word for word in words if re.search(r"[23]DModel|Transformer2d|transformer_blocks", word)]


@every_library_file
def test_libraries_are_quiet(path):
    calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
