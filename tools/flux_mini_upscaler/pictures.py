"""Writes assets/prompts/small80.jsonl and the pictures beside it: 80 scenes whose words no training has shown.

Each is a 32x32 picture, with its caption and the 128x128 picture that it was made from.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from tools.flux_mini.prompts import GROUPS
from tools.flux_mini.scenes import HELD_OUT_WORDS, Scene, caption, draw, random_scene

from .degrade import shrink

SCENES, SEED = 80, 1280


def held_out_scenes(count: int = SCENES, seed: int = SEED) -> list[tuple[Scene, str]]:
    """Scenes and their captions: the held-out words in turns, every other caption in a held-out phrasing."""
    rng, found = random.Random(seed), []
    for index in range(count):
        scene = random_scene(rng, word=HELD_OUT_WORDS[index % len(HELD_OUT_WORDS)])
        found.append((scene, caption(scene, rng, GROUPS[("known", "held_out")[index % 2]])))
    return found


def _save(image: Image.Image, file: Path) -> str:
    image.save(file, optimize=True)
    return f"{file.parent.name}/{file.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("assets/prompts/small80.jsonl"))
    options = parser.parse_args()
    folder = options.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (scene, prompt) in enumerate(held_out_scenes()):
        name, image = f"small{index:02d}", draw(scene)
        picture, truth = _save(shrink(image), folder / f"{name}.png"), _save(image, folder / f"{name}-truth.png")
        rows.append({"id": name, "prompt": prompt, "word": scene.word, "picture": picture, "truth": truth})
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
