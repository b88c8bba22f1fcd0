"""The shape of the code: which way dependencies point, and what the engine may not know.

Reads the source as syntax trees, so that docstrings and comments may say what code may not do.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import h2cache

ENGINE = sorted((REPOSITORY / "h2cache").rglob("*.py"))
BASELINES = sorted((REPOSITORY / "baselines").rglob("*.py"))
ADAPTERS = REPOSITORY / "h2cache" / "adapters"


def every(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(REPOSITORY)))


every_engine_file = every(ENGINE)
every_library_file = every(ENGINE + BASELINES)


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it. Relative imports stay inside the package."""
    packages = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(node.module.split(".")[0])
    return packages


@every_engine_file
def test_the_engine_depends_on_nothing_of_ours(path):
    assert imported_packages(path).isdisjoint({"baselines", "eval", "tools", "benchmarks", "run", "tests"})


@every(BASELINES)
def test_baselines_depend_on_the_engine_alone(path):
    assert imported_packages(path).isdisjoint({"eval", "tools", "benchmarks", "run", "tests"})


@pytest.mark.parametrize("package", ["h2cache", "baselines"])
def test_importing_is_light(package):
    """In a process of its own: whoever embeds the engine does not get pipelines, plots or tables with it."""
    heavy = ("diffusers.pipelines", "transformers", "hydra", "omegaconf", "pandas", "matplotlib", "PIL")
    program = f"import sys, {package}; print([name for name in sys.modules if name.startswith({heavy!r})])"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_public_names():
    assert set(h2cache.__all__) >= {"H2CacheConfig", "apply"}
    assert all(hasattr(h2cache, name) for name in h2cache.__all__)


@every_engine_file
def test_no_file_over_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@every_library_file
def test_no_global_state(path):
    """No `global`, and nothing at module level that a run could write to."""
    assert not [node for node in nodes(path) if isinstance(node, ast.Global | ast.Nonlocal)]
    mutable = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp | ast.Call
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, mutable):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            assert [target.id for target in targets] == ["__all__"], f"line {statement.lineno}"


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
    names = {node.attr for node in nodes(path) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in nodes(path) if isinstance(node, ast.Name)}
    names |= {alias.name for node in nodes(path) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not [name for name in names if name.endswith("2DModel") or name.endswith("transformer_blocks")]
    assert "diffusers" not in imported_packages(path)


@every_library_file
def test_libraries_are_quiet(path):
    calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
