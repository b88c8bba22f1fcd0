"""The program `h2cache` as its user meets it."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageChops
from repository import REPOSITORY

from h2cache import Plan
from h2cache.eval.cli import models, program
from h2cache.eval.models import pipelines

SMALL = ["model.height=32", "model.width=32", "model.max_sequence_length=40", "model.dtype=float32"]
COMMANDS = "generate compare bench rescore votes tune calibrate demo doctor plan".split()


@pytest.fixture
def types(tmp_path, monkeypatch, capsys):
    """`types("doctor")` runs the program in this process, in the test's folder: exit code, stdout, stderr."""

    def types(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["h2cache", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            program.main()
            raise SystemExit(0)
        return exit.value.code or 0, *capsys.readouterr()

    return types


def test_the_help_fits_a_screen_and_takes_half_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys; from h2cache.eval.cli.program import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "--help"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert all(command in told for command in COMMANDS)
    lines = told.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", [*COMMANDS, "plan show"])
def test_each_command_has_a_help_that_fits_a_screen(types, command):
    code, told, stderr = types(*command.split(), "--help")
    assert (code, stderr) == (0, "")
    assert len(told.splitlines()) <= 30


def test_the_demo_says_what_it_lacks(types, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, told, stderr = types("demo")
    assert (code, told) == (2, "") and "gradio" in stderr and "pip install 'h2cache[demo]'" in stderr


def test_it_draws_any_pipeline_from_its_folder(types, tiny_pipe, tiny_pipe_folder, tmp_path):
    """The image is that of the library, for a prompt that Hydra would read otherwise."""
    prompt = "a cat, it's {red}"
    arguments = ["--model", tiny_pipe_folder, "--method", "none", "--seed", 3, "--steps", 4, "-o", "cat.png", *SMALL]
    code, told, _ = types("generate", prompt, *arguments)
    assert code == 0 and "cat.png" in told and "replaced" not in told
    call = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 40}
    expected = tiny_pipe(prompt, generator=torch.Generator().manual_seed(3), **call).images[0]
    assert not ImageChops.difference(Image.open(tmp_path / "cat.png").convert("RGB"), expected).getbbox()
    arguments[arguments.index("none")] = "h2cache"
    assert "replaced  cat.png" in types("compare", prompt, *arguments)[1]
    assert (tmp_path / "cat.compare.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "a cat", "seed=abc"], "seed=abc"),
        (["generate", "a cat", "--out", "cat.xyz"], "out=cat.xyz"),
        (["generate", "a cat", "method.tau1=abc", "--method", "h2cache"], "tau1='abc'"),
        (["generate", "a cat", "model.height=tall"], "height='tall'"),
        (["compare", "a cat", "--model", "nope"], "model=nope"),
        (["generate", "a cat", "--seed", "-1"], "--seed"),
        (["tune"], "--psnr"),
        (["tune", "--psnr", "30", "--prompts", "none.txt"], "none.txt"),
        (["plan", "show", "none.json"], "none.json"),
    ],
)
def test_what_is_wrong_is_said(types, arguments, said):
    code, stdout, stderr = types(*arguments)
    assert (code, stdout) == (2, "") and said in stderr


@pytest.mark.parametrize("typo", ["seed=abc", "out=foo.xyz", "compare=maybe", "doctor=3", "model.width=wide"])
def test_a_wrong_value_is_refused_without_torch(typo):
    """Importing torch and diffusers takes many seconds on a slow machine."""
    code = "import sys, run\ntry: run.main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, typo], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and typo.partition("=")[2] in done.stderr, done.stderr


def test_a_model_by_its_hub_id(tmp_path, monkeypatch):
    """One that configs/model knows gets its settings; any other those of its own pipeline."""
    assert models.overrides("flux1-dev") == ["model=flux1-dev"]
    assert models.overrides("Qwen/Qwen-Image") == ["model=qwen-image"]
    folder, chosen, path = models.overrides(str(tmp_path))
    assert "searchpath" in folder and chosen == "model=diffusers" and path == f"model.path='{tmp_path}'"
    assert models.overrides("somebody/model")[-1] == "model.hub_id='somebody/model'"


def test_tuning_finds_a_setting_and_says_how_to_use_it(types, tiny_pipe_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    fields = ["--model", tiny_pipe_folder, "--prompts", "prompts.txt", "--trials", 2, *SMALL]
    code, told, stderr = types("tune", "--speedup", "1.05", *fields, "model.num_inference_steps=6")
    assert code == 0, stderr
    assert "best: tau" in told and "use it with: method.tau1=" in told and told.count("times fewer blocks") >= 2
    assert "/" not in stderr


def test_tuning_counts_its_steps_in_a_terminal(types, tiny_pipe_folder, monkeypatch):
    """Thresholds at four ratios, three settings each at most, once without a cache; two prompts; two runs before."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    fields = ["--model", tiny_pipe_folder, "--trials", 2, *SMALL, "model.num_inference_steps=6"]
    code, told, stderr = types("tune", "--speedup", "1.05", *fields)
    counts = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)/(\d+)", stderr)]
    assert code == 0 and {total for _, total in counts} == {6 * (2 + (4 * 3 + 1) * 2)}
    assert 0 < counts[0][0] <= counts[-1][0] <= counts[-1][1] and "best: tau" in told


def test_loading_shows_one_bar_of_bytes(types, tiny_pipe_folder, monkeypatch):
    """And the libraries' own bars are not beside it."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    pipelines._load.cache_clear()
    code, _, stderr = types("generate", "--model", tiny_pipe_folder, "--steps", 2, "a cat", *SMALL)
    assert code == 0, stderr
    assert re.search(r"loading \w+.*?/[\d.]+ [kM]B", stderr) and "Loading" not in stderr


def test_a_plan_is_shown(types, tmp_path):
    plan = Plan.taylor(10, [0, 4, 7])
    plan.save(tmp_path / "plan.json")
    code, told, _ = types("plan", "show", "plan.json")
    assert code == 0 and "3 of 10 steps: 0, 4, 7" in told and "#...#..#.." in told
    (tmp_path / "no.json").write_text("{}")
    code, _, stderr = types("plan", "show", "no.json")
    assert code == 2 and stderr.startswith("h2cache plan show: error: no.json")


@pytest.mark.parametrize("name", ["fast", "balanced", "careful"])
def test_presets_are_h2cache_at_other_thresholds(name):
    """In the order of their names, for models with thresholds of their own too."""
    written = {path.parent.name: OmegaConf.load(path) for path in Path(REPOSITORY / "configs/preset").glob("*/*.yaml")}
    assert written["careful"].tau1 < written["balanced"].tau1 < written["fast"].tau1
    assert (REPOSITORY / f"configs/method/{name}.yaml").is_file()
