"""The wheel, and the program run from it alone; `make package` installs it with its libraries as well."""

import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from repository import REPOSITORY

import h2cache

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
SNIPPET = """
import sys, torch, h2cache
folder = sys.argv.pop()
from diffusers import FluxPipeline
from h2cache.baselines import TeaCacheConfig
from h2cache.eval.cli.program import main
assert "site" in h2cache.__file__, h2cache.__file__
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
with h2cache.apply(pipe, h2cache.H2CacheConfig(tau1=0.15, tau2=0.22)) as handle:
    pipe("a cat", num_inference_steps=4, height=32, width=32, max_sequence_length=40)
assert handle.summary()["steps"] == 4
"""


def requirements(*files: str) -> set[str]:
    """What these files ask for, without the files that they include."""
    lines = [line.split("#")[0].strip() for file in files for line in (REPOSITORY / file).read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-r")}


def test_the_package_asks_for_what_the_requirements_files_ask_for():
    extras = PROJECT["optional-dependencies"]
    assert set(PROJECT["dependencies"]) == requirements("requirements.txt")
    assert {*extras["eval"], *extras["peers"]} == requirements("requirements-eval.txt")
    assert set(extras["ray"]) <= requirements("requirements-dev.txt")
    bounded = [name for names in (PROJECT["dependencies"], *extras.values()) for name in names]
    assert all(re.search(r">=\d", name) for name in bounded)


def run_py_without(names: set[str], words: list[str]) -> None:
    """`python run.py *words` in this process, where importing these packages fails and ours are imported anew."""
    for module in list(sys.modules):
        if module.split(".")[0] in {"h2cache", "baselines", "eval", "run", *names}:
            del sys.modules[module]
    sys.modules.update(dict.fromkeys(names))
    sys.argv = ["run.py", *words]
    runpy.run_path(str(REPOSITORY / "run.py"), run_name="__main__")


def test_run_py_needs_no_package_that_make_run_does_not_install(tiny_pipe_folder, tmp_path):
    """In a copy of this process, in which torch and diffusers are already there."""
    names = {re.split("[><=,]", line)[0].replace("-", "_") for line in requirements("requirements-eval.txt")}
    missing = names - {"setuptools", "scipy"}  # scikit-image brings scipy
    call = ["model.height=32", "model.width=32", "model.num_inference_steps=2", "model.max_sequence_length=40"]
    words = [f"model.path={tiny_pipe_folder}", *call, "prompt=a sign", f"out={tmp_path / 'a.png'}"]
    program = multiprocessing.get_context("fork").Process(target=run_py_without, args=(missing, words))
    program.start()
    program.join(timeout=200)
    assert program.exitcode == 0
    assert "datasets" in missing and (tmp_path / "a.png").is_file()


def test_the_version_is_in_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+", h2cache.__version__)
    assert re.search(
        rf"^## (Unreleased|{re.escape(h2cache.__version__)})", (REPOSITORY / "CHANGELOG.md").read_text(), re.M
    )


@pytest.mark.parametrize("name", ["pyproject.toml", "CITATION.cff", "docs/cite.md"])
def test_the_version_is_written_in_one_place(name):
    assert h2cache.__version__ not in (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installation of the wheel, made from a copy of the tracked files, without a package index."""
    folder = tmp_path_factory.mktemp("package")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the files of the repository are not known: it is no clone")
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("h2cache/", "baselines/", "eval/", "configs/", "assets/p")) or "/" not in name:
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "source")]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")  # an installation, but for the command `h2cache`
    return folder


def run(installed: Path, *command: str) -> str:
    """What a command prints that finds the wheel and the libraries of this environment, far from the clone."""
    environment = {**os.environ, "PYTHONPATH": str(installed / "site"), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-P", *command], cwd=installed, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_claims_one_name_and_has_no_weights(installed):
    (wheel,) = installed.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"h2cache"}
    tracked = {
        f"h2cache/{path.relative_to(REPOSITORY)}".replace("h2cache/h2cache/", "h2cache/")
        for folder in ("h2cache", "baselines", "eval", "configs")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert tracked <= set(names)
    assert {"h2cache/py.typed", "h2cache/assets/prompts/cute80.jsonl"} <= set(names)
    assert not [name for name in names if name.endswith(".safetensors")]


@pytest.mark.thorough
def test_the_program_and_the_library_work_from_the_wheel(installed, tiny_pipe_folder):
    told = " ".join(run(installed, "-c", SNIPPET, "doctor", str(tiny_pipe_folder)).split())
    assert "flux1-dev" in told and "flux-mini" in told and "git clone" in told  # where the embedded weights are
