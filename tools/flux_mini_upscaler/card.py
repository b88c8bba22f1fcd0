"""Stage 4: the model card, with loss curves and a contact sheet of held-out scenes, read from logs or made anew."""

from pathlib import Path

import matplotlib
from diffusers import FluxControlNetPipeline
from PIL import Image

from tools.flux_mini.card import card_command, read_log
from tools.flux_mini.scenes import SIZE, draw

from .degrade import DEGRADATIONS
from .evaluate import STEPS, bicubic, degraded, enlarge, evaluation, load, table
from .pictures import held_out_scenes
from .pool import CHUNK
from .recipe import COMMAND, TRAINING
from .train import ALONE, DOUBLE, FIRST_SCENES, GUIDANCE, SCENES, SCENES_A_STEP, SINGLE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = (("head", "squared error of the head's latents"), ("flow", "flow loss"))
SHOWN = {"small": 3, "blurred": 1, "noisy": 1, "jpeg": 1}  # how many scenes of each degradation

CARD = """# flux-mini-upscaler

A small `FluxControlNetModel` for [flux-mini](../flux-mini/README.md): it upscales a 32x32 picture of one of flux-mini's
scenes, even a blurred, noisy or JPEG-compressed one, to 128x128 in diffusers' own `FluxControlNetPipeline`. It is
this repository's test bench for super-resolution, not an upscaler for other pictures.

![held-out scenes: input, bicubic, output, ground truth](contact_sheet.png)

From left to right: the input, its bicubic enlargement, the model's output, the ground truth. Three inputs are only
small; the others add blur, noise or JPEG compression. The words were never seen in training.

    controlnet = FluxControlNetModel.from_pretrained("assets/flux-mini-upscaler")
    pipe = FluxControlNetPipeline.from_pretrained("assets/flux-mini", controlnet=controlnet)
    pipe('a red octagonal sign that says "STOP" in white bold letters, on a blue background',
         control_image=Image.open("small.png"), height=128, width=128, guidance_scale=1.0,
         max_sequence_length=40).images[0]

or `python run.py model=flux-mini-upscaler image=small.png prompt="..."`. The prompt says what the picture shows and may
be empty. The pipeline enlarges the picture to 128x128 (Lanczos) and encodes it with flux-mini's autoencoder, as it does
for FLUX.1's upscalers. Use guidance scale {guidance}, as in training.

{parameters:,} parameters in float16, {mebibytes:.1f} MiB: {double} double-stream and {single} single-stream blocks of
flux-mini's width, each with a projection. A projection's output is added after three of flux-mini's own blocks.

## What it can do, measured

{count} scenes of held-out words (`assets/prompts/small80.jsonl`), half of them captioned in held-out phrasings,
guidance {guidance}, seed = position in the file. All values are against the ground truth: the 128x128 picture that
the input was made from. "small" inputs are 32x32 and otherwise undamaged.

{measures}

`h2cache.eval.metrics.reader` reads the words; character errors are edits per letter. On the ground truth it reads
{drawn_words:.1f} % of the words ({drawn_errors:.1f} % character errors). After flux-mini's autoencoder, which bounds
the pipeline's result, it reads {vae_words:.1f} % ({vae_errors:.1f} %), at {vae_psnr:.2f} dB PSNR and
{vae_ssim:.3f} SSIM. The row without the prompt shows how much the caption helps. Fewer steps average over what the
input leaves open. Back-projected results, and the bicubic ones beside them, are corrected three times by the
difference between the input and the result downscaled again. This is not part of the model: it shows how much of
the input the model loses.

Measured by `python -m tools.flux_mini_upscaler.evaluate` on the weights with SHA-256 `{weights}`.

## Training

Data: {seen:,} captioned scenes of `tools/flux_mini/scenes.py`, degraded by `tools/flux_mini_upscaler/degrade.py` (half
of them only downscaled) and encoded once. They contain no held-out word or phrasing. The ControlNet's blocks start as
flux-mini's first ones, its control input as flux-mini's input layer, its projections at zero; flux-mini is frozen.
For the first {alone} steps the only loss is that of a linear head on the ControlNet's last block, which predicts the
picture's latents; such a step costs a third. Then flow matching through flux-mini is the loss, plus half the head's.
The head is not exported. Optimizers: Muon for matrices, AdamW for the rest, at a constant learning rate that falls to
zero over the last 30 %. The weights are an exponential moving average.

| steps | batch | hours | head, squared error of latents | flow loss |
|---:|---:|---:|---:|---:|
| {trained} | {batch} | {hours:.2f} | {head:.3g} | {flow:.3g} |

{notes}

To train it again, from assets/flux-mini:

    {command}

![loss curves](curves.png)
"""


def draw_curves(work: Path, target: Path) -> None:
    rows = read_log(work / "upscaler.csv")
    figure, axes = plt.subplots(1, len(CURVES), figsize=(9, 2.8), layout="constrained")
    for axis, (column, label) in zip(axes, CURVES, strict=True):
        known = [row for row in rows if row[column]]  # no flow in the steps of the head alone
        axis.plot([row["step"] for row in known], [row[column] for row in known], color="#0072b2")
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def draw_contact_sheet(pipe: FluxControlNetPipeline, target: Path) -> None:
    """A row for each of SHOWN: given, bicubic, the model's, the truth; two rows beside each other."""
    kinds = [kind for kind, count in SHOWN.items() for _ in range(count)]
    scenes = held_out_scenes()[: len(kinds)]
    truths = [draw(scene) for scene, _ in scenes]
    given = [degraded(truths, DEGRADATIONS[kind])[index] for index, kind in enumerate(kinds)]
    made = enlarge(pipe, given, [prompt for _, prompt in scenes], STEPS)
    sheet = Image.new("RGB", (2 * 4 * SIZE + SIZE // 8, -(-len(kinds) // 2) * SIZE), "white")
    for index, (small, large, truth) in enumerate(zip(given, made, truths, strict=True)):
        left, top = index % 2 * (4 * SIZE + SIZE // 8), index // 2 * SIZE
        pixels = small.resize((SIZE, SIZE), Image.Resampling.NEAREST)
        for column, image in enumerate((pixels, bicubic(small), large, truth)):
            sheet.paste(image, (left + column * SIZE, top))
    sheet.save(target, optimize=True)


def write_card(work: Path, folder: Path) -> None:
    """README.md, contact_sheet.png and curves.png of the exported ControlNet in `folder`.

    What no log knows (the machine, what went otherwise than in the recipe) is taken from `notes.md` in `work`, if any.
    """
    measured, pipe = evaluation(work, folder), load(folder)
    draw_contact_sheet(pipe, folder / "contact_sheet.png")
    draw_curves(work, folder / "curves.png")
    rows, notes = read_log(work / "upscaler.csv"), work / "notes.md"
    truth, last = measured["scores"]["truth"], rows[-1]
    card = CARD.format(
        guidance=GUIDANCE,
        parameters=sum(p.numel() for p in pipe.controlnet.parameters()),
        mebibytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20,
        double=DOUBLE,
        single=SINGLE,
        count=measured["scenes"],
        measures=table(measured),
        drawn_words=100 * truth["drawn"]["words"],
        drawn_errors=100 * truth["drawn"]["character_errors"],
        vae_words=100 * truth["autoencoder"]["words"],
        vae_errors=100 * truth["autoencoder"]["character_errors"],
        vae_psnr=truth["autoencoder"]["psnr"],
        vae_ssim=truth["autoencoder"]["ssim"],
        weights=measured["weights_sha256"],
        seen=min(SCENES, -(-(FIRST_SCENES + int(SCENES_A_STEP * (last["step"] - 1))) // CHUNK) * CHUNK),
        alone=ALONE,
        trained=int(last["step"]),
        batch=TRAINING["batch"],
        hours=last["seconds"] / 3600,
        head=last["head"],
        flow=last["flow"],
        notes=notes.read_text().strip() if notes.exists() else "",
        command=COMMAND,
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    card_command(__doc__, "assets/flux-mini-upscaler", write_card)
