"""Measures of the exported LoRA on held-out prompts: how near few steps come to flux-mini's image of many, beside as
few steps without it, and whether the picture is as asked."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from h2cache.eval.metrics.attributes import look, told
from h2cache.eval.metrics.images import psnr
from h2cache.eval.metrics.reader import WordReader
from h2cache.eval.models.schedulers import denoised_with
from h2cache.eval.models.weights import Weights
from tools.flux_mini.attributes import signs
from tools.flux_mini.evaluate import PROMPTS, sample
from tools.flux_mini.evaluate import STEPS as MANY
from tools.flux_mini.scores import attribute_scores, word_scores

from .recipe import BASE, FILE, STEPS

# Steps, solver and strength of the LoRA, None without it; of twice as many steps each does half as much.
WAYS = (
    (STEPS, "euler", None),
    (STEPS, "unipc", None),
    (STEPS, "euler", 1.0),
    (2 * STEPS, "euler", None),
    (2 * STEPS, "unipc", None),
    (2 * STEPS, "euler", 1.0),
    (2 * STEPS, "euler", 0.5),
)
BATCH = 16  # images in one call
SOLVERS = {"euler": "Euler", "unipc": "UniPC"}


def load(folder: Path, strength: float | None = None) -> FluxPipeline:
    """flux-mini in float32, with the LoRA in `folder` at this strength, or without it."""
    pipe = FluxPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if strength is not None:
        Weights(lora=str(folder / FILE), lora_strength=strength).put_on(pipe)
    return pipe


def scores(made: Sequence[Image.Image], truths: Sequence[Image.Image], rows: Sequence[dict]) -> dict[str, float]:
    """Over the pictures: `psnr`, the mean in dB to `truths`, and `low`, a tenth of them have less; `attributes` and
    `words`, the shares that are as asked."""
    asked, reader = [told(row["prompt"], signs()) for row in rows], WordReader.load()
    seen = [look(image, signs()).attributes for image in made]
    read = [(row["word"], reader.read(image)) for row, image in zip(rows, made, strict=True)]
    near = [psnr(a, b) for a, b in zip(made, truths, strict=True)]
    return {
        "psnr": float(np.mean(near)),
        "low": float(np.quantile(near, 0.1, method="lower")),
        "attributes": attribute_scores(list(zip(asked, seen, strict=True)))["mean"],
        "words": word_scores(read)["accuracy"],
    }


def held_out() -> list[dict]:
    """The rows of signs80.jsonl."""
    return [json.loads(line) for line in PROMPTS.read_text().splitlines()]


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Scores by way of drawing."""
    rows = held_out()
    prompts = [row["prompt"] for row in rows]
    truths = sample(load(folder), prompts, MANY, BATCH)
    found = {f"flux-mini, Euler, {MANY} steps": scores(truths, truths, rows)}
    for steps, solver, strength in WAYS:
        pipe = load(folder, strength)
        with denoised_with(pipe, solver):
            made = sample(pipe, prompts, steps, BATCH)
        lora = "flux-mini" if strength is None else f"with the LoRA at strength {strength:g}"
        found[f"{lora}, {SOLVERS[solver]}, {steps} steps"] = scores(made, truths, rows)
    return found


def table(measured: dict[str, dict[str, float]]) -> str:
    """A row a way of drawing, in Markdown."""
    columns = [f"PSNR to {MANY} steps, dB", "lowest tenth below, dB", "attributes right", "words right"]
    lines = [f"| way of drawing | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, each in measured.items():
        near = [f"{each[what]:.2f}" if np.isfinite(each[what]) else "–" for what in ("psnr", "low")]
        right = [f"{100 * each[what]:.1f} %" for what in ("attributes", "words")]
        lines.append(f"| {name} | {' | '.join(near + right)} |")
    return "\n".join(lines)
