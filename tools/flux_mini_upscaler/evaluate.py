"""Measures of an exported upscaler on the held-out scenes of `pictures.py`, in each way of degrading them.

Against the ground truth: PSNR, SSIM, and whether the word can be read; beside them the bicubic enlargement of the same
picture, and the truth itself through flux-mini's autoencoder, which no result can surpass by much.
"""

import argparse
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from PIL import Image

from h2cache.eval.metrics.images import psnr, ssim
from h2cache.eval.metrics.reader import WordReader
from tools.flux_mini.evaluate import digest
from tools.flux_mini.scenes import SIZE, Scene, draw
from tools.flux_mini.text import T5_LENGTH
from tools.flux_mini.vae import to_pixels

from .degrade import DEGRADATIONS
from .pictures import held_out_scenes
from .train import BASE, GUIDANCE

STEPS, FEWER_STEPS = 50, (1, 2, 4, 8, 20)
PROMPTLESS = "small, without the prompt"


def load(folder: Path) -> FluxControlNetPipeline:
    """flux-mini with the ControlNet in `folder`, in float32."""
    controlnet = FluxControlNetModel.from_pretrained(folder, torch_dtype=torch.float32)
    pipe = FluxControlNetPipeline.from_pretrained(BASE, controlnet=controlnet, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def enlarge(
    pipe: FluxControlNetPipeline, pictures: Sequence[Image.Image], prompts: Sequence[str], steps: int, batch: int = 8
) -> list[Image.Image]:
    """The pictures at 128x128, each with its position as its seed."""
    made = []
    for start in range(0, len(pictures), batch):
        part = slice(start, start + batch)
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(pictures[part]))]
        made += pipe(
            list(prompts[part]),
            control_image=list(pictures[part]),
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            max_sequence_length=T5_LENGTH,
            generator=generators,
        ).images
    return made


def bicubic(picture: Image.Image) -> Image.Image:
    """The picture at 128x128 by Pillow's bicubic filter."""
    return picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


@torch.no_grad()
def reconstructed(pipe: FluxControlNetPipeline, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures through the autoencoder and back."""
    made = []
    for picture in pictures:
        decoded = pipe.vae.decode(pipe.vae.encode(to_pixels([picture])).latent_dist.mean).sample
        made += pipe.image_processor.postprocess(decoded)
    return made


def scores(made: Sequence[Image.Image], truths: Sequence[Image.Image], words: Sequence[str]) -> dict[str, float]:
    """Means over the pictures: `psnr` in dB, `ssim`, `words` (share read exactly), `letters` (share of the letters that
    stand where they should, by the reader)."""
    reader = WordReader.load()
    read = [reader.read(image.convert("RGB")) for image in made]
    return {
        "psnr": float(np.mean([psnr(a, b) for a, b in zip(made, truths, strict=True)])),
        "ssim": float(np.mean([ssim(a, b) for a, b in zip(made, truths, strict=True)])),
        "words": float(np.mean([a == b for a, b in zip(read, words, strict=True)])),
        "letters": letters_read(read, words),
    }


def letters_read(read: Sequence[str], words: Sequence[str]) -> float:
    """The share of all letters that are read, in order: those of the longest common subsequence, less what is read
    besides, never below zero for a word."""
    right = sum(max(0, _common(a, b) - max(0, len(a) - len(b))) for a, b in zip(read, words, strict=True))
    return right / sum(map(len, words))


def _common(a: str, b: str) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for letter in a:
        before = row
        row = [0]
        for index, other in enumerate(b):
            row.append(before[index] + 1 if letter == other else max(row[-1], before[index + 1]))
    return row[-1]


def measure(pipe: FluxControlNetPipeline, scenes: Sequence[tuple[Scene, str]], steps: int = STEPS) -> dict[str, dict]:
    """By the way of degrading: the model's scores and the bicubic enlargement's; the truth's own through the VAE."""
    truths = [draw(scene) for scene, _ in scenes]
    prompts, words = [prompt for _, prompt in scenes], [scene.word for scene, _ in scenes]

    def compared(pictures: list[Image.Image], prompts: Sequence[str], steps: int) -> dict[str, dict[str, float]]:
        made = enlarge(pipe, pictures, prompts, steps)
        return {
            "model": scores(made, truths, words),
            "bicubic": scores([bicubic(each) for each in pictures], truths, words),
        }

    found = {"truth": {"drawn": scores(truths, truths, words)}}
    found["truth"]["autoencoder"] = scores(reconstructed(pipe, truths), truths, words)
    for name, degrade in DEGRADATIONS.items():
        found[name] = compared(degraded(truths, degrade), prompts, steps)
    small = degraded(truths, DEGRADATIONS["small"])
    found[PROMPTLESS] = compared(small, [""] * len(small), steps)
    for fewer in FEWER_STEPS:
        found[f"small, {fewer} step{'s' * (fewer > 1)}"] = compared(small, prompts, fewer)
    return found


def degraded(truths: Sequence[Image.Image], degrade: Callable) -> list[Image.Image]:
    """Each in its own way, the same in every run."""
    return [degrade(truth, random.Random(f"evaluated-{index}")) for index, truth in enumerate(truths)]


def evaluation(work: Path, folder: Path) -> dict:
    """`evaluation.json` in `work` if it is of these weights, else made now."""
    file, weights = work / "evaluation.json", digest(*sorted(folder.glob("*.safetensors")))
    if file.exists() and (known := json.loads(file.read_text()))["weights_sha256"] == weights:
        return known
    scenes = held_out_scenes()
    found = {"weights_sha256": weights, "scenes": len(scenes), "steps": STEPS, "scores": measure(load(folder), scenes)}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=2))
    os.replace(partial, file)
    return found


def table(measured: dict) -> str:
    """A row a way of degrading, in Markdown."""
    columns = ["picture", "PSNR, dB", "bicubic", "gained", "SSIM", "bicubic"]
    columns += ["words read", "bicubic", "letters read", "bicubic"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, compared in measured["scores"].items():
        if "model" not in compared:
            continue
        model, plain = compared["model"], compared["bicubic"]
        cells = [f"{model['psnr']:.2f}", f"{plain['psnr']:.2f}", f"{model['psnr'] - plain['psnr']:+.2f}"]
        cells += [f"{model['ssim']:.3f}", f"{plain['ssim']:.3f}"]
        cells += [f"{100 * each[what]:.1f} %" for what in ("words", "letters") for each in (model, plain)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of evaluation.json")
    parser.add_argument("--folder", type=Path, default=Path("assets/flux-mini-upscaler"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    measured = evaluation(options.work, options.folder)
    print(table(measured))
    print({name: values for name, values in measured["scores"]["truth"].items()})


if __name__ == "__main__":
    main()
