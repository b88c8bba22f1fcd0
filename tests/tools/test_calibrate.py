"""`python -m tools.calibrate`: what it refuses before it draws anything, what it says, and what it writes."""

import re
import runpy
import sys

import pytest
import torch
from tiny import TEXT_TOKENS

from h2cache import AtLeast, Plan
from h2cache.eval.cli import calibrate
from h2cache.eval.errors import UserError
from h2cache.eval.models.pipelines import ModelConfig
from h2cache.plans import Calibration

SEARCH = dict(reference="uncached", seed=1, history=2, ridge=1e-4, tries=2, few=2, rounds=1, batch_size=2)
PROMPTS = ["a red sign", "TEA", "a blue label", "BREAD"]


def settings(folder, **changes):
    """For the embedded model, of which nothing is loaded before the settings are found sound."""
    model = ModelConfig("assets/flux-mini", None, "float32", "cpu", "none", 32, 32, 8, 3.5, TEXT_TOKENS)
    values = dict(name="tiny", kind="plan", model=model, budgets=(2, 4), steps=8, quality=None, images=4)
    values |= dict(prompts_file=None, folder=folder, overwrite=False, search=dict(SEARCH)) | changes
    return calibrate.Settings(**values)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        (dict(budgets=(0.5,)), "budget="),
        (dict(budgets=(9,)), "budget="),
        (dict(budgets=()), "budget="),
        (dict(steps=0), "steps="),
        (dict(images=0), "images="),
        (dict(kind="other"), "kind="),
        (dict(search=SEARCH | {"reference": "truth"}), "reference="),
        (dict(search=SEARCH | {"rounds": -1}), "rounds="),
        (dict(search=SEARCH | {"batch_size": 0}), "batch_size="),
        (dict(quality=AtLeast(psnr=40)), "images="),
    ],
)
def test_what_is_refused_names_the_option(tmp_path, changes, option):
    with pytest.raises(UserError, match=option):
        settings(tmp_path, **changes)


def test_a_plan_that_is_there_is_not_overwritten_unasked(tmp_path):
    target = tmp_path / "tiny-4.json"
    target.write_text("mine")
    with pytest.raises(UserError, match="overwrite=true"):
        settings(tmp_path)
    assert target in settings(tmp_path, overwrite=True).targets and target.read_text() == "mine"


def test_each_kind_of_plan_has_a_name_of_its_own(tmp_path):
    def names(**changes):
        return [target.name for target in settings(tmp_path, **changes).targets]

    assert names() == ["tiny-2.json", "tiny-4.json"]
    assert names(search=SEARCH | {"reference": "converged"})[0] == "tiny-2-converged.json"
    assert names(steps=6)[0] == "tiny-2-6steps.json" and names(kind="l2p")[0] == "tiny-2-l2p.json"
    assert names(quality=AtLeast(psnr=40, fraction=0.5, confidence=0.5)) == ["tiny-40dB.json"]


def test_plans_are_written_after_the_cost_was_said(tmp_path, tiny_pipe, monkeypatch, capsys):
    """With the tiny pipeline in the place of the model; what it says is what `Calibration` says."""
    monkeypatch.setattr(calibrate, "load_pipeline", lambda model, on_bytes: tiny_pipe)
    asked = settings(tmp_path)
    said = calibrate.run(asked, lambda *of: PROMPTS)
    calls = dict(asked.model.call_arguments)
    calibration = Calibration(tiny_pipe, PROMPTS, calls.pop("num_inference_steps"), **asked.search, **calls)
    expected = calibration.recording + calibration.evaluations(2) + calibration.evaluations(4)
    assert f"about {expected:,} evaluations" in capsys.readouterr().out
    assert [len(Plan.load(target).computed) for target in asked.targets] == [4, 2]
    assert len(said) == 2 and "4 of 8 steps computed" in said[0]


def test_it_counts_evaluations_in_a_terminal(tmp_path, tiny_pipe, monkeypatch, capsys):
    """From the recording to the last plan: at most as many as it has said."""
    monkeypatch.setattr(calibrate, "load_pipeline", lambda model, on_bytes: tiny_pipe)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    asked = settings(tmp_path)
    calibrate.run(asked, lambda *of: PROMPTS)
    counts = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)/(\d+)", capsys.readouterr().err)]
    expected = calibrate.expected_evaluations(asked)
    assert {total for _, total in counts} == {expected} and expected / 2 < counts[-1][0] <= expected
    assert not tiny_pipe.transformer._forward_hooks


def test_the_plans_of_other_papers_are_written_too(tmp_path, tiny_pipe, monkeypatch):
    monkeypatch.setattr(calibrate, "load_pipeline", lambda model, on_bytes: tiny_pipe)
    said = calibrate.run(settings(tmp_path, kind="dpcache"), lambda *of: PROMPTS)
    assert said[0].startswith(f"{tmp_path / 'tiny-2-dpcache.json'}: 4 of 8 steps computed; steps 0")
    assert Plan.load(tmp_path / "tiny-2-dpcache.json").notes["method"] == "DPCache"


def test_a_batch_that_does_not_fit_is_halved(tiny_pipe, monkeypatch):
    real = type(tiny_pipe).__call__

    def small(self, prompts, **others):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return real(self, prompts, **others)

    monkeypatch.setattr(type(tiny_pipe), "__call__", small)
    call = dict(height=32, width=32, guidance_scale=3.5, num_inference_steps=8)
    batch, per_step, seconds = calibrate._fitting_batch(tiny_pipe, PROMPTS * 2, 8, call)
    assert (batch, per_step) == (2, 1) and seconds > 0


@pytest.mark.parametrize(("fields", "names"), [(["budget=0.5"], "budget="), (["kind=l2p", "tries=-1"], "tries=")])
def test_the_command_line_says_one_sentence_and_exits_with_2(tmp_path, monkeypatch, capsys, fields, names):
    monkeypatch.setattr(sys, "argv", ["calibrate", *fields, f"out={tmp_path}"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("tools.calibrate", run_name="__main__")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calibrate: error")]
    assert exit.value.code == 2 and len(lines) == 1 and names in lines[0]
