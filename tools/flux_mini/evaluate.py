"""Measures of an exported flux-mini on held-out prompts: are the attributes and the word of the prompt in the picture,
and how much of a scene survives the autoencoder?

Attributes are read by rules (`h2cache.eval.metrics.attributes`), words by a network that has seen rendered scenes alone
(`reader.py`); both are tried on scenes whose truth is known, so that their own errors stand beside what they say.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageDraw

from h2cache.eval.metrics.attributes import Attributes, look, told
from h2cache.eval.metrics.images import psnr

from . import reader
from .attributes import attributes_of, signs
from .scenes import SIZE, WORDS, Scene, draw, letter_boxes
from .scores import Reading, attribute_scores, score, word_scores
from .text import T5_LENGTH
from .vae import to_pixels

STEPS, GUIDANCE = 50, 3.5
PROMPTS = Path(__file__).resolve().parents[2] / "assets/prompts/signs80.jsonl"
SCENES = 400  # whose truth is known, for the readers' own errors and the autoencoder
LETTER_MARGIN = 2  # pixels around a letter's box
ATTRIBUTES = tuple(field.name for field in fields(Attributes))


def sample(pipe: FluxPipeline, prompts: Sequence[str], steps: int = STEPS, batch: int = 1) -> list[Image.Image]:
    """One image a prompt, each with its position as its seed; `batch` in one call."""
    made = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        made += pipe(
            part,
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            max_sequence_length=T5_LENGTH,
            generator=[torch.Generator().manual_seed(start + index) for index in range(len(part))],
        ).images
    return made


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Sequence[Image.Image], batch: int = 16) -> list[Image.Image]:
    """The images as the autoencoder gives them back, without noise in the latents."""
    results = []
    for start in range(0, len(images), batch):
        latents = vae.encode(to_pixels(images[start : start + batch])).latent_dist.mean
        pixels = (vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
        results += [Image.fromarray(array) for array in pixels.round().byte().permute(0, 2, 3, 1).numpy()]
    return results


def letter_mask(scene: Scene) -> np.ndarray:
    """(128, 128) bool: the pixels of the letters' boxes, upright or turned, and of a margin around each."""
    mask = Image.new("1", (SIZE, SIZE))
    pen = ImageDraw.Draw(mask)
    for letter in letter_boxes(scene):
        c, n = math.cos(letter.angle), math.sin(letter.angle)
        x, y = letter.width / 2 + LETTER_MARGIN, letter.height / 2 + LETTER_MARGIN
        corners = ((-x, -y), (x, -y), (x, y), (-x, y))
        pen.polygon([(letter.x + a * c - b * n, letter.y + a * n + b * c) for a, b in corners], fill=1)
    return np.asarray(mask)


def own_errors(network: reader.Reader, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> dict:
    """The share of images that the rules and the reader get wrong, where they show exactly these scenes."""
    seen = [look(image, signs()) for image in images]
    scores = attribute_scores([(attributes_of(a), b.attributes) for a, b in zip(scenes, seen, strict=True)])
    read = reader.read(network, [sight.letters for sight in seen])
    pairs = list(zip((scene.word for scene in scenes), read, strict=True))
    words = word_scores(pairs)
    short = word_scores([pair for pair in pairs if len(pair[0]) <= 5])
    return {
        "count": len(scenes),
        **{name: 1 - scores[name] for name in ATTRIBUTES},
        "word": 1 - words["accuracy"],
        "word_up_to_5_letters": 1 - short["accuracy"],
        "cer": words["cer"],
    }


def digest(*paths: Path) -> str:
    """SHA-256 of the files, one after the other."""
    state = hashlib.sha256()
    for path in paths:
        state.update(path.read_bytes())
    return state.hexdigest()


def identity(folder: Path, prompts: Path) -> dict:
    """What was measured, and how: equal for equal weights, prompts and settings."""
    return {
        "weights_sha256": digest(*sorted(folder.glob("*/*.safetensors"))),
        "prompts_sha256": digest(prompts),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "seed": "position",
    }


def evaluate(work: Path, folder: Path, prompts: Path = PROMPTS) -> dict:
    """Measure the pipeline in `folder`; results go to `evaluation.json` in `work`, the samples to `samples`.

    The reader is trained first, or loaded from `work`.
    """
    network = reader.train(work)
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    scenes = reader.held_out_scenes(seed=1, count=SCENES)
    renders = [draw(scene) for scene in scenes]
    reconstructions = reconstruct(pipe.vae, renders)
    pairs = list(zip(reconstructions, renders, strict=True))
    letters = [psnr(a, b, letter_mask(scene)) for (a, b), scene in zip(pairs, scenes, strict=True)]

    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    images = sample(pipe, [row["prompt"] for row in rows])
    (work / "samples").mkdir(parents=True, exist_ok=True)
    for row, image in zip(rows, images, strict=True):
        image.save(work / "samples" / f"{row['id']}.png")
    seen = [look(image, signs()) for image in images]
    words = reader.read(network, [sight.letters for sight in seen])
    readings = [
        Reading(row["word"], word, told(row["prompt"], signs()), sight.attributes, row.get("phrasing"))
        for row, sight, word in zip(rows, seen, words, strict=True)
    ]

    result = {
        "measured": identity(folder, prompts),
        "own_error": {
            "renders": own_errors(network, scenes, renders),
            "reconstructions": own_errors(network, scenes, reconstructions),
        },
        "vae": {
            "count": SCENES,
            "psnr": float(np.mean([psnr(*pair) for pair in pairs])),
            "psnr_letters": float(np.mean(letters)),
        },
        "scores": score(readings, WORDS),
        "readings": [{"id": row["id"], **asdict(reading)} for row, reading in zip(rows, readings, strict=True)],
    }
    partial = work / "evaluation.partial"
    partial.write_text(json.dumps(result, indent=1))
    os.replace(partial, work / "evaluation.json")
    return result


def evaluation(work: Path, folder: Path, prompts: Path = PROMPTS) -> dict:
    """What `evaluation.json` in `work` says about exactly these weights and prompts; measured now if it does not."""
    path = work / "evaluation.json"
    if path.exists():
        result = json.loads(path.read_text())
        if result["measured"] == identity(folder, prompts):
            return result
    return evaluate(work, folder, prompts)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def tables(result: dict) -> str:
    """The results as Markdown tables: words, attributes, and the autoencoder."""
    groups = {name.replace("_", " "): scores for name, scores in result["scores"].items()}
    words = [
        f"| {name} | {s['words']['right']} of {s['words']['count']} | {percent(s['words']['accuracy'])} "
        f"| {percent(s['words']['cer'])} | {percent(s['attributes']['mean'])} | {percent(s['attributes']['all'])} |"
        for name, s in groups.items()
    ]
    renders, reconstructions = result["own_error"]["renders"], result["own_error"]["reconstructions"]
    overall = result["scores"]["all"]["attributes"]
    rows = [(name.replace("_", " "), percent(overall[name]), name) for name in ATTRIBUTES]
    rows += [
        (f"word{text}", percent(result["scores"][group]["words"]["accuracy"]), name)
        for text, group, name in (
            ("", "all", "word"),
            (" of up to 5 letters", "up_to_5_letters", "word_up_to_5_letters"),
        )
        if group in result["scores"]
    ]
    own = [f"| {n} | {value} | {percent(renders[k])} | {percent(reconstructions[k])} |" for n, value, k in rows]
    vae = result["vae"]
    return "\n".join(
        [
            "| prompts | words right | word accuracy | character errors | attributes right, mean | all of them right |",
            "|---|---:|---:|---:|---:|---:|",
            *words,
            "",
            "| attribute | as asked | reader's own error, renders | the same through the VAE |",
            "|---|---:|---:|---:|",
            *own,
            "",
            f"VAE reconstruction on {vae['count']} held-out scenes: {vae['psnr']:.1f} dB PSNR, "
            f"{vae['psnr_letters']:.1f} dB on their letters.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the reader's checkpoint and of the results")
    parser.add_argument("--folder", type=Path, default=Path("assets/flux-mini"))
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(tables(evaluate(options.work, options.folder, options.prompts)))


if __name__ == "__main__":
    main()
