"""What a calibration draws: a file's prompts, or captions of what an embedded model shows."""

import random
from collections.abc import Sequence
from pathlib import Path

from h2cache.eval.generation.prompt_lines import prompt_lines

# In use a model is asked for things in words that its training did not have, and then it takes longer to make up its
# mind. Neither the training nor any evaluation uses these.
UNTRAINED_PHRASINGS = (
    '{sign}, {wall} behind it, lettered "{word}" in {letters}{manner}',
    'picture {sign} in front of {wall}; its text is "{word}" in {letters}{manner}',
    '{wall} and {sign} with {letters}{manner} spelling "{word}"',
    '"{word}": {sign} with {letters}{manner}, {wall}',
)


UNTRAINED_CLIPS = (
    "{thing} before {wall}, {speed} {moving}",
    "{wall}, where {thing} {moves} {speed}",
)


def calibration_prompts(
    prompts_file: Path | None, images: int, seed: int, model: str = "", untrained: bool = False
) -> list[str]:
    """What to draw for a calibration of `model`.

    Args:
        prompts_file: with one prompt a line; None: captions of what hunyuan-mini shows for that model, of flux-mini's
            scenes for others.
        images: how many prompts. UserError if the file has fewer.
        seed: of the captions.
        model: its name in configs/model.
        untrained: whether every other caption is in a phrasing that the model never saw.
    """
    if prompts_file is not None:
        return prompt_lines(prompts_file, images)
    if model == "hunyuan-mini":
        return clip_prompts(images, seed, UNTRAINED_CLIPS if untrained else ())
    return scene_prompts(images, seed, UNTRAINED_PHRASINGS if untrained else ())


def scene_prompts(count: int, seed: int, untrained: Sequence[str] = ()) -> list[str]:
    """Captions of random scenes of flux-mini with words of its training, of which no evaluation asks for one; every
    other in one of the phrasings `untrained`, if there are any."""
    # These need matplotlib, which a prompts_file does without.
    from tools.flux_mini.scenes import PHRASINGS, WORDS, caption, random_scene

    rng = random.Random(f"teacache-{seed}")
    turns = (PHRASINGS, untrained or PHRASINGS)
    return [caption(random_scene(rng, word=rng.choice(WORDS)), rng, turns[index % 2]) for index in range(count)]


def clip_prompts(count: int, seed: int, untrained: Sequence[str] = ()) -> list[str]:
    """Captions of random clips that hunyuan-mini's training could have had; every other in one of the phrasings
    `untrained`, if there are any."""
    from tools.hunyuan_mini.clips import PHRASINGS, caption, random_clip

    rng = random.Random(f"calibration-{seed}")
    turns = (PHRASINGS, untrained or PHRASINGS)
    return [caption(random_clip(rng), rng, turns[index % 2]) for index in range(count)]
