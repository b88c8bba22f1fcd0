"""Writes assets/prompts/signs80.jsonl: 80 prompts whose words flux-mini has never seen in training, half of them in
phrasings that it has not seen either."""

import argparse
import json
import random
from pathlib import Path

from .scenes import HELD_OUT_PHRASINGS, HELD_OUT_WORDS, PHRASINGS, caption, random_scene

GROUPS = {"known": PHRASINGS, "held_out": HELD_OUT_PHRASINGS}


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    """id, prompt, word and phrasing ("known" or "held_out") of `count` scenes.

    The held-out words take turns. Chance chooses the phrasing of a word's first prompt, the next has the other, so that
    both groups ask for the same words; everything else is drawn at random.
    """
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        scene = random_scene(rng, word=HELD_OUT_WORDS[i % len(HELD_OUT_WORDS)])
        if i < len(HELD_OUT_WORDS):
            phrasing = rng.choice(tuple(GROUPS))
        else:
            (phrasing,) = GROUPS.keys() - {rows[i - len(HELD_OUT_WORDS)]["phrasing"]}
        prompt = caption(scene, rng, GROUPS[phrasing])
        rows.append({"id": f"sign{i:02d}", "prompt": prompt, "word": scene.word, "phrasing": phrasing})
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
