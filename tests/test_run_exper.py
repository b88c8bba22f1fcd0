"""run_exper.sh, with a stand-in for the environment that it runs in: what it starts, and what it says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from repository import REPOSITORY

MAKEFILE = '.venv/eval.stamp:\n\t@echo made "$(CURDIR)"\n'
PYTHON = """#!/bin/bash
printf '%s\\n' "$PWD" "$PYTHONPATH" "$@"
exit "${CODE:-0}"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the script, whose python only tells where and how it was started."""
    folder = tmp_path / "a clone"
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(REPOSITORY / "run_exper.sh", folder)
    (folder / "Makefile").write_text(MAKEFILE)
    python = folder / ".venv/bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return folder


def run(clone: Path, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    variables = ("EXPERIMENTS", "MODEL", "LIMIT", "OUT", "LAUNCHER", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in variables}
    command = ["bash", str(clone / "run_exper.sh"), *arguments]
    environment = {**inherited, **environment}
    return subprocess.run(command, cwd=cwd or clone, env=environment, capture_output=True, text=True, timeout=30)


def started(process: subprocess.CompletedProcess) -> list[list[str]]:
    """What each python was started with, without `-P -m eval`."""
    starts = process.stdout.split("-P\n-m\neval\n")[1:]
    return [start.partition("\ntables and figures")[0].splitlines() for start in starts]


def test_without_anything_it_runs_all_experiments_on_the_embedded_model(clone):
    process = run(clone)
    assert process.returncode == 0
    assert started(process) == [["model=flux-mini", "launcher=local", "out=results/flux-mini"]]
    assert process.stdout.splitlines()[-1] == (
        "tables and figures: results/flux-mini/*/, all on one page: results/flux-mini/report.html"
    )


def test_its_variables_become_fields_and_its_arguments_stay(clone):
    variables = {"EXPERIMENTS": "table1, frontier", "MODEL": "flux1-dev", "LIMIT": "8", "OUT": "a b", "LAUNCHER": "ray"}
    process = run(clone, "prompts=cute80", "~experiments.table1.settings.ClusCa", **variables)
    assert started(process) == [
        [
            *("model=flux1-dev", "launcher=ray", "experiment=[table1,frontier]", "limit=8"),
            *("prompts=cute80", "~experiments.table1.settings.ClusCa", "out=a b"),
        ]
    ]


def test_experiments_of_other_embedded_models_have_results_of_their_own(clone):
    experiments = {"EXPERIMENTS": "video table1 superresolution frontier"}
    assert started(run(clone, **experiments)) == [
        ["model=hunyuan-mini", "launcher=local", "experiment=[video]", "out=results/hunyuan-mini"],
        ["model=flux-mini", "launcher=local", "experiment=[table1,frontier]", "out=results/flux-mini"],
        [
            "model=flux-mini-upscaler",
            "launcher=local",
            "experiment=[superresolution]",
            "out=results/flux-mini-upscaler",
        ],
    ]
    folders = [arguments[-1] for arguments in started(run(clone, "out=all", **experiments))]
    assert folders == ["out=all/hunyuan-mini", "out=all/flux-mini", "out=all/flux-mini-upscaler"]
    assert [arguments[0] for arguments in started(run(clone, MODEL="flux1-dev", **experiments))] == ["model=flux1-dev"]


def test_it_works_from_any_directory(clone, tmp_path):
    """Results go to where the user is; packages and modules come from the clone, which is installed first."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    process = run(clone, cwd=elsewhere)
    assert process.stdout.splitlines()[:2] == [str(elsewhere), str(clone)]
    assert process.stderr == f"made {clone}\n"


@pytest.mark.parametrize("code", [1, 2, 130])
def test_its_exit_code_is_that_of_the_run(clone, code):
    process = run(clone, CODE=str(code))
    assert process.returncode == code
    assert ("report.html" in process.stdout) == (code == 1)  # tables are made, and lack what failed


def test_a_failed_installation_ends_it(clone):
    (clone / "Makefile").write_text(".venv/eval.stamp:\n\t@false\n")
    process = run(clone)
    assert process.returncode != 0
    assert process.stdout == ""


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_its_help_names_every_variable_and_installs_nothing(clone, flag):
    process = run(clone, flag)
    assert (process.returncode, process.stderr) == (0, "")
    assert all(name in process.stdout for name in ("EXPERIMENTS", "MODEL", "LIMIT", "OUT", "LAUNCHER", "PYTHON"))


def test_what_is_no_field_is_refused(clone):
    process = run(clone, "table1")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "run_exper.sh: error: table1 is not FIELD=VALUE; see bash run_exper.sh --help\n"
