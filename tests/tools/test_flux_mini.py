"""The embedded model: complete, small, loaded by its path alone, and trained: it draws what the prompt says."""

import math
import random

import pytest
import torch
from diffusers import FluxPipeline
from repository import REPOSITORY

from tools.flux_mini.evaluate import digest
from tools.flux_mini.scenes import COLOURS, HELD_OUT_WORDS, WORDS, Scene, caption, draw

FOLDER = REPOSITORY / "assets/flux-mini"
MIB = 2**20
# SHA-256 of the weights that every test on flux-mini was last seen to pass with, as the model card names them.
WEIGHTS = "12a77dbe84631abbebdfe1380cb283295aa012c290137d97cac1fd4c742a66fa"


def test_the_tests_were_written_for_these_weights():
    """After training anew: see every test of tests/ that takes `flux_mini` pass, then write the new digest here."""
    assert digest(*sorted(FOLDER.glob("*/*.safetensors"))) == WEIGHTS
    assert WEIGHTS in (FOLDER / "README.md").read_text(), "the model card measures other weights"


def test_it_is_small_and_has_flux_s_parts():
    sizes = [file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()]
    assert max(sizes) < 15 * MIB and sum(sizes) < 25 * MIB
    pipe = FluxPipeline.from_pretrained(FOLDER)
    config = pipe.transformer.config
    assert (config.num_layers, config.num_single_layers, config.guidance_embeds) == (6, 12, True)
    assert (pipe.vae.config.latent_channels, pipe.vae_scale_factor) == (16, 8)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {
        torch.float32
    }


def nearest_colour(pixel: tuple[int, int, int]) -> str:
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], pixel))


@pytest.mark.parametrize(
    ("shape", "colour", "wall"),
    [
        ("square sign", "red", "blue"),
        ("octagonal sign", "green", "white"),
        ("round sign", "yellow", "black"),
        ("square sign", "purple", "yellow"),
    ],
)
def test_it_follows_the_prompt_mini(flux_mini, shape, colour, wall):
    """The sign's colour above its word, and the wall's in the corner, are the ones that were asked for."""
    prompt = f'a {colour} {shape} that says "GATE" in {"black" if colour == "yellow" else "white"} bold letters, '
    prompt += f"on a {wall} background"
    call = dict(height=128, width=128, num_inference_steps=12, max_sequence_length=40)
    image = flux_mini(prompt, generator=torch.Generator().manual_seed(0), **call).images[0]
    assert nearest_colour(image.getpixel((64, 32))) == colour
    assert nearest_colour(image.getpixel((6, 6))) == wall


def test_a_caption_tells_what_is_drawn():
    """Image and caption come from one description; held-out words are in no vocabulary."""
    scene = Scene("square sign", "red", "GATE", "white", "arched", "bold", "plain", "blue")
    told = caption(scene, random.Random(0))
    assert all(part in told for part in ("square sign", "red", "white", "blue", '"GATE"', "in an arch"))
    assert draw(scene).getpixel((64, 24)) == COLOURS["red"] and draw(scene).getpixel((2, 2)) == COLOURS["blue"]
    assert not set(WORDS) & set(HELD_OUT_WORDS)
