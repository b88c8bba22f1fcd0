"""The embedded upscaler: small, loaded by its path alone, trained: nearer to the truth than bicubic. And its measures,
which tell right pictures from wrong ones."""

import json
import math
import random

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetPipeline
from PIL import Image, ImageOps
from repository import REPOSITORY

import h2cache
from h2cache import PlanConfig
from h2cache.eval.generation.prompts import PromptFile
from h2cache.eval.metrics.images import psnr
from tools.flux_mini.evaluate import digest
from tools.flux_mini.latents import scene_at
from tools.flux_mini.scenes import HELD_OUT_WORDS, Scene, draw
from tools.flux_mini_upscaler import plans
from tools.flux_mini_upscaler.degrade import DEGRADATIONS, degraded, small
from tools.flux_mini_upscaler.evaluate import back_projected, bicubic, enlarge, load, scores
from tools.flux_mini_upscaler.pictures import held_out_scenes
from tools.flux_mini_upscaler.pool import Pool, encode
from tools.flux_mini_upscaler.train import DECAY, WARMUP, Upscaler, rate

FOLDER = REPOSITORY / "assets/flux-mini-upscaler"
MIB = 2**20
SCENE = Scene("square sign", "red", "GATE", "white", "straight", "bold", "plain", "blue")


@pytest.fixture(scope="module")
def pipe() -> FluxControlNetPipeline:
    return load(FOLDER)


def test_the_card_measures_these_weights():
    assert digest(*sorted(FOLDER.glob("*.safetensors"))) in (FOLDER / "README.md").read_text()


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6 * MIB
    config = json.loads((FOLDER / "config.json").read_text())
    assert not any(isinstance(value, str) and "/" in value for value in config.values()), "a path of some machine"


def test_it_is_nearer_to_the_truth_than_a_bicubic_enlargement(pipe):
    """On the last of the held-out scenes, in a few steps; the model card has all of them in 50."""
    scenes = held_out_scenes()[-4:]
    truths = [draw(scene) for scene, _ in scenes]
    given = [truth.resize((32, 32), Image.Resampling.BICUBIC) for truth in truths]
    made = enlarge(pipe, given, [prompt for _, prompt in scenes], steps=8)
    gains = [psnr(a, t) - psnr(bicubic(g), t) for a, g, t in zip(made, given, truths, strict=True)]
    assert min(gains) > 0 and np.mean(gains) > 1.5, gains


def test_it_shows_the_picture_also_without_a_prompt(pipe):
    """Each of two pictures gives its own scene, with the same noise."""
    truths = [draw(scene) for scene, _ in held_out_scenes()[:2]]
    for truth, other in (truths, truths[::-1]):
        (made,) = enlarge(pipe, [small(truth, random.Random())], [""], steps=8)
        assert psnr(made, truth) > psnr(made, other) + 6


# The scenes.


def test_the_shipped_pictures_are_those_of_the_held_out_scenes():
    prompts = PromptFile(str(REPOSITORY / "assets/prompts/small80.jsonl")).load()
    assert len(prompts) == 80
    for prompt, (scene, text) in zip(prompts, held_out_scenes(), strict=True):
        assert (prompt.text, prompt.word) == (text, scene.word) and scene.word in HELD_OUT_WORDS
        assert np.array_equal(Image.open(prompt.truth.image), draw(scene))


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_degraded_picture_is_small_and_the_same_for_the_same_seed(name):
    image, degrade = draw(SCENE), DEGRADATIONS[name]
    first, again, plain = degrade(image, random.Random(1)), degrade(image, random.Random(1)), small(image, None)
    assert first.size == (32, 32) and np.array_equal(first, again)
    assert (psnr(first, plain) == math.inf) == (name == "small")
    assert psnr(first, plain) > 10


def test_training_takes_every_degradation():
    image, found = draw(SCENE), {name: 0 for name in DEGRADATIONS}
    for seed in range(60):
        rng = random.Random(seed)
        made = degraded(image, rng)
        chooser = random.Random(seed)
        chooser.random()  # what chose the kind
        matching = [name for name, degrade in DEGRADATIONS.items() if _same(degrade, image, made, seed)]
        found[matching[0]] += 1
    assert all(found.values()) and max(found, key=found.get) == "small"


def _same(degrade, image: Image.Image, made: Image.Image, seed: int) -> bool:
    rng = random.Random(seed)
    rng.random()
    return np.array_equal(degrade(image, rng), made)


# The measures.


def test_scores_of_the_truth_and_of_wrong_pictures():
    """Another word, a blurred one, a mirrored picture and another colour: each is told by what should tell it."""
    truth = draw(SCENE)
    right = scores([truth], [truth], ["GATE"])
    assert right == {"psnr": math.inf, "ssim": 1.0, "words": 1.0, "character_errors": 0.0}
    other = Scene(**{**vars(SCENE), "word": "KIOSK"})
    wrong = scores([draw(other)], [truth], ["GATE"])
    assert wrong["words"] == 0.0 and wrong["character_errors"] > 0.5 and wrong["psnr"] < 25
    mirrored = scores([ImageOps.mirror(truth)], [truth], ["GATE"])
    assert mirrored["words"] == 0.0 and mirrored["ssim"] < 0.95
    green = scores([draw(Scene(**{**vars(SCENE), "shape_colour": "green"}))], [truth], ["GATE"])
    assert green["words"] == 1.0 and green["psnr"] < 20
    tiny = scores([truth.resize((8, 8)).resize((128, 128))], [truth], ["GATE"])
    assert tiny["words"] == 0.0 and tiny["ssim"] < right["ssim"]


def test_back_projection_makes_what_shrinks_to_the_picture():
    truth = draw(SCENE)
    given = small(truth, None)
    tinted = Image.fromarray((np.asarray(truth) * 0.9).astype(np.uint8))
    mended = back_projected(tinted, given)
    assert psnr(small(mended, None), given) > psnr(small(tinted, None), given) + 10
    assert psnr(mended, truth) > psnr(tinted, truth) + 10


# The training.


def test_the_rate_rises_stays_and_falls_to_zero():
    steps = 1000
    assert rate(0, steps) == 1 / WARMUP and rate(WARMUP, steps) == rate(int((1 - DECAY) * steps), steps) == 1.0
    assert rate(850, steps) == pytest.approx(0.5) and 0 < rate(999, steps) < 0.01


def test_training_begins_with_flux_mini_s_own_velocity(pipe):
    """What the ControlNet adds starts at zero, and the head at the small picture's latents."""
    model, generator = Upscaler(pipe), torch.Generator().manual_seed(0)
    x, control, states, pooled = (
        torch.randn(2, *shape, generator=generator) for shape in ((64, 64), (64, 64), (40, 128), (128,))
    )
    t, batch = torch.tensor([0.3, 0.9]), {"control": control, "states": states, "pooled": pooled}
    velocity, latents = model(x, t, batch, alone=False)
    call = {"encoder_hidden_states": states, "pooled_projections": pooled, "guidance": torch.ones(2)}
    ids = {"img_ids": model.image_ids, "txt_ids": torch.zeros(40, 3)}
    assert torch.equal(velocity, pipe.transformer(x, timestep=t, **call, **ids).sample)
    assert torch.equal(latents, control + model.head.bias)
    assert model(x, t, batch, alone=True)[0] is None
    rates = [optimizer.param_groups[0]["params"] for optimizer in model.optimizers(1e-3)]
    assert sum(map(len, rates)) == len(list(model.parameters())), "each parameter is trained once, flux-mini's never"


def test_encoded_scenes_stay_on_disk(pipe, tmp_path):
    first = Pool(tmp_path, pipe, count=3, seed=1)
    first.grow(2)
    assert first.filled == 3, "a chunk, or all that there are"
    again = Pool(tmp_path, None, count=3, seed=1)
    assert again.filled == 3
    for name in first.arrays:
        assert np.array_equal(again.arrays[name], first.arrays[name]) and np.abs(first.arrays[name]).sum() > 0
    truth = encode(pipe, [draw(scene_at(1, index)) for index in range(3)])
    np.testing.assert_allclose(again.arrays["latents"], truth.half().numpy(), atol=1e-2)
    batch = again.batch(random.Random(0), 5, torch.device("cpu"))
    assert batch["control"].shape == (5, 64, 64) and batch["states"].dtype == torch.float32


# Plans.


def test_a_calibrated_plan_draws_what_the_calibration_saw(pipe, monkeypatch):
    monkeypatch.setattr(plans, "STEPS", 6)
    prompts, pictures = plans.examples(2, seed=5)
    plan = plans.recorded(pipe, prompts, pictures, seed=3, tries=2).plan(2)
    assert len(plan.computed) == 3
    call = dict(height=128, width=128, num_inference_steps=6, max_sequence_length=40, guidance_scale=1.0)

    def drawn(index: int) -> np.ndarray:
        """Not rounded to 256 levels, which alone is worth 56 dB."""
        generator = torch.Generator().manual_seed(3 + index)
        given = {"control_image": pictures[index], "generator": generator, "output_type": "np"}
        return pipe(prompts[index], **given, **call).images[0]

    plain = [drawn(index) for index in range(2)]
    with h2cache.apply(pipe, PlanConfig(plan)):
        planned = [drawn(index) for index in range(2)]
    measured = np.mean([-10 * np.log10(np.square(a - b).mean()) for a, b in zip(planned, plain, strict=True)])
    assert measured == pytest.approx(plan.notes["psnr"], abs=0.3)
