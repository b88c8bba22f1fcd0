"""`python -m tools.plans`: what it says of a plan, and what it says where there is none."""

import json

import pytest
from plans import PLAN

from h2cache import Plan
from h2cache.plans.promise import Promise
from tools.plans import main

PROMISE = Promise("PSNR", 40.0, 0.95, 0.9, "uncached", 80, 1)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.promising(PROMISE).save(path)
    return str(path)


def test_show_says_the_steps_and_the_promise(file, capsys):
    assert main(["show", file]) == 0
    said = capsys.readouterr().out
    assert "4 of 8 steps (2x fewer): 0, 1, 3, 6" in said and str(PROMISE) in said


def test_export_writes_to_stdout(tmp_path, capsys):
    path = tmp_path / "plan.json"
    Plan.adams_bashforth(4).save(path)
    assert main(["export", str(path), "--format", "sigmas"]) == 0
    assert json.loads(capsys.readouterr().out) == [1.0, 0.75, 0.5, 0.25]
    assert main(["export", str(path), "--format", "k-diffusion"]) == 0
    assert "def sample_plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "reason"), [("none.json", None, "No such file"), ("bad.json", "{}", "no plan")]
)
def test_what_is_no_plan_is_one_sentence(tmp_path, capsys, name, text, reason):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["show", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert reason in said and len(said.splitlines()) == 1


def test_a_plan_without_noise_levels_cannot_be_exported(file, capsys):
    assert main(["export", file]) == 2
    assert "noise levels" in capsys.readouterr().err
