"""Calibrates plans for the upscaler: `python -m tools.flux_mini_upscaler.plans --budgets 3 4 6`."""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetPipeline
from PIL import Image

from h2cache.eval.files import atomic_files
from h2cache.plans import Calibration
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


def recorded(
    pipe: FluxControlNetPipeline, prompts: Sequence[str], pictures: Sequence[Image.Image], **search: Any
) -> Calibration:
    """A calibration with a picture for each prompt, from which plans for all budgets are made."""
    return Calibration(
        pipe,
        list(prompts),
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
    parser.add_argument("--budgets", type=float, nargs="+", default=[3, 4, 6])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--history", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("assets/flux-mini-upscaler"))
    parser.add_argument("--out", type=Path, default=Path("assets/plans"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    search = {name: getattr(options, name) for name in ("seed", "tries", "history", "rounds")}
    calibration = recorded(load(options.folder), *examples(options.images, options.seed), **search)
    for budget in options.budgets:
        plan = calibration.plan(budget)
        target = options.out / f"flux-mini-upscaler-{budget:g}.json"
        with atomic_files([target]) as (file,):
            plan.save(file)
        print(f"{target}: steps {', '.join(map(str, plan.computed))}; {plan.notes['psnr']} dB on the calibration's own")


if __name__ == "__main__":
    main()
