"""Calibrates plans for the upscaler: `python -m tools.flux_mini_upscaler.plans --budgets 3 4 6`."""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetPipeline
from PIL import Image

import h2cache
from h2cache.eval.files import atomic_files
from tools.calibration_prompts import UNTRAINED_PHRASINGS
from tools.flux_mini.scenes import PHRASINGS, SIZE, WORDS, caption, draw, random_scene
from tools.flux_mini.text import T5_LENGTH

from .degrade import shrink
from .evaluate import STEPS, load
from .train import GUIDANCE


def examples(count: int, seed: int) -> tuple[list[str], list[Image.Image]]:
    """Captions and small pictures of scenes with words of the training; half of the captions in untrained phrasings."""
    rng, prompts, pictures = random.Random(f"plans-{seed}"), [], []
    for index in range(count):
        scene = random_scene(rng, word=rng.choice(WORDS))
        prompts.append(caption(scene, rng, (PHRASINGS, UNTRAINED_PHRASINGS)[index % 2]))
        pictures.append(shrink(draw(scene)))
    return prompts, pictures


def calibrated(
    pipe: FluxControlNetPipeline, prompts: Sequence[str], pictures: Sequence[Image.Image], budget: float, **search: Any
) -> h2cache.Plan:
    """`h2cache.calibrate` with a picture for each prompt."""
    return h2cache.calibrate(
        pipe,
        list(prompts),
        budget,
        STEPS,
        control_image=list(pictures),
        height=SIZE,
        width=SIZE,
        guidance_scale=GUIDANCE,
        max_sequence_length=T5_LENGTH,
        **search,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[4])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--tries", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("assets/flux-mini-upscaler"))
    parser.add_argument("--out", type=Path, default=Path("assets/plans"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, (prompts, pictures) = load(options.folder), examples(options.images, options.seed)
    for budget in options.budgets:
        plan = calibrated(pipe, prompts, pictures, budget, seed=options.seed, tries=options.tries)
        target = options.out / f"flux-mini-upscaler-{budget:g}.json"
        with atomic_files([target]) as (file,):
            plan.save(file)
        print(f"{target}: steps {', '.join(map(str, plan.computed))}; {plan.notes['psnr']} dB on the calibration's own")


if __name__ == "__main__":
    main()
