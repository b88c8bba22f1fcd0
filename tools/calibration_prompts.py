"""What a calibration draws: a file's prompts, or captions of flux-mini's scenes."""

import random
from pathlib import Path

from eval.errors import UserError


def calibration_prompts(prompts_file: Path | None, images: int, seed: int) -> list[str]:
    """`images` prompts of a file that has one a line, or of scenes (None). UserError if the file has too few."""
    if prompts_file is None:
        return scene_prompts(images, seed)
    try:
        lines = prompts_file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"prompts_file={prompts_file}: {error.strerror}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if len(prompts) < images:
        raise UserError(f"prompts_file={prompts_file} has {len(prompts)} prompts, one a line, not images={images}")
    return prompts[:images]


def scene_prompts(count: int, seed: int) -> list[str]:
    """Captions of random scenes of flux-mini with words of its training, of which no evaluation asks for one."""
    from tools.flux_mini.scenes import WORDS, caption, random_scene  # needs matplotlib, which prompts_file does not

    rng = random.Random(f"teacache-{seed}")
    return [caption(random_scene(rng, word=rng.choice(WORDS)), rng) for _ in range(count)]
