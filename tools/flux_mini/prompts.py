"""Writes assets/prompts/signs80.jsonl: 80 prompts whose words flux-mini has never seen in training."""

import argparse
import json
import random
from pathlib import Path

from .scenes import HELD_OUT_WORDS, caption, random_scene


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    """id, prompt and word of `count` scenes; the held-out words take turns, everything else is drawn at random."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        scene = random_scene(rng, word=HELD_OUT_WORDS[i % len(HELD_OUT_WORDS)])
        rows.append({"id": f"sign{i:02d}", "prompt": caption(scene, rng), "word": scene.word})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("assets/prompts/signs80.jsonl"))
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seed", type=int, default=80)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in prompts(options.count, options.seed)))


if __name__ == "__main__":
    main()
