"""run.py as its user meets it: what it shows, what it writes, and what it says when it cannot."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import FluxPipeline
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from repository import REPOSITORY
from rich.console import Console

import h2cache
import run
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig
from h2cache.eval.cli.generate import as_typed
from h2cache.eval.cli.terminal import sigmas
from h2cache.eval.cli.timeline import Timeline, decision_table
from h2cache.eval.files import atomic_files
from h2cache.eval.metrics.images import psnr, ssim

PROMPT = 'a sign, with "STOP" (it\'s red)'
CALL = {"height": 32, "width": 32, "num_inference_steps": 12, "max_sequence_length": 40}


def arguments_for(folder: Path) -> list[str]:
    """What makes run.py use the tiny pipeline in `folder`, with few steps."""
    return [f"model.path={folder}", *(f"model.{field}={value}" for field, value in CALL.items())]


def start(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """`python run.py *arguments`, typed in the folder `cwd`."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "run.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which jobs in a shell's background ignore
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


@pytest.fixture
def draws(tmp_path, monkeypatch, capsys):
    """`draws("seed=3")` runs run.py's main in this process, in the test's folder, and returns what it printed."""

    def draws(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        run.main()
        stdout, stderr = capsys.readouterr()
        assert stderr == ""
        return stdout

    return draws


@pytest.fixture
def fails(tiny_pipe_folder, tmp_path, monkeypatch, capsys):
    """`fails("seed=x")` runs run.py's main in this process and returns its one line on stderr.

    It has seen to it that the exit code is 2, that there is nothing else to read, and that no file was written.
    """

    def fails(*arguments: str, tiny: bool = True) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")
        monkeypatch.setattr(sys, "argv", ["run.py", *(arguments_for(tiny_pipe_folder) if tiny else []), *arguments])
        with pytest.raises(SystemExit) as exit:
            run.main()
        stdout, stderr = capsys.readouterr()
        assert (exit.value.code, stdout, list(tmp_path.iterdir())) == (2, "", [])
        assert stderr.startswith("run.py: error: ")
        assert stderr.count("\n") == 1
        return stderr

    return fails


def drawn_directly(pipe: FluxPipeline, seed: int) -> np.ndarray:
    return np.asarray(pipe(PROMPT, generator=torch.manual_seed(seed), guidance_scale=3.5, **CALL).images[0])


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_a_run_draws_what_the_library_draws_and_writes_it_down(draws, tiny_pipe, tiny_pipe_folder, tmp_path):
    """tests/test_package.py starts run.py as a program."""
    fields = ["method.tau1=0.25", "method.tau2=0.3", "seed=3"]
    stdout = draws(*arguments_for(tiny_pipe_folder), f"prompt={PROMPT}", *fields, "out=cat.png")

    with h2cache.apply(tiny_pipe, H2CacheConfig(tau1=0.25, tau2=0.3)) as handle:
        expected = drawn_directly(tiny_pipe, seed=3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cat.png", "cat.trace.csv", "cat.yaml"]
    assert np.array_equal(pixels(tmp_path / "cat.png"), expected)

    trace = pd.read_csv(tmp_path / "cat.trace.csv")
    pd.testing.assert_frame_equal(trace, handle.trace.to_pandas(), check_dtype=False)

    config = yaml.safe_load((tmp_path / "cat.yaml").read_text())
    assert (config["prompt"], config["seed"], config["method"]["tau1"]) == (PROMPT, 3, 0.25)
    assert config["model"]["num_inference_steps"] == 12

    assert PROMPT in stdout
    assert f"{handle.summary()['computed_fraction']:.1%} computed" in stdout
    assert f"at most {handle.summary()['max_speedup']:.2f}x" in stdout
    glyphs = {"warmup": "▓", "compute": "█", "hit": "·", "forced": "-"}
    for stage, rows in trace.groupby("stage"):
        assert f"{stage.ljust(11)}{''.join(map(glyphs.get, rows.decision))} " in stdout


def test_a_comparison_draws_both_and_says_how_far_apart_they_are(draws, tiny_pipe, tiny_pipe_folder, tmp_path):
    fields = ["method=block_cache", "method.threshold=0.4", "compare=true", f"out={tmp_path / 'pair.png'}"]
    stdout = draws(*arguments_for(tiny_pipe_folder), f"prompt={PROMPT}", *fields)

    pair = pixels(tmp_path / "pair.compare.png")
    baseline, cached = pair[:, :32], pair[:, -32:]
    assert np.array_equal(baseline, drawn_directly(tiny_pipe, seed=0))
    assert np.array_equal(cached, pixels(tmp_path / "pair.png"))
    assert not np.array_equal(baseline, cached)
    images = Image.fromarray(cached), Image.fromarray(baseline)
    assert f"PSNR {psnr(*images):.2f} dB, SSIM {ssim(*images):.4f}" in stdout
    assert "x with text encoding and VAE" in stdout


def test_a_multirun_keeps_its_jobs_apart_and_leaves_nothing_else(draws, tiny_pipe, tiny_pipe_folder, tmp_path):
    """A sweep over two methods, the prompt quoted for Hydra. The baseline's trace is there and empty."""
    quoted = PROMPT.replace('"', '\\"')
    arguments = [*arguments_for(tiny_pipe_folder), f'prompt="{quoted}"', "out=x.png"]
    stdout = draws(*arguments, "method=none,block_cache", "--multirun")
    names = [f"x-{job}.{suffix}" for job in (0, 1) for suffix in ("png", "trace.csv", "yaml")]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert np.array_equal(pixels(tmp_path / "x-0.png"), drawn_directly(tiny_pipe, seed=0))

    baseline, cached = (pd.read_csv(tmp_path / f"x-{job}.trace.csv") for job in (0, 1))
    assert list(baseline.columns) == list(cached.columns)
    assert (len(baseline), len(cached)) == (0, 12)
    assert "no cache on flux-mini" in stdout


def test_without_arguments_it_draws_with_the_embedded_model(draws, tmp_path, monkeypatch):
    stdout = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(stdout, encoding="ascii"))
    draws("model.num_inference_steps=2")
    sys.stdout.flush()
    assert pixels(tmp_path / "image.png").shape == (128, 128, 3)
    assert b"# computed" in stdout.getvalue()  # without Unicode the cells are letters and signs


@pytest.mark.thorough
def test_interrupted_it_leaves_the_folder_as_it_was(tiny_pipe_folder, tmp_path):
    (tmp_path / "image.png").write_text("the image of an earlier run")
    long = ["model.num_inference_steps=50000", "model.max_sequence_length=8"]
    process = start(*arguments_for(tiny_pipe_folder), *long, cwd=tmp_path)
    assert process.stderr.readline().startswith("note: the model reads 8 of the prompt's")  # drawing starts now
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = finish(process)
    assert (code, stdout, stderr) == (
        130,
        "",
        "run.py: interrupted; images that are finished stay, and the same command begins anew\n",
    )
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the image of an earlier run"]


def test_a_command_that_is_not_well_formed_ends_before_torch_is_imported(tmp_path):
    code, stdout, stderr = finish(start("method=h3cache", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1"))
    assert (code, stdout) == (2, "")
    methods = " or ".join(sorted(file.stem for file in (REPOSITORY / "configs/method").iterdir()))
    assert stderr.endswith(f"no such method; choose method={methods}\n") and " or h2cache or " in methods
    assert "| torch\n" not in stderr


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("method=h3cache", ["method=h3cache", "block_cache", "h2cache", "none"]),
        ("model=flux2", ["model=flux2", "flux-mini", "flux1-dev", "flux1-schnell"]),
        ("method.tau3=0.1", ["tau3", "tau1", "tau2"]),
        ("sed=3", ["sed", "seed", "prompt"]),
        ("+sed=3", ["sed", "seed", "prompt"]),
        ("~method", ["method"]),
        ("method=null", ["--help"]),
        ("method", ["method", "="]),
        ("method.tau1=0.1,0.2", ["method.tau1=0.1,0.2", "-m"]),
        ("method.tau1=high", ["method=h2cache", "tau1", "'high'", "number"]),
        ("method.forecast=magic", ["forecast", "'magic'", "reuse", "taylor", "hermite"]),
        ("seed=red", ["seed=red", "whole number"]),
        ("compare=3", ["compare=3", "true or false"]),
        ("prompt=${nothing}", ["nothing"]),
        ("model.height=65", ["height=65", "multiple of 16"]),
        ("model.dtype=int8", ["dtype='int8'", "float32", "bfloat16", "float16"]),
        ("model.offload=disk", ["offload='disk'", "none", "model", "sequential", "group"]),
        ("model.device=cpu model.offload=model", ["offload=model", "CUDA", "offload=none"]),
        ("model.device=cuda:99", ["cuda:99", "device=cpu"]),
        ("model.device=abacus", ["abacus", "auto", "cpu", "cuda"]),
        ("model.path=nowhere", ["nowhere", "model_index.json"]),
        ("model.path=null", ["path or hub_id"]),
        ("compare=true method=none", ["compare=true", "method="]),
        ("out=cat.jpg", ["cat.jpg", ".png"]),
        ("out=no/such/cat.png", ["no/such/cat.png", "no folder no/such"]),
        ("out=/proc/cat.png", ["/proc/cat.png", "out="]),
        (f"out={'a' * 300}.png", ["too long"]),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence(fails, argument, says):
    message = fails(*argument.split())
    assert [word for word in says if word not in message] == []


def test_an_output_that_is_a_folder(fails, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "cat.png"
    folder.mkdir()
    assert "it is a folder" in fails(f"out={folder}")


def test_a_hub_model_without_network(fails):
    message = fails("model=flux1-dev", "model.device=cpu", tiny=False)
    assert all(word in message for word in ("FLUX.1-dev", "network", "model.path=", "model=flux-mini"))


def test_a_folder_that_is_only_half_a_pipeline(fails, tiny_pipe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    (folder / "model_index.json").write_text((tiny_pipe_folder / "model_index.json").read_text())
    assert "does not load as a Flux pipeline" in fails(f"model.path={folder}")


def test_the_configs_write_out_the_defaults_of_the_methods():
    methods = {"none": None, "h2cache": H2CacheConfig(), "block_cache": BlockCacheConfig(threshold=0.12)}
    for name, expected in methods.items():
        config = yaml.safe_load((REPOSITORY / f"configs/method/{name}.yaml").read_text())
        assert instantiate(config) == expected
        assert set(vars(expected) if expected else []) == set(config) - {"_target_"}


def test_every_model_config_is_valid():
    for file in (REPOSITORY / "configs/model").iterdir():
        instantiate(yaml.safe_load(file.read_text()))


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"])), st.booleans())
@example("", False)
@example("it's", True)
@example("a\\", False)
@example(r"a\' b\\'", False)
@example('"a", "b"', False)
@example('"a" and "b"', True)
@example("a (b), [c], {d}: e=f", False)
def test_a_prompt_is_taken_as_typed(text, multirun):
    """Unless it is quoted for Hydra, or in a multirun reads as a sweep."""
    typed = as_typed(f"prompt={text}", multirun)
    parsed = OverridesParser.create().parse_override(typed)
    if typed != f"prompt={text}":
        assert parsed.value() == text
    else:
        assert (text[0] == text[-1] and text[0] in "\"'") or (multirun and parsed.is_sweep_override())


def test_the_timeline_wraps_at_the_width_of_the_terminal():
    """Two rows of ten cells and the rest; a bar of at most half the height is a metric below the threshold."""
    decisions = ["warmup", *["hit", "compute", "forced"] * 4]
    diffs = [np.nan, *[0.0999, 0.1, np.nan] * 3, 0.0, np.inf, np.nan]
    trace = pd.DataFrame({"stage": "detail", "decision": decisions, "diff": diffs, "threshold": 0.1})
    terminal = StringIO()
    Console(width=20, file=terminal).print(Timeline(trace))
    assert terminal.getvalue().split("\n")[:7] == [
        "        0",
        "detail  ▓·█-·█-·█-",
        "metric   ▄▅ ▄▅ ▄▅ ",
        "",
        "        10",
        "detail  ·█-",
        "metric  ▁█ ",
    ]


def test_the_table_of_decisions_shows_the_sigma_that_was_chosen():
    """Of the skipped steps alone, from the smallest to the largest; no column where no forecast has one."""
    trace = pd.DataFrame({"stage": "network", "decision": ["compute", "hit", "hit"], "diff": np.nan, "threshold": 0.1})

    def shown(sigmas: list[float]) -> str:
        terminal = StringIO()
        Console(width=100, file=terminal).print(decision_table(trace.assign(sigma=sigmas)))
        return terminal.getvalue()

    assert shown([np.nan, 0.5, 0.613]).splitlines()[-1].endswith("0.50 to 0.61")
    assert shown([np.nan, 0.5, 0.5]).split()[-1] == "0.50"
    assert "sigma" not in shown([np.nan, np.nan, np.nan])
    assert sigmas({"sigma": {"a": (0.5, 0.613), "b": (0.5, 0.5)}}) == {"sigma": "a 0.50 to 0.61, b 0.50"}
    assert sigmas({}) == {}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_files_appear_all_or_not_at_all(tmp_path, error):
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text("old")
    with pytest.raises(error), atomic_files([old, new]) as (first, second):
        first.write_text("half")
        raise error
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("old.csv", "old")]

    with atomic_files([old, new]) as (first, second):
        first.write_text("whole")
        second.write_text("whole")
        assert old.read_text() == "old"
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"old.csv": "whole", "new.csv": "whole"}


def test_the_metrics_have_their_known_values():
    grey, lighter = (Image.new("RGB", (16, 16), (level,) * 3) for level in (100, 110))
    assert psnr(lighter, grey) == pytest.approx(20 * np.log10(255 / 10))
    constant = (0.01 * 255) ** 2  # two flat images differ in luminance only: SSIM is (2ab + c) / (aa + bb + c)
    assert ssim(lighter, grey) == pytest.approx((2 * 100 * 110 + constant) / (100**2 + 110**2 + constant))
    assert (psnr(grey, grey), ssim(grey, grey)) == (np.inf, 1.0)
    with pytest.raises(ValueError, match="size"):
        psnr(grey, Image.new("RGB", (16, 8)))
