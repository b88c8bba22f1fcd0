"""The embedded LoRA of few steps: small, nearer to the image of many steps than as few without it. And its training."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from repository import REPOSITORY

from h2cache.eval.metrics.images import psnr
from h2cache.eval.models.schedulers import denoised_with
from tools.flux_mini.card import read_log
from tools.flux_mini.evaluate import digest, sample
from tools.flux_mini.scenes import HELD_OUT_PHRASINGS, HELD_OUT_WORDS
from tools.flux_mini_distilled import teach, train
from tools.flux_mini_distilled.evaluate import held_out, load
from tools.flux_mini_distilled.export import STRENGTH, export
from tools.flux_mini_distilled.recipe import BASE, FILE, GUIDANCE, STEPS

FOLDER = REPOSITORY / "assets/flux-mini-distilled"
MIB = 2**20


def test_the_card_measures_these_weights():
    assert digest(FOLDER / FILE) in (FOLDER / "README.md").read_text()


def test_it_is_small():
    assert (FOLDER / FILE).stat().st_size < 5 * MIB


def test_it_is_nearer_to_the_image_of_many_steps_than_as_few_without_it():
    """On the last of the held-out prompts; the model card has all of them."""
    prompts, plain = [row["prompt"] for row in held_out()[-8:]], load(FOLDER)
    truths = sample(plain, prompts, 50, batch=8)
    near = [psnr(*pair) for pair in zip(sample(load(FOLDER, 1.0), prompts, STEPS, batch=8), truths, strict=True)]
    for solver in ("euler", "unipc"):
        with denoised_with(plain, solver):
            far = [psnr(*pair) for pair in zip(sample(plain, prompts, STEPS, batch=8), truths, strict=True)]
        assert np.mean(near) > np.mean(far) + 2, (solver, near, far)


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return load(FOLDER)


@pytest.fixture(scope="module")
def example() -> dict[str, torch.Tensor]:
    """Two of the teacher's runs."""
    return teach.taught(teach.teacher(), teach.captions(2), seed=1)


def end(pipe: FluxPipeline, example: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    call = {"prompt_embeds": example["states"], "pooled_prompt_embeds": example["pooled"], "guidance_scale": GUIDANCE}
    call |= {"latents": example["noise"], "height": 128, "width": 128, "num_inference_steps": steps}
    return pipe(**call, output_type="latent", return_dict=False)[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def test_the_teacher_ends_where_fifty_steps_do(pipe, example):
    many, few = end(pipe, example, 50), end(pipe, example, STEPS)
    assert distance(example["ends"], many) < 0.1 * distance(few, many)


def test_nobody_is_asked_for_what_was_taught():
    captions = teach.captions(500)
    assert len(set(captions)) == 500 and captions[:9] == teach.captions(9)
    assert not [word for word in HELD_OUT_WORDS for each in captions if f'"{word}"' in each]
    assert not set(HELD_OUT_PHRASINGS) & set(teach.PHRASED) and len(set(teach.PHRASED)) == len(teach.PHRASED)


def test_a_student_starts_as_the_pipeline_s_own_steps(pipe, example):
    own = end(pipe, example, STEPS)
    with torch.no_grad():
        torch.testing.assert_close(train.Student(load(FOLDER))(example), own, rtol=1e-4, atol=1e-4)


def test_the_recipe_trains_goes_on_and_exports(monkeypatch, tmp_path, example):
    """Two updates in two goes are those of one; the exported file draws as the training's own averaged LoRA at
    its strength does."""
    for name, value in {"EXAMPLES": 4, "HELD_OUT": 2, "CHUNK": 2, "LOOK": 1, "WARMUP": 0}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(teach, "CHUNK", 2)
    monkeypatch.setattr(train, "cosine", lambda step, steps, warmup: 1.0)
    monkeypatch.setattr(train, "speed_up_blocks", lambda *transformers: None)  # compiling takes minutes
    options = {"batch": 2, "learning_rate": 3e-3, "seed": 0, "device": torch.device("cpu")}
    for folder, goes in (("once", (2,)), ("twice", (1, 2))):
        for steps in goes:
            train.train(tmp_path / folder, steps=steps, **options)
    once, twice = (torch.load(tmp_path / folder / "distilled.pt", weights_only=True) for folder in ("once", "twice"))
    for a, b in zip(once["average"]["shadow"], twice["average"]["shadow"], strict=True):
        torch.testing.assert_close(a, b)
    rows = read_log(tmp_path / "twice" / "distilled.csv")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["held_out"] != rows[0]["held_out"]

    export(tmp_path / "once", tmp_path / "made")
    student = train.Student(FluxPipeline.from_pretrained(BASE, dtype=torch.float32))
    with torch.no_grad():
        plain = student(example)
        for parameter, averaged in zip(student.parameters(), once["average"]["shadow"], strict=True):
            parameter.copy_(averaged)
        for up in student.up:
            up.mul_(STRENGTH)
        taught = student(example)
    made = end(load(tmp_path / "made", 1.0), example, STEPS)
    assert distance(made, taught) < 0.01 * distance(taught, plain)
