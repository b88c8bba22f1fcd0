"""What a calibration draws: a file's prompts, or captions of flux-mini's scenes."""

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


def calibration_prompts(prompts_file: Path | None, images: int, seed: int, untrained: Sequence[str] = ()) -> list[str]:
    """`images` prompts of a file that has one a line, or of scenes (None), every other one of these in one of the
    phrasings `untrained`, if there are any. UserError if the file has too few."""
    if prompts_file is None:
        return scene_prompts(images, seed, untrained)
    return prompt_lines(prompts_file, images)


def scene_prompts(count: int, seed: int, untrained: Sequence[str] = ()) -> list[str]:
    """Captions of random scenes of flux-mini with words of its training, of which no evaluation asks for one; every
    other in one of the phrasings `untrained`, if there are any."""
    # These need matplotlib, which a prompts_file does without.
    from tools.flux_mini.scenes import PHRASINGS, WORDS, caption, random_scene

    rng = random.Random(f"teacache-{seed}")
    turns = (PHRASINGS, untrained or PHRASINGS)
    return [caption(random_scene(rng, word=rng.choice(WORDS)), rng, turns[index % 2]) for index in range(count)]
