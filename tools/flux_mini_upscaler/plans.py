"""Calibrates plans for the upscaler: `python -m tools.flux_mini_upscaler.plans --budgets 3 4 6`.

`h2cache.calibrate` tries schedules on recorded runs: it calls the transformer with other latents, all else as recorded.
A ControlNet's samples depend on the latents as well. So for the calibration the ControlNet moves into the transformer:
the pipeline's own hands the encoded picture on, and the transformer calls the real one with its latents.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxTransformer2DModel
from PIL import Image

import h2cache
from h2cache.eval.files import atomic_files
from h2cache.plans.conditions import digest
from tools.calibration_prompts import UNTRAINED_PHRASINGS
from tools.flux_mini.scenes import PHRASINGS, SIZE, WORDS, caption, draw, random_scene
from tools.flux_mini.text import T5_LENGTH

from .degrade import shrink
from .evaluate import STEPS, load
from .train import GUIDANCE

SAMPLES = "controlnet_block_samples"


class Steered(torch.nn.Module):
    """A transformer with its ControlNet inside: its `controlnet_block_samples` are the encoded picture."""

    def __init__(self, transformer: FluxTransformer2DModel, controlnet: FluxControlNetModel):
        super().__init__()
        self.transformer, self.controlnet = transformer, controlnet

    def __getattr__(self, name: str) -> Any:
        """What the pipeline asks of a transformer: config, dtype, cache_context, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.transformer, name)

    def forward(self, **call: Any) -> Any:
        (picture,) = call.pop(SAMPLES)
        call.pop("controlnet_single_block_samples")
        call.pop("controlnet_blocks_repeat")
        shared = {name: value for name, value in call.items() if name not in ("return_dict", "joint_attention_kwargs")}
        double, single = self.controlnet(controlnet_cond=picture, return_dict=False, **shared)
        return self.transformer(**call, **{SAMPLES: double, "controlnet_single_block_samples": single})


class PassedOn(FluxControlNetModel):
    """Hands the encoded picture to the transformer, as if it were what a ControlNet had made of it."""

    def forward(self, controlnet_cond: torch.Tensor, **call: Any) -> tuple[tuple[torch.Tensor], None]:
        return (controlnet_cond,), None


def steered(pipe: FluxControlNetPipeline) -> FluxControlNetPipeline:
    """A pipeline that draws what `pipe` draws, with the ControlNet inside the transformer."""
    passing = PassedOn.from_config(pipe.controlnet.config).to(pipe.transformer.dtype)
    moved = FluxControlNetPipeline(**pipe.components | {"controlnet": passing})
    moved.transformer = Steered(pipe.transformer, pipe.controlnet)
    moved.set_progress_bar_config(disable=True)
    return moved


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
    """`h2cache.calibrate` with a picture for each prompt, all in one batch; the plan is for `pipe` itself."""
    plan = h2cache.calibrate(
        steered(pipe),
        list(prompts),
        budget,
        STEPS,
        batch_size=len(prompts),
        few=len(prompts),
        control_image=list(pictures),
        height=SIZE,
        width=SIZE,
        guidance_scale=GUIDANCE,
        max_sequence_length=T5_LENGTH,
        **search,
    )
    return replace(plan, made_for=replace(plan.made_for, model=digest(pipe.transformer)))


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
