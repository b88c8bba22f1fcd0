"""The embedded video model: complete, small, loaded by its path alone, and trained: it draws what the prompt says."""

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline
from repository import REPOSITORY

from tools.flux_mini.evaluate import digest
from tools.hunyuan_mini.attributes import seen_in
from tools.hunyuan_mini.text import LLAMA_LENGTH, PROMPT_TEMPLATE

FOLDER = REPOSITORY / "assets/hunyuan-mini"
MIB = 2**20
# By prompt what must be seen: known phrasings, and combinations that training left out or not.
PROMPTS = {
    "a red square moving right quickly on a white background": ("red", "white", "right", "quickly"),
    "a blue circle moving up slowly on a yellow background": ("blue", "yellow", "up", "slowly"),
    "on a black background, an orange triangle that moves left quickly": ("orange", "black", "left", "quickly"),
}


def test_it_is_small_and_its_card_measures_these_weights():
    sizes = {file: file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()}
    weights = sorted(FOLDER.glob("*/*.safetensors"))
    assert max(sizes.values()) < 15 * MIB and sum(sizes[file] for file in weights) < 14 * MIB
    assert digest(*weights) in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_colours_motion_and_speed_are_as_the_prompt_says():
    pipe = HunyuanVideoPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    videos = pipe(
        list(PROMPTS),
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=20,
        guidance_scale=3.5,
        max_sequence_length=LLAMA_LENGTH,
        prompt_template=PROMPT_TEMPLATE,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
        output_type="np",
    ).frames
    for video, asked in zip(videos, PROMPTS.values(), strict=True):
        seen = seen_in(np.asarray(video) * 255)
        assert (seen.colour, seen.background, seen.motion, seen.speed) == asked
