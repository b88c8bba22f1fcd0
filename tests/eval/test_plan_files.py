"""`h2cache plan show` and `export`: what they say of a plan, and what they say where there is none."""

import json

import pytest
from plans import PLAN

from h2cache import Plan
from h2cache.eval.cli.plans import export, show
from h2cache.plans.promise import Promise

PROMISE = Promise("PSNR", 40.0, 0.95, 0.9, "uncached", 80, 1)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.promising(PROMISE).save(path)
    return path


def refused(capsys, command, *arguments) -> str:
    """What it says as it exits with 2."""
    with pytest.raises(SystemExit) as exit:
        command(*arguments)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and len(said.splitlines()) == 1
    return said


def test_show_says_the_steps_and_the_promise(file, capsys):
    show(file)
    said = " ".join(capsys.readouterr().out.split())
    assert "4 of 8 steps: 0, 1, 3, 6" in said and "##.#..#." in said and str(PROMISE) in said


def test_export_writes_to_stdout(tmp_path, capsys):
    path = tmp_path / "plan.json"
    Plan.adams_bashforth(4).save(path)
    export(path, "sigmas")
    assert json.loads(capsys.readouterr().out) == [1.0, 0.75, 0.5, 0.25]
    export(path, "k-diffusion")
    assert "def sample_plan" in capsys.readouterr().out


def test_what_cannot_be_done_is_one_sentence(file, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{}")
    for command in (show, lambda path: export(path, "json")):
        assert "no plan" in refused(capsys, command, tmp_path / "bad.json")
    assert "noise levels" in refused(capsys, export, file, "json")
    assert "choose sigmas, k-diffusion, json" in refused(capsys, export, file, "yaml")
