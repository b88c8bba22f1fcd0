"""Measures of an exported hunyuan-mini on held-out prompts: are the attributes of the prompt in the video, and how much
of a clip survives the autoencoder?

Attributes are read by rules (`h2cache.eval.metrics.clips`), which are tried on clips whose truth is known, so that
their own errors stand beside what they say.
"""

import argparse
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline

from h2cache.eval.metrics.clips import ClipAttributes
from h2cache.eval.metrics.motions import DIRECTIONS, FRAMES, SIZE
from tools.flux_mini.evaluate import digest, percent

from .attributes import attributes_of, seen_in
from .clips import draw, random_clip
from .text import LLAMA_LENGTH, PROMPT_TEMPLATE
from .vae import decibels, reconstruct, to_pixels

STEPS, GUIDANCE = 50, 3.5
PROMPTS = Path(__file__).resolve().parents[2] / "assets/prompts/motion80.jsonl"
CLIPS = 200  # whose truth is known, for the reader's own errors and the autoencoder
ATTRIBUTES = tuple(field.name for field in fields(ClipAttributes))
Pair = tuple[ClipAttributes, ClipAttributes]  # asked, seen


def load(folder: Path) -> HunyuanVideoPipeline:
    """The exported pipeline in float32, without progress bars."""
    pipe = HunyuanVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: HunyuanVideoPipeline, prompts: Sequence[str]) -> Iterator[np.ndarray]:
    """(17, 64, 64, 3) uint8 for each prompt, with its position as its seed."""
    for i, prompt in enumerate(prompts):
        frames = pipe(
            prompt,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=LLAMA_LENGTH,
            prompt_template=PROMPT_TEMPLATE,
            generator=torch.Generator().manual_seed(i),
        ).frames[0]
        yield np.stack([np.asarray(frame) for frame in frames])


def shares(pairs: Sequence[Pair]) -> dict[str, float]:
    """The share of videos in which each attribute is as asked, and `mean`, `all` of them, and `direction`: that of the
    motion where the prompt asks for one of DIRECTIONS."""
    right = {name: [getattr(asked, name) == getattr(seen, name) for asked, seen in pairs] for name in ATTRIBUTES}
    table = np.array(list(right.values()))
    moving = [
        is_right for (asked, _), is_right in zip(pairs, right["motion"], strict=True) if asked.motion in DIRECTIONS
    ]
    return {
        "count": len(pairs),
        **{name: float(np.mean(values)) for name, values in right.items()},
        "mean": float(table.mean()),
        "all": float(table.all(axis=0).mean()),
        "direction": float(np.mean(moving)) if moving else float("nan"),
    }


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
    """Measure the pipeline in `folder`; results go to `evaluation.json` in `work`, the videos to `samples.npy`."""
    pipe = load(folder)
    rng = random.Random("evaluation")
    clips = [random_clip(rng, held_out=True) for _ in range(CLIPS)]
    renders = [draw(clip) for clip in clips]
    pixels = to_pixels(renders)
    through = reconstruct(pipe.vae, pixels)
    quality = decibels(through, pixels)
    reconstructions = ((through + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()
    truths = [attributes_of(clip) for clip in clips]

    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    videos = list(sample(pipe, [row["prompt"] for row in rows]))
    np.save(work / "samples.npy", np.stack(videos))
    asked = [ClipAttributes(**{name: row[name] for name in ATTRIBUTES}) for row in rows]
    pairs = [(ask, seen_in(video)) for ask, video in zip(asked, videos, strict=True)]
    groups = {"all": pairs}
    for phrasing in dict.fromkeys(row["phrasing"] for row in rows):
        groups[phrasing] = [pair for pair, row in zip(pairs, rows, strict=True) if row["phrasing"] == phrasing]

    result = {
        "measured": identity(folder, prompts),
        "reader": {
            name: shares([(truth, seen_in(video)) for truth, video in zip(truths, shown, strict=True)])
            for name, shown in (("renders", renders), ("reconstructions", reconstructions))
        },
        "vae": {
            "count": CLIPS,
            "psnr": quality.mean().item(),
            "psnr_worst_frame": quality.min(dim=1).values.mean().item(),
        },
        "scores": {name: shares(group) for name, group in groups.items()},
        "readings": [
            {"id": row["id"], "asked": asdict(ask), "seen": asdict(seen)}
            for row, (ask, seen) in zip(rows, pairs, strict=True)
        ],
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


def tables(result: dict) -> str:
    """The results as Markdown: the prompts' groups, each attribute beside the reader's own share, the autoencoder."""
    groups = [
        f"| {name.replace('_', ' ')} | {s['count']} | {percent(s['mean'])} | {percent(s['direction'])} "
        f"| {percent(s['all'])} |"
        for name, s in result["scores"].items()
    ]
    overall, reader, vae = result["scores"]["all"], result["reader"], result["vae"]
    rows = [
        f"| {name} | {percent(overall[name])} | {percent(reader['renders'][name])} "
        f"| {percent(reader['reconstructions'][name])} |"
        for name in (*ATTRIBUTES, "all")
    ]
    return "\n".join(
        [
            "| prompts | count | attributes right, mean | direction right, where asked for | all of them right |",
            "|---|---:|---:|---:|---:|",
            *groups,
            "",
            f"| attribute | as asked | read right from {vae['count']} rendered clips | the same through the VAE |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            f"VAE reconstruction on {vae['count']} clips of held-out combinations: {vae['psnr']:.1f} dB PSNR, mean of "
            f"the frames, {vae['psnr_worst_frame']:.1f} dB in the worst frame of each.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the results")
    parser.add_argument("--folder", type=Path, default=Path("assets/hunyuan-mini"))
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(tables(evaluate(options.work, options.folder, options.prompts)))


if __name__ == "__main__":
    main()
