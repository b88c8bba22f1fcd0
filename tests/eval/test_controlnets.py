"""Models that take a picture beside the prompt: what the pipeline is given, what records know, what tables compare."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diary import Diary
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from hydra.utils import instantiate
from PIL import Image
from repository import REPOSITORY
from tiny import save_tiny_controlnet

import h2cache
import run
from h2cache import H2CacheConfig
from h2cache.eval import __main__ as program
from h2cache.eval.errors import UserError
from h2cache.eval.generation.launchers import LocalLauncher
from h2cache.eval.generation.prompts import Picture, Prompt, PromptFile
from h2cache.eval.generation.records import Cell, Store
from h2cache.eval.generation.sweep import sweep
from h2cache.eval.generation.work import WorkCounter
from h2cache.eval.metrics.images import psnr
from h2cache.eval.models.controlnets import FluxControlNetConfig
from h2cache.eval.models.identity import identity
from h2cache.eval.models.pipelines import ModelConfig, load_pipeline

SIZES = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 24}


def smooth(seed: int, side: int = 32) -> Image.Image:
    """A picture of coarse random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tiny_pipe_folder, tmp_path_factory) -> dict[str, str]:
    controlnet = save_tiny_controlnet(tmp_path_factory.mktemp("controlnet"))
    return {"path": str(tiny_pipe_folder), "controlnet": str(controlnet)}


@pytest.fixture(scope="module")
def model(folders) -> FluxControlNetConfig:
    return FluxControlNetConfig(hub_id=None, dtype="float32", device="cpu", offload="none", **folders, **SIZES)


@pytest.fixture
def pictures(tmp_path) -> PromptFile:
    """Two prompts with a small picture and its truth each."""
    rows = []
    for index in range(2):
        smooth(index).save(tmp_path / f"truth{index}.png")
        smooth(index).resize((8, 8)).save(tmp_path / f"small{index}.png")
        rows.append({"prompt": "a sign", "picture": f"small{index}.png", "truth": f"truth{index}.png"})
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptFile(str(tmp_path / "pictures.jsonl"))


def drawn(model: ModelConfig, folder: Path, *prompts: Prompt, method: H2CacheConfig | None = None) -> list:
    store, cells = Store(folder, identity(model)), [Cell(prompt, 0, 4, method) for prompt in prompts]
    with store.locked():
        report = sweep(store, cells, model, LocalLauncher(), Diary())
    assert not report.failures
    return [report.records[store.fingerprint(cell)] for cell in cells]


# The pipeline.


def test_the_pipeline_is_diffusers_own_with_the_controlnet(model, folders):
    pipe = load_pipeline(model)
    assert type(pipe) is FluxControlNetPipeline
    own = FluxControlNetModel.from_pretrained(folders["controlnet"])
    assert all(torch.equal(a, b) for a, b in zip(pipe.controlnet.parameters(), own.parameters(), strict=True))


def test_a_record_is_what_the_pipeline_makes_of_prompt_and_picture(model, pictures, tmp_path):
    """And another picture with the same prompt and seed is another record."""
    first, second = pictures.load()
    assert first.text == second.text
    records = drawn(model, tmp_path / "records", first, second)
    pipe = load_pipeline(model)
    for prompt, record in zip((first, second), records, strict=True):
        generator, given = torch.Generator().manual_seed(0), Image.open(prompt.picture.image)
        expected = pipe(prompt.text, control_image=given, generator=generator, **SIZES).images[0]
        assert np.array_equal(Image.open(record.image), expected)
    assert records[0].image_sha256 != records[1].image_sha256


def test_the_identity_of_a_model_knows_its_controlnet(model, tmp_path):
    other = save_tiny_controlnet(tmp_path / "other", seed=1)
    changed = FluxControlNetConfig(**{**vars(model), "controlnet": str(other)})
    assert identity(changed) != identity(model)
    assert {**identity(changed), "controlnet": None} == {**identity(model), "controlnet": None}


def test_the_controlnet_s_work_counts_and_is_never_skipped(model, pictures, tmp_path):
    """Skipping everything that can be skipped leaves at least what the ControlNet computes."""
    pipe, (prompt, _) = load_pipeline(model), pictures.load()
    with WorkCounter(pipe) as work:
        pipe(prompt.text, **model.arguments_with(prompt.picture.image), generator=torch.Generator().manual_seed(0))

    class Alone:
        controlnet = pipe.controlnet

    with WorkCounter(Alone()) as of_controlnet:
        pipe(prompt.text, **model.arguments_with(prompt.picture.image), generator=torch.Generator().manual_seed(0))
    assert work.calls == 4 and of_controlnet.calls == 0
    assert 0 < of_controlnet.multiply_adds < work.multiply_adds
    bold = H2CacheConfig(tau1=9.0, tau2=9.0)
    with h2cache.apply(pipe, bold), WorkCounter(pipe) as cached:
        pipe(prompt.text, **model.arguments_with(prompt.picture.image), generator=torch.Generator().manual_seed(0))
    assert of_controlnet.multiply_adds < cached.multiply_adds < work.multiply_adds


# Prompts with pictures.


def test_pictures_are_seen_from_the_prompts_file(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    first, _ = pictures.load()
    assert first.picture == Picture.of(tmp_path / "small0.png") and first.truth == Picture.of(tmp_path / "truth0.png")


def test_a_picture_that_is_not_there(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a sign", "picture": "none.png"}))
    with pytest.raises(UserError, match=r"line 1: picture=none\.png: No such file"):
        PromptFile(str(tmp_path / "p.jsonl")).load()


def test_our_small_pictures_are_eighty_pairs():
    """Each picture is its truth at a quarter of the size."""
    prompts = instantiate(yaml.safe_load((REPOSITORY / "configs/prompts/small80.yaml").read_text())).load()
    assert len({prompt.id for prompt in prompts}) == len({prompt.truth.image_sha256 for prompt in prompts}) == 80
    for prompt in prompts:
        small, truth = Image.open(prompt.picture.image), Image.open(prompt.truth.image)
        assert (small.size, truth.size) == ((32, 32), (128, 128)) and prompt.word
        assert np.array_equal(truth.resize((32, 32), Image.Resampling.BICUBIC), small)


# What is refused.


@pytest.mark.parametrize("field", ["path", "controlnet"])
def test_a_folder_that_is_not_there(model, field):
    with pytest.raises(UserError, match=f"model.{field}=nowhere/at/all: no "):
        FluxControlNetConfig(**{**vars(model), field: "nowhere/at/all"}).check()


def test_a_model_with_a_controlnet_needs_a_picture_and_others_take_none(model):
    with pytest.raises(UserError, match="takes a picture beside the prompt"):
        model.arguments_with(None)
    plain = ModelConfig(**{name: value for name, value in vars(model).items() if name != "controlnet"})
    with pytest.raises(UserError, match="takes no picture: use model=flux-mini-upscaler"):
        plain.arguments_with(Path("small.png"))


def test_a_file_that_is_no_picture(model, tmp_path):
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(UserError, match="cannot read the picture"):
        model.arguments_with(tmp_path / "text.png")


# The programs.


@pytest.fixture
def runs(folders, pictures, tmp_path, monkeypatch, capsys):
    """`runs(main, "seed=1")` runs a program in the test's folder, on the tiny model; (exit code, stdout, stderr)."""

    def runs(main, *arguments: str) -> tuple[int, str, str]:
        own = [f"model.{name}={value}" for name, value in {**folders, **SIZES}.items()]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["program", "model=flux-mini-upscaler", *own, *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return runs


def test_run_writes_what_the_pipeline_makes_of_the_picture(runs, model, tmp_path):
    code, _, stderr = runs(run.main, "image=small1.png", "prompt=a sign", "method=none", "out=large.png", "seed=3")
    assert (code, stderr) == (0, "")
    pipe, given = load_pipeline(model), Image.open(tmp_path / "small1.png")
    expected = pipe("a sign", control_image=given, generator=torch.Generator().manual_seed(3), **SIZES).images[0]
    assert np.array_equal(Image.open(tmp_path / "large.png"), expected)
    assert yaml.safe_load((tmp_path / "large.yaml").read_text())["image"] == "small1.png"


def test_a_picture_needs_no_prompt(runs, tmp_path):
    for name, prompt in (("none.png", []), ("empty.png", ["prompt="])):
        assert runs(run.main, "image=small1.png", "method=none", f"out={name}", *prompt)[0] == 0
    assert (tmp_path / "none.png").read_bytes() == (tmp_path / "empty.png").read_bytes()
    assert yaml.safe_load((tmp_path / "none.yaml").read_text())["prompt"] == ""


@pytest.mark.parametrize(
    ("arguments", "reason"), [((), "takes a picture"), (("image=gone.png",), "cannot read the picture gone.png")]
)
def test_run_without_a_picture_says_so_in_a_sentence(runs, arguments, reason):
    code, stdout, stderr = runs(run.main, "prompt=a sign", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and reason in stderr


EXPERIMENT = """# @package experiments.own
title: mine
metrics: ["psnr@truth", "ssim@truth", psnr]
settings:
  Baseline: {method: none}
  H2-Cache: {method: h2cache, tau1: 0.9, tau2: 0.9}
outputs:
  - {_target_: h2cache.eval.report.tables.EnlargementTable}
  - {_target_: h2cache.eval.report.figures.Crops}
"""


def test_an_experiment_measures_against_the_truth_and_beside_bicubic(runs, pictures, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/own.yaml").write_text(EXPERIMENT)
    chosen = ["experiment=own", f"hydra.searchpath=[file://{tmp_path}]", "prompts=jsonl", "out=results"]
    chosen += ["launcher.workers=1"]  # what workers draw is tested elsewhere, and each is seconds of imports
    code, _, stderr = runs(program.main, *chosen, f"prompts.path={pictures.path}")
    assert code == 0, stderr
    frame = pd.read_csv(tmp_path / "results/own/measurements.csv")
    truths = {str(index): tmp_path / f"truth{index}.png" for index in range(2)}
    for row in frame.itertuples():
        made, truth = Image.open(tmp_path / "results" / row.image), Image.open(truths[str(row.prompt_id)])
        assert frame.at[row.Index, "psnr@truth"] == pytest.approx(psnr(made, truth))
    table = pd.read_csv(tmp_path / "results/own/enlargement.csv", index_col="setting")
    bicubic = np.mean(
        [
            psnr(Image.open(tmp_path / f"small{i}.png").resize((32, 32), Image.Resampling.BICUBIC), smooth(i))
            for i in range(2)
        ]
    )
    assert table.at["bicubic", "psnr@truth"] == pytest.approx(bicubic)
    mine = frame[frame["setting"] == "Baseline"]["psnr@truth"].mean()
    assert table.at["Baseline", "psnr@truth_gain"] == pytest.approx(mine - bicubic)
    assert (tmp_path / "results/own/crops.png").stat().st_size > 0


def test_an_experiment_with_pictures_is_for_models_that_take_them(runs, pictures):
    code, _, stderr = runs(program.main, "experiment=separation", "prompts=cute80", "limit=1")
    assert code == 2 and "takes a picture beside the prompt" in stderr
