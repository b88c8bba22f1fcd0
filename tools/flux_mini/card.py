"""Stage 6: the model card, with loss curves and a contact sheet of held-out prompts, all read from logs and made
anew."""

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from diffusers import FluxPipeline
from PIL import Image

from .evaluate import GUIDANCE, PROMPTS, STEPS, evaluation, sample, tables
from .recipe import COMMAND, STAGES
from .scenes import COLOURS, FONTS, SHAPES, SIZE
from .text import T5_LENGTH
from .transformer import TOKENS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = (
    ("vae.csv", "psnr", "VAE: PSNR, dB"),
    ("transformer.csv", "loss", "flow loss"),
    ("distilled.csv", "loss", "distillation loss"),
)
ROWS, COLUMNS = 4, 6

CARD = """# flux-mini

A small but complete Flux: `FluxPipeline.from_pretrained("assets/flux-mini")` loads it offline, and whatever works on
FLUX.1-dev's transformer works on this one, in a second or two on a CPU. It draws one short word on a coloured sign,
label, jersey, badge or shopfront in front of a coloured wall, at {size}x{size}. It is this repository's test bench
and has no other use: it knows {colours} colours, {shapes} shapes, {fonts} fonts and capital letters, and prompts
outside the grammar of `tools/flux_mini/scenes.py` give arbitrary signs.

![{shown} held-out prompts](contact_sheet.png)

None of these words, and only half of the phrasings, were seen in training (the first {shown} prompts of
`assets/prompts/signs80.jsonl`; {sampling} steps, guidance {guidance}).

    pipe = FluxPipeline.from_pretrained("assets/flux-mini")
    pipe('a red octagonal sign that says "STOP" in white bold letters, on a blue background',
         height={size}, width={size}, max_sequence_length={length}).images[0]

It was trained with captions padded to {length} T5 tokens, so call it with `max_sequence_length={length}`.

| part | class | parameters |
|---|---|---:|
{parts}

{tokens} image tokens; {double} double-stream and {single} single-stream blocks of width {width}; guidance
embedding; dynamic-shift flow-matching scheduler. Weights are float16.

## What it can do, measured

All {count} prompts of `signs80.jsonl`, {sampling} steps, guidance {guidance}, seed = position in the file. None of
their words was seen in training.

{measures}

Rules read the attributes from the pixels. A small network reads the words; it was trained only on rendered scenes of
random letters and has no vocabulary. The errors of these readers are measured on scenes of held-out words with known
truth, as rendered and after the autoencoder. A word is right only if every letter is. Measured by
`python -m tools.flux_mini.evaluate` on the weights with SHA-256 `{weights}`.

## Training

Data: scenes drawn on the fly by `tools/flux_mini/scenes.py`, with captions from the same description; for the
transformer, {pool} of them were encoded once. No other images or text were used. All seeds are fixed; float sums on
other machines may round differently.

| stage | steps | batch | hours | result |
|---|---:|---:|---:|---|
{stages}

{notes}

To train it from scratch:

    {command}

![loss curves](curves.png)
"""


def read_log(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def draw_curves(work: Path, target: Path, curves: Sequence[tuple[str, str, str]] = CURVES) -> None:
    """A panel for each (log in `work`, column, title)."""
    figure, axes = plt.subplots(1, len(curves), figsize=(12, 2.8), layout="constrained")
    for axis, (name, column, label) in zip(axes, curves, strict=True):
        rows = read_log(work / name)
        axis.plot([row["step"] for row in rows], [row[column] for row in rows], color="#0072b2")
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def draw_contact_sheet(pipe: FluxPipeline, prompts: list[str], target: Path) -> None:
    """The images that `evaluate` measures, in reading order."""
    sheet = Image.new("RGB", (COLUMNS * SIZE, ROWS * SIZE))
    for i, image in enumerate(sample(pipe, prompts)):
        sheet.paste(image, (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    sheet.save(target)


def write_card(work: Path, folder: Path) -> None:
    """README.md, contact_sheet.png and curves.png of the exported pipeline in `folder`.

    What no log knows (the machine, what went otherwise than in the recipe) is taken from `notes.md` in `work`, if any.
    The measures come from `evaluation.json`, which is made now if these weights have not been measured yet.
    """
    measured = evaluation(work, folder)
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    shown = ROWS * COLUMNS
    lines = PROMPTS.read_text().splitlines()[:shown]
    draw_contact_sheet(pipe, [json.loads(line)["prompt"] for line in lines], folder / "contact_sheet.png")
    draw_curves(work, folder / "curves.png")
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
        ("vae", "autoencoder, on 64x64 crops", "vae.csv", "psnr", "dB PSNR on held-out scenes"),
        ("transformer", "transformer and text encoders", "transformer.csv", "loss", "flow loss"),
        ("distill", "guidance distillation", "distilled.csv", "loss", "squared distance to the guided pair"),
    ):
        last = read_log(work / log)[-1]
        hours = last["seconds"] / 3600
        stages.append(f"| {name} | {last['step']:.0f} | {batches[stage]} | {hours:.2f} | {last[column]:.3g} {unit} |")
    config = pipe.transformer.config
    card = CARD.format(
        size=SIZE,
        colours=len(COLOURS),
        shapes=len(SHAPES),
        fonts=len(FONTS),
        shown=shown,
        sampling=STEPS,
        guidance=GUIDANCE,
        count=measured["scores"]["all"]["words"]["count"],
        measures=tables(measured),
        weights=measured["measured"]["weights_sha256"],
        length=T5_LENGTH,
        parts="\n".join(parts),
        tokens=TOKENS,
        double=config.num_layers,
        single=config.num_single_layers,
        width=config.num_attention_heads * config.attention_head_dim,
        pool=f"{json.loads((work / 'latents.json').read_text())['count']:,}",
        stages="\n".join(stages),
        notes=notes.read_text().strip() if notes.exists() else "",
        command=COMMAND,
    )
    (folder / "README.md").write_text(card)


def card_command(description: str, folder: str, write: Callable[[Path, Path], None]) -> None:
    """The command line of a card alone: `write` is given the folder of the training and that of the model."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the training's logs and of the measures")
    parser.add_argument("--folder", type=Path, default=Path(folder))
    options = parser.parse_args()
    write(options.work, options.folder)


if __name__ == "__main__":
    card_command(__doc__, "assets/flux-mini", write_card)
