"""Stage 3: the model card, with a contact sheet of held-out prompts, read from the log or made anew."""

from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

from h2cache.eval.models.schedulers import denoised_with
from tools.flux_mini.card import card_command, read_log
from tools.flux_mini.evaluate import digest, sample

from .evaluate import MANY, held_out, load, measure, table
from .export import STRENGTH
from .recipe import COMMAND, FILE, GUIDANCE, PIXELS, STEPS, TRAINING
from .teach import PHRASED
from .train import EXAMPLES, HELD_OUT, RANK

SHOWN = 8  # prompts on the contact sheet
CARD = """# flux-mini-distilled

A LoRA with which [flux-mini](../flux-mini/README.md) draws in {steps} Euler steps. It is this repository's test bench
for the question what is left for a cache where a model needs few steps anyway, and has no other use.

![held-out prompts: {steps} steps of Euler, of UniPC, with the LoRA, and {many} steps](contact_sheet.png)

A row each: flux-mini with {steps} steps of Euler, with {steps} of UniPC, with {steps} Euler steps and this LoRA, and
with {many} Euler steps. The words were never seen in training.

    pipe = FluxPipeline.from_pretrained("assets/flux-mini")
    pipe.load_lora_weights("assets/flux-mini-distilled", weight_name="{file}")
    pipe.fuse_lora()
    pipe('a red octagonal sign that says "STOP" in white bold letters, on a blue background', height=128, width=128,
         num_inference_steps={steps}, guidance_scale={guidance}, max_sequence_length=40).images[0]

or `python run.py model=flux-mini-distilled`. It is made for {steps} steps of flux-mini's own scheduler at
guidance {guidance}.

{parameters:,} parameters in float16, {mebibytes:.1f} MiB: rank {rank} on all matrices of the transformer.

Limits: where flux-mini itself confuses which colour belongs to what, the LoRA may decide otherwise than {many} steps
do, and the image becomes another one. It was trained for {steps} steps alone; with {twice}, use UniPC without it.

## What it can do, measured

All {count} prompts of `assets/prompts/signs80.jsonl`, guidance {guidance}, seed = position, float32. PSNR is to
flux-mini's image in {many} Euler steps.

{measures}

Measured by `python -m tools.flux_mini_distilled.card` on the weights with SHA-256 `{weights}`.

## Training

The teacher is flux-mini with {many} Euler steps, by the plan `assets/plans/flux-mini-3.json` of 16 calls, for
{examples:,} captions of random scenes in {phrasings} phrasings, and noise of which no evaluation asks. The student runs
its {steps} Euler steps from the same noise, and learns by the gradient through all of them to end in the teacher's
latents. The loss is the RMS distance there and its square. AdamW, a cosine schedule, an exponential average of the
weights; the blocks compute in bfloat16. The LoRA is exported at {strength:g} of its strength, at which held-out runs
end nearest.

| updates | runs in each | hours | distance of {held_out} held-out runs before | after |
|---:|---:|---:|---:|---:|
| {trained} | {batch} | {hours:.2f} | {before:.3f} | {after:.3f} |

{notes}

To train it again, from assets/flux-mini and the plan:

    {command}
"""


def draw_contact_sheet(folder: Path, target: Path) -> None:
    prompts = [row["prompt"] for row in held_out()[:SHOWN]]
    plain = load(folder)
    rows = [sample(plain, prompts, STEPS, SHOWN)]
    with denoised_with(plain, "unipc"):
        rows.append(sample(plain, prompts, STEPS, SHOWN))
    rows += [sample(load(folder, 1.0), prompts, STEPS, SHOWN), sample(plain, prompts, MANY, SHOWN)]
    sheet = Image.new("RGB", (SHOWN * PIXELS, len(rows) * PIXELS))
    for top, images in enumerate(rows):
        for left, image in enumerate(images):
            sheet.paste(image, (left * PIXELS, top * PIXELS))
    sheet.save(target, optimize=True)


def write_card(work: Path, folder: Path) -> None:
    """README.md and contact_sheet.png of the exported LoRA in `folder`.

    What no log knows (the machine, what went otherwise than in the recipe) is taken from `notes.md` in `work`, if any.
    """
    rows, notes = read_log(work / "distilled.csv"), work / "notes.md"
    draw_contact_sheet(folder, folder / "contact_sheet.png")
    card = CARD.format(
        steps=STEPS,
        many=MANY,
        twice=2 * STEPS,
        file=FILE,
        guidance=GUIDANCE,
        parameters=sum(part.numel() for part in load_file(folder / FILE).values()),
        mebibytes=(folder / FILE).stat().st_size / 2**20,
        rank=RANK,
        strength=STRENGTH,
        count=len(held_out()),
        measures=table(measure(folder)),
        weights=digest(folder / FILE),
        examples=EXAMPLES - HELD_OUT,
        phrasings=len(PHRASED),
        held_out=HELD_OUT,
        trained=int(rows[-1]["step"]),
        batch=TRAINING["batch"],
        hours=rows[-1]["seconds"] / 3600,
        before=rows[0]["held_out"],
        after=rows[-1]["held_out"],
        notes=notes.read_text().strip() if notes.exists() else "",
        command=COMMAND,
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    card_command(__doc__, "assets/flux-mini-distilled", write_card)
