"""In a clone, `baselines` and `eval` are `h2cache.baselines` and `h2cache.eval`, whatever is imported first."""

import subprocess
import sys

from repository import REPOSITORY

IMPORTS = ["baselines.teacache", "eval.report", "h2cache.baselines.teacache"]
PROGRAM = """
import importlib, os, sys
import torch  # once, before the copies of this process that import ours, each another module first


def imported(first):
    importlib.import_module(first)
    import baselines, baselines.teacache, eval.report, eval.files, h2cache.baselines.teacache, h2cache.eval.files
    assert baselines is h2cache.baselines and eval is h2cache.eval
    assert baselines.teacache is h2cache.baselines.teacache
    assert eval.files is h2cache.eval.files
    from baselines import HiCacheConfig
    assert HiCacheConfig is h2cache.baselines.HiCacheConfig and HiCacheConfig.__module__ == "h2cache.baselines.hicache"
    loaded = {}
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        if spec and spec.name.startswith(("h2cache", "baselines", "eval")):
            assert loaded.setdefault(spec.origin, module) is module, spec
    assert len(loaded) > 8


def ours():
    return [name for name in sys.modules if name.split(".")[0] in ("h2cache", "baselines", "eval")]


assert not ours()
for first in sys.argv[1:]:
    child = os.fork()
    if not child:
        imported(first)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, first
    assert not ours()
print("all of", *sys.argv[1:])
"""


def test_both_names_are_one_module(tmp_path):
    """Each in a process of its own, and warnings of a module whose names disagree are errors."""
    command = [sys.executable, "-P", "-W", "error::ImportWarning", "-c", PROGRAM, *IMPORTS]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"all of {' '.join(IMPORTS)}" in done.stdout


def test_somebody_elses_package_of_that_name_is_left_alone(tmp_path):
    """`baselines` and `eval` of another folder, where the clone is not what Python looks at first."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/__init__.py").touch()
    (tmp_path / "eval/other.py").write_text("here = True\n")
    program = "import h2cache.eval.files, eval, eval.other; assert eval.other.here and eval is not h2cache.eval"
    environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    subprocess.run([sys.executable, "-P", "-c", program], env=environment, check=True)


def test_importing_the_package_needs_no_torch():
    """Programs say what is wrong with a command before they load it."""
    program = "import sys, h2cache; assert 'torch' not in sys.modules and 'apply' in dir(h2cache)"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
