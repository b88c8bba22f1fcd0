"""`python -m eval` as its user meets it: what the configurations say, what a run leaves behind, what it refuses."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from composing import compose_once, composed_method
from hydra import compose, initialize_config_dir
from PIL import Image
from repository import REPOSITORY
from thorough import named, product

import h2cache
from h2cache import CacheConfig, H2CacheConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.eval import __main__ as program
from h2cache.eval.errors import UserError
from h2cache.eval.experiments.study import Study, read_study
from h2cache.eval.generation.backends import PeerCache
from h2cache.eval.metrics.images import PSNR, psnr
from h2cache.eval.metrics.metric import Metric, Unavailable
from h2cache.eval.metrics.registry import METRICS
from h2cache.eval.models.weights import Weights

OF_PICTURES = {"superresolution"}  # what needs a model that is given pictures, and is not done unasked
OF_VIDEOS = {"video"}  # likewise of a model that makes videos
# 344 images of the baseline; four images of every prompt; layers that torchao has to be there for; runs of 30 steps
ASKED_FOR = OF_PICTURES | OF_VIDEOS | {"combine", "fewer_steps", "promise", "seeds"}
SHIPPED = sorted({path.stem for path in (REPOSITORY / "configs/experiment").iterdir()} - ASKED_FOR)
CALL = {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 24}
# A small experiment: the settings of one, without outputs that are tested elsewhere.
SMALL = ["experiment=qualitative", "experiments.qualitative.outputs=[]", "experiments.qualitative.metrics=[psnr]"]


def study(*overrides: str) -> Study:
    """What a command would do."""
    model = next((each.removeprefix("model=") for each in overrides if each.startswith("model=")), "flux-mini")
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        return read_study(compose("eval", overrides=list(overrides)), model, partial(composed_method, model))


def configs(study: Study, experiment: str) -> dict[str, object]:
    (found,) = (each for each in study.experiments if each.name == experiment)
    return {setting.name: setting.config for setting in found.settings}


@pytest.fixture
def command(tiny_pipe_folder, tmp_path, monkeypatch, capsys):
    """`command("limit=1")` runs the program in this process, on the tiny pipeline, in a folder of its own.

    Returns (exit code, stdout, stderr).
    """

    def command(*arguments: str, tiny: bool = True) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")
        monkeypatch.setattr("h2cache.eval.cli.experiments.compose", compose_once)
        own = [*arguments_for(tiny_pipe_folder), "launcher.workers=1"] if tiny else []
        monkeypatch.setattr(sys, "argv", ["eval", *own, *arguments])
        with pytest.raises(SystemExit) as exit:
            program.main()
        return exit.value.code or 0, *capsys.readouterr()

    return command


def arguments_for(folder: Path) -> list[str]:
    return [f"model.path={folder}", *(f"model.{field}={value}" for field, value in CALL.items())]


def measured(folder: Path, experiment: str = "qualitative") -> pd.DataFrame:
    """All of measurements.csv but times."""
    frame = pd.read_csv(folder / experiment / "measurements.csv")
    return frame[[column for column in frame if not column.endswith("_seconds")]]


# What the configurations say.


def test_on_the_large_models_table1_is_the_papers():
    """Its prompts, seed, steps and thresholds, whichever build of FLUX.1-dev draws."""
    for model in ("flux1-dev", "nunchaku-flux1-dev", "nunchaku-flux1-dev-realism"):
        table = study(f"model={model}", "experiment=table1")
        cells = [row.cell for row in table.rows[0]]
        assert {(cell.seed, cell.steps) for cell in cells if not cell.scheduler} == {(0, 100)}
        assert {cell.steps for cell in cells if cell.scheduler} == {24}
        assert len({cell.prompt.id for cell in cells}) == 80 and cells[0].prompt.id == "cute001"
        methods = configs(table, "table1")
        rivals = ["Block Cache (library default)", "TeaCache (authors' default)"]
        assert list(methods)[:4] == ["Baseline", *rivals, "H2-Cache"]
        assert methods["H2-Cache"] == H2CacheConfig(tau1=0.15, tau2=0.22)
        assert [methods[each] for each in rivals] == [BlockCacheConfig(0.12), TeaCacheConfig()]
        assert "psnr@converged" not in table.metrics


def test_on_the_embedded_model_it_is_what_serves_it():
    table = study("experiment=table1")
    cells = [row.cell for row in table.rows[0]]
    assert {(cell.scheduler, cell.steps) for cell in cells} == {
        *((None, 50), ("euler", 12), ("dpm++2m", 12), ("unipc", 12)),
    }
    methods = configs(table, "table1")
    assert [cell.seed for cell in cells] == [index for index in range(80) for _ in methods]
    assert all(cell.prompt.word for cell in cells)
    assert methods["H2-Cache"] == H2CacheConfig(tau1=0.05, tau2=0.1)
    assert list(methods)[1:3] == ["Block Cache", "TeaCache"], "no label: the thresholds are its own"
    assert methods["HiCache"] == HiCacheConfig(granularity="stage")
    assert methods["HiCache, interval = 7"] == HiCacheConfig(7, granularity="stage")
    assert methods["Taylor-Scaled"] == HiCacheConfig(granularity="stage", basis="taylor")
    assert methods["TaylorSeer"] == TaylorSeerConfig(5, granularity="stage")
    assert methods["ClusCa"] == ClusCaConfig(3) and methods["Hi-ClusCa"] == ClusCaConfig(3, forecast="hermite")
    assert {"psnr", "psnr@converged"} <= set(table.metrics)


MODELS = sorted((REPOSITORY / "configs/model").iterdir())
MAKE_VIDEOS = [path.stem for path in MODELS if "num_frames:" in path.read_text()]


# Reading them takes most of a second; the other models are thorough.
@product(
    "model",
    named({path.stem: path.stem for path in MODELS if path.stem not in MAKE_VIDEOS}),
    kept=lambda model: model in ("flux-mini", "flux-mini-upscaler", "flux1-dev", "nunchaku-flux1-dev", "qwen-image"),
)
def test_every_experiment_can_be_read_for_every_model_of_images(model):
    everything = study(f"model={model}")
    assert sorted(experiment.name for experiment in everything.experiments) == SHIPPED
    made = {setting.config for each in everything.experiments for setting in each.settings} - {None}
    assert all(isinstance(config, CacheConfig | PeerCache) for config in made)
    assert all(names[0] == "Baseline" for names in (list(configs(everything, name)) for name in SHIPPED))


@pytest.mark.parametrize("name", sorted(OF_PICTURES))
def test_experiments_with_pictures_are_for_models_that_take_them(name):
    (found,) = study("model=flux-mini-upscaler", f"experiment={name}").experiments
    assert found.settings[0].name == "Baseline" and "psnr@truth" in found.metrics
    with pytest.raises(UserError, match="takes no picture: use model=flux-mini-upscaler"):
        study(f"experiment={name}")


@pytest.mark.parametrize("name", sorted(OF_VIDEOS))
@pytest.mark.parametrize("model", MAKE_VIDEOS)
def test_experiments_of_videos_are_for_models_that_make_them(model, name):
    (found,) = study(f"model={model}", f"experiment={name}").experiments
    assert found.settings[0].name == "Baseline" and "psnr_frames" in found.metrics
    with pytest.raises(UserError, match=f"model={model} makes videos.*choose experiment=.video"):
        study(f"model={model}", "experiment=separation")


@pytest.mark.parametrize("name", sorted(OF_VIDEOS))
def test_experiments_of_videos_are_not_for_models_that_make_images(name):
    with pytest.raises(UserError, match=f"model=flux-mini makes images, and experiment={name} measures videos"):
        study(f"experiment={name}")


def test_experiments_share_what_they_draw():
    """Each image is drawn once for all of them, prompt by prompt."""
    everything = study()
    alone = sum(len(rows) for rows in everything.rows)
    cells = everything.all_cells
    assert len(set(cells)) == len(cells) < alone
    order = [cell.prompt.id for cell in cells]
    assert order == sorted(order)


@pytest.fixture
def own(tmp_path):
    """`own("A: {method: h2cache}")` is the study of a user's own experiment with these settings, beside ours."""

    def own(*settings: str, metrics: Sequence[str] = ()) -> Study:
        (tmp_path / "experiment").mkdir()
        lines = ["# @package experiments.own", "title: mine", "settings:", *(f"  {setting}" for setting in settings)]
        lines += [f"metrics: {json.dumps(metrics)}"] if metrics else []
        (tmp_path / "experiment/own.yaml").write_text("\n".join(lines))
        return study("experiment=own", f"hydra.searchpath=[file://{tmp_path}]", "limit=1")

    return own


def test_an_experiment_of_ones_own_says_only_what_is_its_own(own):
    """The rest is the protocol's."""
    (mine,) = own("Baseline: {method: none}").experiments
    (table,) = study("experiment=table1").experiments
    assert (mine.name, mine.title, mine.description, mine.outputs) == ("own", "mine", "", ())
    shared = ("prompts", "limit", "seeds", "steps", "metrics")
    assert [getattr(mine, field) for field in shared] == [getattr(table, field) for field in shared]


def test_a_list_is_an_axis_and_the_names_say_what_differs(own):
    axes = own("H2-Cache: {method: h2cache, tau1: [0.1, 0.2], pool1: [null, 32], tau2: 0.3}")
    assert configs(axes, "own") == {
        "H2-Cache, tau1 = 0.1, pool1 = none": H2CacheConfig(tau1=0.1, tau2=0.3, pool1=None),
        "H2-Cache, tau1 = 0.1, pool1 = 32": H2CacheConfig(tau1=0.1, tau2=0.3, pool1=32),
        "H2-Cache, tau1 = 0.2, pool1 = none": H2CacheConfig(tau1=0.2, tau2=0.3, pool1=None),
        "H2-Cache, tau1 = 0.2, pool1 = 32": H2CacheConfig(tau1=0.2, tau2=0.3, pool1=32),
    }
    assert {setting.method for setting in axes.experiments[0].settings} == {"H2-Cache"}


def test_a_list_of_settings_goes_through_them_one_by_one(own):
    first, second = (
        "{method: h2cache, tau1: 0.1, hierarchical: false}",
        "{method: h2cache, tau1: 0.2, hierarchical: true}",
    )
    assert configs(own(f"H2-Cache: [{first}, {second}]"), "own") == {
        "H2-Cache, tau1 = 0.1, hierarchical = no": H2CacheConfig(tau1=0.1, hierarchical=False),
        "H2-Cache, tau1 = 0.2, hierarchical = yes": H2CacheConfig(tau1=0.2),
    }


def test_where_a_field_is_a_list_an_axis_is_a_list_of_lists(own):
    settings = (
        "One: {method: teacache, coefficients: [1, 0]}",
        "Two: {method: teacache, coefficients: [[1, 0], [2, 0]]}",
    )
    assert [config.coefficients for config in configs(own(*settings), "own").values()] == [(1, 0), (1, 0), (2, 0)]


def test_limits_seeds_steps_and_prompts_can_be_chosen(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "three"}')
    chosen = study(
        "experiment=separation", "prompts=jsonl", f"prompts.path={tmp_path}/mine.jsonl", "limit=2", "protocol.steps=7"
    )
    cells = [row.cell for row in chosen.rows[0]]
    assert [(cell.prompt.text, cell.seed, cell.steps) for cell in cells[::4]] == [("one", 0, 7), ("two", 1, 7)]
    fixed = study("experiment=separation", "+experiments.separation.seeds=fixed", "experiments.separation.limit=3")
    assert [row.cell.seed for row in fixed.rows[0]] == [0] * 12


# What a run leaves behind.


def test_a_run_measures_what_the_library_draws(command, tiny_pipe, tmp_path):
    thresholds = ["+protocol.h2cache.tau1=9", "+protocol.h2cache.tau2=9"]
    code, stdout, stderr = command(*SMALL, *thresholds, "limit=2", "out=found")
    assert (code, stderr) == (0, "8 images to draw, 2 prompts\n")
    assert "8 images, 8 of them drawn now" in stdout and "found/report.html" in stdout
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [
        *("environment.json", "published", "qualitative", "records", "report.html"),
    ]
    frame = pd.read_csv(tmp_path / "found/qualitative/measurements.csv", keep_default_na=False, na_values="")
    rows = frame.set_index(["setting", "prompt_id"])
    settings = ("Baseline", "Block Cache", "TeaCache", "H2-Cache")
    assert list(rows.index) == [(setting, prompt) for setting in settings for prompt in ("sign00", "sign01")]
    with h2cache.apply(tiny_pipe, H2CacheConfig(tau1=9, tau2=9)) as handle:
        arguments = {**CALL, "generator": torch.manual_seed(1), "guidance_scale": 3.5}
        expected = tiny_pipe(rows.loc["H2-Cache", "sign01"].prompt, **arguments).images[0]
    row, baseline = (rows.loc[name, "sign01"] for name in ("H2-Cache", "Baseline"))
    image, uncached = (Image.open(tmp_path / "found" / each.image) for each in (row, baseline))
    assert np.array_equal(image, expected)
    assert row.psnr == pytest.approx(psnr(image, uncached)) and baseline.psnr == np.inf
    assert row.computed_fraction == handle.summary()["computed_fraction"] < 1
    assert row.total_seconds == pytest.approx(row.text_seconds + row.denoising_seconds + row.vae_seconds)


def test_beside_the_results_stands_what_made_them(command, tmp_path):
    command(*SMALL, "limit=1", "out=found")
    facts = json.loads((tmp_path / "found/environment.json").read_text())
    assert {"command", "time", "commit", "python", "packages", "gpus", "driver", "cpu", "threads"} <= set(facts)
    assert facts["packages"]["torch"] == torch.__version__.split("+")[0]
    assert (facts["model"], facts["images"], facts["failed"]) == ("flux-mini", 4, 0)
    assert facts["model_fields"]["height"] == 32
    assert 0 < facts["harness_overhead"] < 10


def test_the_same_command_again_changes_nothing_and_another_adds_to_it(command, tmp_path):
    command(*SMALL, "limit=1")
    first = measured(tmp_path / "results")
    code, stdout, stderr = command(*SMALL, "limit=1")
    assert (code, stderr) == (0, "")
    pd.testing.assert_frame_equal(measured(tmp_path / "results"), first)
    _, stdout, _ = command(*SMALL, "limit=1", "+protocol.h2cache.tau1=[0.05,0.3]")
    assert "5 images, 1 of them drawn now" in stdout
    _, stdout, _ = command(*SMALL, "limit=1", "model.guidance_scale=2")
    assert "4 images, 4 of them drawn now" in stdout


def test_a_damaged_image_is_drawn_again(command, tmp_path):
    command(*SMALL, "limit=1")
    first = measured(tmp_path / "results")
    image = tmp_path / "results" / first.image[2]
    image.write_bytes(image.read_bytes()[:-10])
    _, stdout, stderr = command(*SMALL, "limit=1")
    assert "4 images, 1 of them drawn now" in stdout and "damaged records, whose images are drawn again: 1" in stderr
    pd.testing.assert_frame_equal(measured(tmp_path / "results"), first)


def test_scores_are_computed_once_whatever_ends_the_run(command, tmp_path, monkeypatch):
    """Half a line at the end of their file, and none is lost or believed."""
    command(*SMALL, "limit=1")
    first = measured(tmp_path / "results")
    scores = tmp_path / "results/records/scores.jsonl"
    scores.write_bytes(scores.read_bytes()[:-4])
    asked = []

    def counted(shown):
        asked.append(shown)
        return PSNR.load(None)(shown)

    monkeypatch.setitem(METRICS, "psnr", replace(PSNR, load=lambda means: counted))
    for _ in range(2):
        command(*SMALL, "limit=1")
        assert len(asked) == 1
        pd.testing.assert_frame_equal(measured(tmp_path / "results"), first)


def test_a_finished_run_is_scored_again_when_weights_have_come(command, tmp_path, monkeypatch):
    """No pipeline is loaded; the rest stays; what an interrupted sitting has scored is there in the next."""
    fields = [*SMALL, "limit=2", "experiments.qualitative.metrics=[psnr,late]"]
    outputs = "experiments.qualitative.outputs=[{_target_: h2cache.eval.report.tables.SummaryTable}]"
    calls = []

    def load(means):
        raise Unavailable("its weights are on their way")

    def late(shown):
        calls.append(shown.prompt)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 42.0

    monkeypatch.setitem(METRICS, "late", Metric("late", load))
    assert "late is n/a: its weights are on their way" in command(*fields, outputs)[2]
    table = tmp_path / "results/qualitative/summary.md"
    before, facts = measured(tmp_path / "results"), json.loads((tmp_path / "results/environment.json").read_text())
    assert "n/a: late" in table.read_text() and before["late"].isna().all()

    def nothing(*_):
        raise AssertionError("a pipeline is loaded")

    monkeypatch.setattr("h2cache.eval.generation.sweep.load_pipeline", nothing)
    monkeypatch.setitem(METRICS, "late", Metric("late", lambda means: late))
    assert command("rescore", "out=results", tiny=False)[0] == 130
    assert measured(tmp_path / "results").equals(before), "interrupted, nothing is lost"
    code, stdout, stderr = command("rescore", "out=results", tiny=False)
    assert (code, stderr) == (0, "") and "8 images; tables" in stdout
    images = {(row.prompt, (tmp_path / "results" / row.image).read_bytes()) for row in before.itertuples()}
    assert len(calls) == len(images) + 1, "what was scored before the interruption is not scored again"
    after = measured(tmp_path / "results")
    assert (after["late"] == 42).all() and after.drop(columns="late").equals(before.drop(columns="late"))
    assert "n/a" not in table.read_text() and "42.0000" in table.read_text()
    now = json.loads((tmp_path / "results/environment.json").read_text())
    assert now["command"] == facts["command"] and now["time"] == facts["time"] and "rescored" in now


def test_a_run_of_an_older_version_is_scored_again(command, tmp_path):
    """It kept its command and no fields; images that are gone are told of."""
    command(*SMALL, "limit=1")
    file = tmp_path / "results/environment.json"
    facts = json.loads(file.read_text())
    fields = facts.pop("overrides")
    facts["command"] = shlex.join(["python", "-m", "eval", *fields])
    file.write_text(json.dumps(facts))
    next((tmp_path / "results/records").glob("*.png")).unlink()
    code, stdout, stderr = command("rescore", "out=results", tiny=False)
    assert code == 0 and "3 images; tables" in stdout and "1 images are not there" in stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["rescore"], "rescore needs the folder of a run"), (["rescore", "out=nowhere"], "no run has ended there")],
)
def test_there_is_nothing_to_score(command, arguments, says):
    code, stdout, stderr = command(*arguments, tiny=False)
    assert (code, stdout) == (2, "") and says in stderr


def test_a_method_that_fails_is_told_and_missing_and_tried_again(command, tmp_path, monkeypatch):
    apply = h2cache.apply

    def failing(pipe, config):
        if isinstance(config, TeaCacheConfig):
            raise MemoryError("no room")
        return apply(pipe, config)

    monkeypatch.setattr(h2cache, "apply", failing)
    arguments = ["experiment=qualitative", "experiments.qualitative.metrics=[psnr]", "limit=2"]
    outputs = "{_target_: h2cache.eval.report.tables.SummaryTable},{_target_: h2cache.eval.report.figures.Rows}"
    summary = f"experiments.qualitative.outputs=[{outputs}]"
    code, stdout, stderr = command(*arguments, summary)
    assert code == 1
    assert "failed: TeaCache, 2 images: MemoryError: no room" in stderr
    assert "the same command tries them again" in stderr
    assert set(measured(tmp_path / "results").setting) == {"Baseline", "Block Cache", "H2-Cache"}
    assert "No image was made by: TeaCache" in (tmp_path / "results/qualitative/summary.md").read_text()
    monkeypatch.setattr(h2cache, "apply", apply)
    code, stdout, _ = command(*arguments, summary)
    assert code == 0 and "8 images, 2 of them drawn now" in stdout


@pytest.mark.thorough
def test_a_real_run_that_is_killed_goes_on_and_ends_like_another(command, tiny_pipe_folder, tmp_path):
    """`python -m eval` gets SIGKILL as soon as three of sixteen images are there."""
    arguments = [*SMALL, "limit=4", "out=killed"]
    command(*SMALL, "limit=4", "out=undisturbed")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "eval", *arguments_for(tiny_pipe_folder), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    records = tmp_path / "killed/records"
    while process.poll() is None and len(list(records.glob("[!.]*.json"))) < 3:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    code, stdout, _ = command(*arguments)
    assert code == 0 and "16 images" in stdout and "16 of them" not in stdout
    pd.testing.assert_frame_equal(measured(tmp_path / "killed"), measured(tmp_path / "undisturbed"))


def test_ctrl_c_is_130(command, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("h2cache.eval.experiments.harness.sweep", interrupted)
    code, _, stderr = command(*SMALL)
    assert (code, stderr) == (130, "eval: interrupted; the same command goes on where it was\n")


# What it refuses.

# Composing a method's configuration is what takes time, and this experiment has only two.
TWO = """# @package experiments.two
title: two settings
settings:
  Baseline: {method: none}
  H2-Cache: ${protocol.h2cache}
outputs: []
"""
FIELDS = "experiments.two"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["experiment=tabel1"], ["experiment=tabel1", "table1", "frontier"]),
        (["experiment=[table1,tabel2]"], ["experiment=tabel2", "table1"]),
        (["experiment=[]"], ["no experiment", "experiment=[table1,frontier]"]),
        (["model=flux2"], ["model=flux2", "flux-mini", "flux1-dev"]),
        (["prompts=cute8"], ["prompts=cute8", "cute80", "jsonl"]),
        (["prompts=jsonl"], ["prompts.path"]),
        (["prompts=jsonl", "prompts.path=no such, file.jsonl"], ["no such, file.jsonl", "no such file"]),
        (["launcher=slurm"], ["launcher=slurm", "local", "ray"]),
        (["launcher=ray", "launcher.workers=0"], ["workers=0", "whole number"]),
        (["limit=0"], ["limit=0", "whole number"]),
        (["limits=3"], ["limits", "limit"]),
        (["+limits=3"], ["limits", "limit", "out"]),
        (["-m", "limit=1,2"], ["multirun", "experiment=["]),
        (["model.height=65"], ["height=65", "multiple of 16"]),
        (["model.path=nowhere"], ["nowhere", "model_index.json"]),
        (["metric_weights=a"], ["metric_weights=a", "no such folder"]),
        (["out=/proc/results"], ["/proc/results", "out="]),
        ([f"+{FIELDS}.metrics=[psnr,snr]"], ["'snr'", "psnr"]),
        ([f"+{FIELDS}.seeds=random"], ["two", "seeds", "'random'", "fixed", "per_prompt"]),
        ([f"+{FIELDS}.steps=0"], ["two", "steps=0"]),
        ([f"+{FIELDS}.setings={{}}"], ["two", "setings", "settings"]),
        (["protocol.h2cache.method=h3cache"], ["method=h3cache", "h2cache"]),
        (["+protocol.h2cache.tau3=1"], ["two", "H2-Cache", "tau3", "tau1, tau2"]),
        (["+protocol.h2cache.tau1=high"], ["two", "H2-Cache", "tau1", "'high'"]),
        (["+protocol.h2cache.tau1=[0.1,0.1]"], ["two", "H2-Cache", "more than once"]),
        (["+protocol.h2cache.tau1=[]"], ["tau1", "empty list"]),
        ([f"+{FIELDS}.settings.Baseline.tau1=[0.1,0.2]"], ["Baseline", "no field tau1"]),
        ([f"+{FIELDS}.settings.Uncached={{method: none}}"], ["Uncached", "Baseline", "none"]),
        ([f"{FIELDS}.settings.Baseline={{method: h2cache}}"], ["Baseline", "none"]),
        ([f"{FIELDS}.settings.H2-Cache=3"], ["H2-Cache", "3", "method"]),
        ([f"+{FIELDS}.settings.X={{tau1: 0.1}}"], ["X", "tau1", "method"]),
        ([f"{FIELDS}.outputs=[{{_target_: h2cache.eval.report.figures.Nothing}}]"], ["two", "outputs", "Nothing"]),
        ([f"{FIELDS}.outputs=[{{_target_: collections.OrderedDict}}]"], ["two", "outputs", "method make()"]),
        ([f"{FIELDS}.outputs=[{{name: x}}]"], ["two", "outputs", "_target_"]),
        (["protocol.prompts={_target_: collections.OrderedDict}"], ["two", "prompts", "method load()"]),
        ([f"{FIELDS}.title=${{nothing}}"], ["nothing"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_user_can_put_right_is_one_sentence_before_any_image_is_made(command, tmp_path, arguments, says):
    if not any(argument.startswith("experiment=") for argument in arguments):
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment/two.yaml").write_text(TWO)
        arguments = ["experiment=two", f"hydra.searchpath=[file://{tmp_path}]", *arguments]
    code, stdout, stderr = command(*arguments)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("eval: error: ") and stderr.count("\n") == 1
    assert [word for word in says if word not in stderr] == []
    assert list(tmp_path.rglob("*.png")) == []


def test_a_malformed_line_of_a_prompt_file_is_named(command, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one"}\n{"prompt": }\n')
    code, _, stderr = command(*SMALL, "prompts=jsonl", "prompts.path=mine.jsonl")
    assert code == 2 and "mine.jsonl, line 2: not JSON" in stderr


def test_two_prompts_of_one_name_are_refused_and_of_one_text_are_drawn_once(command, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one", "id": "a"}\n{"prompt": "one", "id": "b"}\n')
    arguments = [*SMALL, "prompts=jsonl", "prompts.path=mine.jsonl", "protocol.seeds=fixed"]
    _, stdout, _ = command(*arguments)
    assert "4 images, 4 of them drawn now" in stdout
    assert len(measured(tmp_path / "results")) == 8
    (tmp_path / "mine.jsonl").write_text('{"prompt": "one", "id": "a"}\n{"prompt": "two", "id": "a"}\n')
    assert "line 2: the id 'a'" in command(*arguments)[2]


# Settings with a solver, steps and a call of their own, and what they are compared with.


def test_a_setting_has_steps_a_scheduler_and_a_call_of_its_own(own):
    rows = own(
        "Baseline: {method: none}",
        "UniPC: {method: none, scheduler: unipc, steps: [2, 3]}",
        "Wide: {method: none, call: [{width: 48}, {width: 64}]}",
    ).rows[0]
    named = {row.setting.name: row.cell for row in rows}
    assert list(named) == [
        "Baseline",
        "UniPC, steps = 2",
        "UniPC, steps = 3",
        "Wide, call = width 48",
        "Wide, call = width 64",
    ]
    assert (named["UniPC, steps = 3"].scheduler, named["UniPC, steps = 3"].steps) == ("unipc", 3)
    assert named["Wide, call = width 64"].call == (("width", 64),)


def test_a_setting_with_other_weights_is_compared_with_the_uncached_image_of_these(own):
    pytest.importorskip("torchao")
    fields = "{method: block_cache, steps: 2, weights: [null, {quantized: int8}]}"
    rows = own("Baseline: {method: none}", f"Block Cache: {fields}", metrics=["psnr", "psnr@uncached"]).rows[0]
    named = {row.setting.name: row for row in rows}
    row = named["Block Cache, weights = quantized int8"]
    assert row.cell.weights == Weights(quantized="int8")
    assert row.references["uncached"] == replace(row.cell, method=None)
    assert row.references["baseline"] == named["Baseline"].cell
    assert named["Block Cache, weights = none"].cell.weights is None


def test_a_label_is_in_the_name_of_its_setting_alone(own):
    labelled, other = (
        "{method: block_cache, label: library default}",
        "{method: block_cache, threshold: 0.3, label: null}",
    )
    named = configs(own(f"Block Cache: [{labelled}, {other}]"), "own")
    assert named == {
        "Block Cache (library default)": BlockCacheConfig(),
        "Block Cache, threshold = 0.3": BlockCacheConfig(0.3),
    }


def test_throughput_is_of_one_to_sixteen_images_with_and_without_a_cache():
    cells = {row.setting.name: row.cell for row in study("experiment=throughput", "limit=1").rows[0]}
    batches = {}
    for cell in cells.values():
        batches.setdefault(cell.method, []).append(cell.images)
    assert len(batches) == 4 and all(sorted(each) == [1, 2, 4, 8, 16] for each in batches.values())


def test_a_batch_is_timed_as_a_whole_and_its_first_image_kept(command, tmp_path):
    """The first image of a batch is the one that is drawn alone; the others have noise of their own."""
    thresholds = ["+protocol.h2cache.tau1=9", "+protocol.h2cache.tau2=9"]
    batch = "{method: h2cache, tau1: 9, tau2: 9, call: {num_images_per_prompt: 3}}"
    code, _, stderr = command(*SMALL, *thresholds, f"+experiments.qualitative.settings.Batch={batch}", "limit=1")
    assert (code, stderr) == (0, "5 images to draw, 1 prompts\n")
    frame = pd.read_csv(tmp_path / "results/qualitative/measurements.csv").set_index("setting")
    assert list(frame["images"]) == [1, 1, 1, 1, 3]
    first, alone = (np.asarray(Image.open(tmp_path / "results" / frame["image"][n])) for n in ("Batch", "H2-Cache"))
    assert np.abs(first.astype(int) - alone).max() <= 1
    trace = pd.read_csv(tmp_path / "results" / frame["trace"]["Batch"])
    assert set(trace["sample"]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("X: {method: none, scheduler: rk4}", "there is no scheduler rk4; choose from euler, heun, dpm"),
        ("X: {method: none, steps: [0]}", "steps=0 is not allowed"),
        ("Baseline: {method: none, steps: 3}", "Baseline is the name of method none with the model's own"),
        ("X: {method: none, weights: int8}", "weights='int8' is not allowed: give a mapping with lora, quantized"),
        ("X: {method: none, weights: {quantized: int2}}", "setting X: weights: quantized=int2 is not allowed"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(own, setting, says):
    with pytest.raises(UserError, match=says):
        own(setting)


def test_metrics_name_what_they_compare_with():
    rows = study("experiment=solvers", "limit=1").rows[0]
    found = {row.setting.name: row for row in rows}
    plain = found["Baseline"]
    unipc, cached = found["UniPC, steps = 20"], found["HiCache on UniPC, interval = 2, steps = 20"]
    assert cached.references["uncached"] == unipc.cell
    assert "uncached" not in unipc.references and "uncached" not in plain.references
    for row in (plain, unipc, cached):
        assert row.references["baseline"] == plain.cell
        assert row.references["converged"] == replace(plain.cell, steps=120, scheduler="unipc")


def test_the_converged_solution_is_400_steps_of_a_models_own_scheduler_unless_its_protocol_says_more():
    (row, *_) = study("model=flux1-dev", "experiment=solvers", "limit=1").rows[0]
    assert row.references["converged"] == replace(row.cell, steps=400)
    with pytest.raises(UserError, match="converged_scheduler='ddim' is not allowed: it must be null or one of euler"):
        study("experiment=solvers", "protocol.converged_scheduler=ddim")


def test_a_run_with_solvers_counts_evaluations(command, tmp_path):
    chosen = "experiments.qualitative"
    code, _, stderr = command(
        "experiment=qualitative",
        f"+{chosen}.settings.UniPC={{method: none, scheduler: unipc, steps: 3}}",
        "+protocol.block_cache.threshold=9",
        f"{chosen}.metrics=[psnr,psnr@converged]",
        f"+{chosen}.set_metrics=[look]",
        f"{chosen}.outputs=[{{_target_: h2cache.eval.report.tables.SummaryTable}}]",
        "protocol.converged_steps=8",
        "limit=1",
        "out=found",
    )
    assert (code, stderr) == (0, "6 images to draw, 1 prompts\n")
    frame = pd.read_csv(tmp_path / "found/qualitative/measurements.csv").set_index("setting")
    assert frame["evaluations"]["Baseline"] == 4 and frame["evaluations"]["UniPC"] == 3
    assert 1 < frame["evaluations"]["Block Cache"] < 4
    assert frame["solver"]["Baseline"] == "FlowMatchEulerDiscreteScheduler"
    assert frame["solver"]["UniPC"] == "UniPCMultistepScheduler"
    assert frame["psnr@converged"].between(5, 90).all() and frame["psnr"]["Baseline"] == float("inf")
    table = (tmp_path / "found/qualitative/summary.md").read_text()
    assert "PSNR against the baseline's image (FlowMatchEulerDiscreteScheduler, 4 steps)" in table
    assert "PSNR against the converged solution (8 steps of unipc)" in table
    assert "| distance of looks |" in table
    numbers = pd.read_csv(tmp_path / "found/qualitative/summary.csv", index_col="setting")
    assert numbers["look_n"]["UniPC"] == 1 and numbers["look"].isna().all(), "one image is no set"


def test_a_setting_whose_library_is_not_installed_is_left_out_with_the_reason(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    peers = "{method: cache_dit_dbcache}"
    arguments = ["experiment=separation", f"+experiments.separation.settings.DBCache={peers}", "limit=1"]
    code, _, stderr = command(*arguments)
    assert (code, stderr) == (0, "4 images to draw, 1 prompts\n")
    reason = "Left out: DBCache (cache-dit is not installed: pip install cache-dit)."
    assert reason in (tmp_path / "results/separation/summary.md").read_text()


def test_settings_of_the_frontier_are_those_of_other_experiments_where_they_can_be():
    """Each image is drawn once: what the frontier adds are other libraries' caches and other papers' plans, mostly."""
    rest = study("experiment=[table1,solvers,methods]", "limit=1").all_cells
    frontier = study("experiment=frontier", "limit=1").all_cells
    new = [cell.method for cell in set(frontier) - set(rest)]
    assert len(frontier) > 90 and len(new) <= 40
    kinds = {type(method).__name__ for method in new}
    assert kinds == {"H2CacheConfig", "PlanConfig", "DiffusersCache", "CacheDitCache"}


def test_several_seeds_of_a_prompt_are_one_prompt():
    rows = study("experiment=table1", "limit=2", "+experiments.table1.seeds_per_prompt=3").rows[0]
    assert sorted({(row.cell.prompt.id, row.cell.seed) for row in rows}) == [
        *(("sign00", seed) for seed in (0, 80, 160)),
        *(("sign01", seed) for seed in (1, 81, 161)),
    ]
