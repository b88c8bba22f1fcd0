"""Where the teacher comes from noise: flux-mini's image of 50 Euler steps, in 16 calls by the shipped plan.

Caption and noise of example `i` are functions of `i` alone. Examples are kept in chunks, so that a stage that was
killed goes on where it was.
"""

import random
from pathlib import Path

import torch
from diffusers import FluxPipeline

from h2cache.plans.scheduler import PlanScheduler
from tools.calibration_prompts import UNTRAINED_PHRASINGS
from tools.flux_mini.scenes import PHRASINGS, caption, random_scene
from tools.flux_mini.training import atomic_save

from .recipe import BASE, GUIDANCE, PIXELS, ROOT, TOKENS

PLAN = ROOT / "assets/plans/flux-mini-3.json"
CHUNK = 24
FIRST_SEED = 500_000  # of the noise: no evaluation and no calibration uses it
# A student that knows only the phrasings of flux-mini's training draws other images for others.
MORE_PHRASINGS = (
    'there is {sign} before {wall} and it says "{word}"{manner} in {letters}',
    '{letters}{manner} say "{word}"; they are on {sign}, and {wall} is behind',
    'before {wall}, "{word}"{manner} on {sign}, in {letters}',
    "{wall}. {sign}. the word {word} in {letters}{manner}",
    'a sign painter wrote "{word}" in {letters}{manner} on {sign}; {wall}',
    'the word is "{word}", in {letters}{manner}, the object {sign}, the scene {wall}',
    'close view of {sign}, {letters}{manner} with "{word}", {wall} all around',
    '{wall} with "{word}" in {letters}{manner} upon {sign}',
)
PHRASED = PHRASINGS + UNTRAINED_PHRASINGS + MORE_PHRASINGS


def captions(count: int) -> list[str]:
    """Of random scenes, their words mostly random strings; none of a word or a phrasing that an evaluation has."""
    rng = random.Random("distilled")
    return [caption(random_scene(rng), rng, PHRASED) for _ in range(count)]


def examples(work: Path, count: int) -> dict[str, torch.Tensor]:
    """The first `count` examples, a multiple of CHUNK: from `work` where they are there, else made now.

    Returns:
        The embeddings `states` (B, 40, 128) and `pooled` (B, 128), and the latents `noise` and `ends` (B, 64, 64).
    """
    chunks, pipe, prompts = [], None, captions(count)
    for start in range(0, count, CHUNK):
        file = work / "teacher" / f"{start:06}.pt"
        if not file.exists():
            pipe = pipe or teacher()
            atomic_save(taught(pipe, prompts[start : start + CHUNK], FIRST_SEED + start), file)
            print(f"{start + CHUNK} of {count} examples", flush=True)
        chunks.append(torch.load(file, weights_only=True))
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def teacher() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.scheduler = PlanScheduler(PLAN, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def taught(pipe: FluxPipeline, prompts: list[str], seed: int) -> dict[str, torch.Tensor]:
    """An example a prompt, with the noise of `seed` and those after it."""
    states, pooled, _ = pipe.encode_prompt(prompt=prompts, prompt_2=None, max_sequence_length=TOKENS)
    shape = (1, pipe.transformer.config.in_channels // 4, PIXELS // 8, PIXELS // 8)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + index)) for index in range(len(prompts))]
    noise = pipe._pack_latents(torch.cat(noise), len(prompts), *shape[1:])
    (ends,) = pipe(
        prompt_embeds=states,
        pooled_prompt_embeds=pooled,
        latents=noise,
        height=PIXELS,
        width=PIXELS,
        num_inference_steps=50,
        guidance_scale=GUIDANCE,
        output_type="latent",
        return_dict=False,
    )
    return {"states": states, "pooled": pooled, "noise": noise, "ends": ends}
