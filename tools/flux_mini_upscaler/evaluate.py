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
from tools.flux_mini.scores import word_scores
from tools.flux_mini.text import T5_LENGTH
from tools.flux_mini.vae import to_pixels

from .degrade import DEGRADATIONS, SMALL
from .pictures import held_out_scenes
from .train import BASE, GUIDANCE

STEPS, FEW, FEWER = 50, 8, (4,)  # the other ways of degrading are measured in FEW steps


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


def back_projected(image: Image.Image, picture: Image.Image, rounds: int = 3) -> Image.Image:
    """The image, corrected so that it shrinks to the small picture that it was made from (Irani and Peleg 1991)."""
    pixels, given = (np.asarray(each, np.float32) for each in (image, picture))
    for _ in range(rounds):
        pixels = pixels + _resized(given - _resized(pixels, SMALL), SIZE)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """(side, side, channels), by Pillow's bicubic filter, antialiased where it shrinks; float32, not clipped."""
    channels = [Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC) for channel in pixels.T]
    return np.stack([np.asarray(channel) for channel in channels]).T


@torch.no_grad()
def reconstructed(pipe: FluxControlNetPipeline, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures through the autoencoder and back."""
    made = []
    for picture in pictures:
        decoded = pipe.vae.decode(pipe.vae.encode(to_pixels([picture])).latent_dist.mean).sample
        made += pipe.image_processor.postprocess(decoded)
    return made


def scores(made: Sequence[Image.Image], truths: Sequence[Image.Image], words: Sequence[str]) -> dict[str, float]:
    """Means over the pictures: `psnr` (dB), `ssim`, `words` (share read right), `character_errors` (edits a letter)."""
    reader = WordReader.load()
    read = word_scores([(word, reader.read(image)) for image, word in zip(made, words, strict=True)])
    return {
        "psnr": float(np.mean([psnr(a, b) for a, b in zip(made, truths, strict=True)])),
        "ssim": float(np.mean([ssim(a, b) for a, b in zip(made, truths, strict=True)])),
        "words": read["accuracy"],
        "character_errors": read["cer"],
    }


def measure(pipe: FluxControlNetPipeline, scenes: Sequence[tuple[Scene, str]]) -> dict[str, dict]:
    """By the way of degrading: the model's scores and the bicubic enlargement's; the truth's own through the VAE."""
    truths = [draw(scene) for scene, _ in scenes]
    prompts, words = [prompt for _, prompt in scenes], [scene.word for scene, _ in scenes]

    def compared(made: list[Image.Image], plain: list[Image.Image]) -> dict[str, dict[str, float]]:
        return {"model": scores(made, truths, words), "bicubic": scores(plain, truths, words)}

    found = {"truth": {"drawn": scores(truths, truths, words)}}
    found["truth"]["autoencoder"] = scores(reconstructed(pipe, truths), truths, words)
    small = degraded(truths, DEGRADATIONS["small"])
    plain = [bicubic(each) for each in small]
    for steps in (STEPS, FEW, *FEWER):
        name, made = f"small, {steps} step{'s' * (steps > 1)}", enlarge(pipe, small, prompts, steps)
        found[name] = compared(made, plain)
        if steps in (STEPS, FEW):
            projected = [[back_projected(*pair) for pair in zip(each, small, strict=True)] for each in (made, plain)]
            found[f"{name}, back-projected"] = compared(*projected)
    found[f"small, without the prompt, {FEW} steps"] = compared(enlarge(pipe, small, [""] * len(small), FEW), plain)
    for name, degrade in DEGRADATIONS.items():
        if name != "small":
            given = degraded(truths, degrade)
            made = enlarge(pipe, given, prompts, FEW)
            found[f"{name}, {FEW} steps"] = compared(made, [bicubic(each) for each in given])
    return found


def degraded(truths: Sequence[Image.Image], degrade: Callable) -> list[Image.Image]:
    """Each in its own way, the same in every run."""
    return [degrade(truth, random.Random(f"evaluated-{index}")) for index, truth in enumerate(truths)]


def evaluation(work: Path, folder: Path) -> dict:
    """`evaluation.json` in `work` if it is of these weights and of flux-mini's that are here, else made now."""
    file, scenes = work / "evaluation.json", held_out_scenes()
    measured = {
        "weights_sha256": digest(*sorted(folder.glob("*.safetensors"))),
        "flux_mini_sha256": digest(*sorted(BASE.glob("*/*.safetensors"))),
        "scenes": len(scenes),
        "steps": STEPS,
    }
    if file.exists() and measured.items() <= (known := json.loads(file.read_text())).items():
        return known
    found = measured | {"scores": measure(load(folder), scenes)}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=2))
    os.replace(partial, file)
    return found


def table(measured: dict) -> str:
    """A row a way of degrading, in Markdown."""
    columns = ["picture", "PSNR, dB", "bicubic", "gained", "SSIM", "bicubic"]
    columns += ["words read", "bicubic", "character errors", "bicubic"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, compared in measured["scores"].items():
        if "model" not in compared:
            continue
        model, plain = compared["model"], compared["bicubic"]
        cells = [f"{model['psnr']:.2f}", f"{plain['psnr']:.2f}", f"{model['psnr'] - plain['psnr']:+.2f}"]
        cells += [f"{model['ssim']:.3f}", f"{plain['ssim']:.3f}"]
        cells += [f"{100 * each[what]:.1f} %" for what in ("words", "character_errors") for each in (model, plain)]
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
