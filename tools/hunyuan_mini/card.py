"""Stage 6: the model card, with loss curves and a contact sheet of held-out prompts, all read from logs and made
anew."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from h2cache.eval.metrics.motions import FRAMES, MOTIONS, SHAPES, SIZE
from tools.flux_mini.card import card_command, draw_curves, read_log
from tools.flux_mini.scenes import COLOURS

from .evaluate import GUIDANCE, PROMPTS, STEPS, evaluation, load, tables
from .recipe import COMMAND, STAGES
from .text import LLAMA_LENGTH, SKIPPED_LAYERS

CURVES = (
    ("vae.csv", "psnr", "VAE: PSNR, dB"),
    ("transformer.csv", "loss", "flow loss"),
    ("distilled.csv", "loss", "distillation loss"),
)
ROWS, SHOWN_FRAMES = 12, 9

CARD = """# hunyuan-mini

A small but complete HunyuanVideo: `HunyuanVideoPipeline.from_pretrained("assets/hunyuan-mini")` loads it offline, and
whatever works on HunyuanVideo's transformer works on this one, in seconds on a CPU. It draws one coloured shape
that moves, turns, appears or stands still on a coloured background: {frames} frames of {size}x{size}. It is this
repository's test bench and has no other use: it knows {colours} colours, {shapes} shapes and {motions} motions, and
prompts outside the grammar of `tools/hunyuan_mini/clips.py` give arbitrary videos.

![{rows} held-out prompts, every second frame](contact_sheet.png)

Each row is one of the first {rows} prompts of `assets/prompts/motion80.jsonl`. None of these combinations of shape,
colour, motion and speed, and only half of the phrasings, were seen in training ({sampling} steps, guidance {guidance}):

{prompts}

    pipe = HunyuanVideoPipeline.from_pretrained("assets/hunyuan-mini")
    pipe("a red star moving right quickly on a blue background", height={size}, width={size}, num_frames={frames},
         guidance_scale={guidance}, max_sequence_length={length},
         prompt_template={{"template": "{{}}", "crop_start": 0}}).frames[0]

`python run.py model=hunyuan-mini prompt="..."` does the same and writes an MP4. The pipeline's default template puts
{own_template} tokens of instructions before the prompt and drops their hidden states again. This model was trained on
the prompt alone, padded to {length} tokens, so call it with the template and length above.

| part | class | parameters |
|---|---|---:|
{parts}

{latents} latent frames of 8x8, {tokens} video tokens; {double} double-stream and {single} single-stream blocks of width
{width}; {refiner} block of the text refiner; guidance embedding; flow-matching scheduler with shift {shift:g}. The
pipeline reads Llama's hidden states {skipped} layers before the last, so its last {skipped} layers are not used and
were not trained. Weights are float16, {size_mib:.1f} MiB in all.

## What it can do, measured

All {count} prompts of `motion80.jsonl`, {sampling} steps, guidance {guidance}, seed = position in the file.

{measures}

Rules without any training read the attributes from the pixels (`h2cache.eval.metrics.clips`). They follow the shape
through the frames. A shape that moves like none of the motions counts as unsteady, which is never right: frozen and
shuffled videos are wrong (`tests/tools/test_hunyuan_mini_tools.py`). The reader's own accuracy is measured on clips
with known truth, as rendered and after the autoencoder. Measured by
`python -m tools.hunyuan_mini.evaluate` on the weights with SHA-256 `{weights}`.

## Training

Data: clips drawn on the fly by `tools/hunyuan_mini/clips.py`, with captions from the same description; for the
transformer, {pool} of them were encoded once. One in ten combinations of shape, colour, motion and speed is held out.
No other videos or text were used. All seeds are fixed; float sums on other machines may round differently.

| stage | steps | batch | hours | result |
|---|---:|---:|---:|---|
{stages}

{notes}

To train it from scratch:

    {command}

![loss curves](curves.png)
"""


def draw_contact_sheet(videos: np.ndarray, target: Path) -> None:
    """A row for each of (N, 17, 64, 64, 3) videos: every second frame."""
    shown = videos[:, :: (FRAMES - 1) // (SHOWN_FRAMES - 1)]
    rows = [np.concatenate(list(video), axis=1) for video in shown]
    Image.fromarray(np.concatenate(rows)).save(target)


def write_card(work: Path, folder: Path) -> None:
    """README.md, contact_sheet.png and curves.png of the exported pipeline in `folder`.

    What no log knows (the machine, what went otherwise than in the recipe) is taken from `notes.md` in `work`, if any.
    The measures come from `evaluation.json`, which is made now if these weights have not been measured yet.
    """
    measured = evaluation(work, folder)
    pipe = load(folder)
    draw_contact_sheet(np.load(work / "samples.npy")[:ROWS], folder / "contact_sheet.png")
    draw_curves(work, folder / "curves.png", CURVES)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[:ROWS]]
    names = ("transformer", "vae", "text_encoder", "text_encoder_2")
    modules = {name: getattr(pipe, name) for name in names}
    parts = [
        f"| {name} | {type(module).__name__} | {sum(p.numel() for p in module.parameters()):,} |"
        for name, module in modules.items()
    ]
    batches = {stage: settings.get("batch") for stage, settings in STAGES}
    notes = work / "notes.md"
    stages = []
    for stage, name, log, column, unit in (
        ("vae", "autoencoder", "vae.csv", "psnr", "dB PSNR on held-out clips"),
        ("transformer", "transformer and text encoders", "transformer.csv", "loss", "flow loss"),
        ("distill", "guidance distillation", "distilled.csv", "loss", "squared distance to the guided pair"),
    ):
        last = read_log(work / log)[-1]
        hours = last["seconds"] / 3600
        stages.append(f"| {name} | {last['step']:.0f} | {batches[stage]} | {hours:.2f} | {last[column]:.3g} {unit} |")
    config = pipe.transformer.config
    latent_frames = (FRAMES - 1) // pipe.vae_scale_factor_temporal + 1
    side = SIZE // pipe.vae_scale_factor_spatial // config.patch_size
    card = CARD.format(
        frames=FRAMES,
        size=SIZE,
        colours=len(COLOURS),
        shapes=len(SHAPES),
        motions=len(MOTIONS),
        rows=ROWS,
        sampling=STEPS,
        guidance=GUIDANCE,
        prompts="\n".join(f"{number}. {prompt}" for number, prompt in enumerate(prompts, start=1)),
        length=LLAMA_LENGTH,
        own_template=95,  # `crop_start` of the pipeline's default template
        parts="\n".join(parts),
        latents=latent_frames,
        tokens=latent_frames * side * side,
        double=config.num_layers,
        single=config.num_single_layers,
        width=config.num_attention_heads * config.attention_head_dim,
        refiner=config.num_refiner_layers,
        shift=pipe.scheduler.config.shift,
        skipped=SKIPPED_LAYERS,
        size_mib=sum(file.stat().st_size for file in folder.glob("*/*.safetensors")) / 2**20,
        count=measured["scores"]["all"]["count"],
        measures=tables(measured),
        weights=measured["measured"]["weights_sha256"],
        pool=f"{json.loads((work / 'latents.json').read_text())['count']:,}",
        stages="\n".join(stages),
        notes=notes.read_text().strip() if notes.exists() else "",
        command=COMMAND,
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    card_command(__doc__, "assets/hunyuan-mini", write_card)
