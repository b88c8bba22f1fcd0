"""Writes assets/prompts/motion80.jsonl: 80 prompts, each with a shape, colour and motion that hunyuan-mini has never
seen together in training, half of them in phrasings that it has not seen either."""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

from h2cache.eval.metrics.clips import ClipAttributes

from .attributes import attributes_of
from .clips import HELD_OUT_PHRASINGS, PHRASINGS, caption, random_clip

GROUPS = {"known": PHRASINGS, "held_out": HELD_OUT_PHRASINGS}


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    """id, prompt, phrasing ("known" or "held_out", in turns) and the attributes of `count` clips, no two alike."""
    rng = random.Random(seed)
    rows: dict[ClipAttributes, dict[str, str]] = {}
    while len(rows) < count:
        clip, phrasing = random_clip(rng, held_out=True), tuple(GROUPS)[len(rows) % 2]
        asked, prompt = attributes_of(clip), caption(clip, rng, GROUPS[phrasing])
        if asked not in rows:
            name = f"motion{len(rows):02d}"
            rows[asked] = {"id": name, "prompt": prompt, "phrasing": phrasing, **asdict(asked)}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("assets/prompts/motion80.jsonl"))
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--seed", type=int, default=80)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in prompts(options.count, options.seed)))


if __name__ == "__main__":
    main()
