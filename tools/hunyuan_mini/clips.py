"""The world of hunyuan-mini: one coloured shape that moves, turns, appears or stands still before a coloured wall.

One description, `Clip`, is both drawn (`draw`) and told (`caption`), so a video and its caption cannot disagree.
Everything random comes from the `random.Random` that the caller owns.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from h2cache.eval.metrics.motions import (
    DIRECTIONS,
    FRAMES,
    MOTIONS,
    ROUND,
    SHAPES,
    SIZE,
    SPEEDS,
    TRAVEL,
    UNHURRIED,
    coverage,
    poses,
)
from tools.flux_mini.scenes import COLOURS, contrast, with_article

MARGIN = 15  # pixels between a shape's middle and the frame's border, at least
CONTRAST = 110
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Clip:
    """One video, in words. `x` and `y` are the middle of the way (pixels); captions do not tell them."""

    shape: str
    colour: str
    background: str
    motion: str
    speed: str
    x: float = SIZE / 2
    y: float = SIZE / 2


def is_held_out(shape: str, colour: str, motion: str, speed: str) -> bool:
    """Whether no training clip has this shape in this colour with this motion: one combination in ten, so spread that
    training sees every pair of them."""
    manner = MOTIONS.index(motion) * len(SPEEDS) + (speed == SPEEDS[-1])
    return (list(COLOURS).index(colour) + SHAPES.index(shape) + manner) % HELD_OUT_EVERY == 0


def random_clip(rng: random.Random, held_out: bool = False) -> Clip:
    """Draw every attribute independently, colours under the constraint that they can be told apart.

    Args:
        rng: source of all chance.
        held_out: whether the combination is one that training leaves out.
    """
    while True:
        motion = rng.choice((*DIRECTIONS, *DIRECTIONS, "turning", "turning", "appearing", "still"))
        speed = UNHURRIED if motion == "still" else rng.choice(SPEEDS)
        shape, colour = (
            rng.choice([s for s in SHAPES if motion != "turning" or s not in ROUND]),
            rng.choice(list(COLOURS)),
        )
        if is_held_out(shape, colour, motion, speed) == held_out:
            break
    background = rng.choice([name for name in COLOURS if contrast(name, colour) > CONTRAST])
    dx, dy = (TRAVEL[speed] * abs(d) / 2 if motion in DIRECTIONS else 0.0 for d in DIRECTIONS.get(motion, (0, 0)))
    return Clip(shape, colour, background, motion, speed, *(_middle(rng, travel) for travel in (dx, dy)))


def _middle(rng: random.Random, travel: float) -> float:
    """A place `travel` pixels from which, to either side, the shape is still in the picture."""
    slack = max(1.0, SIZE / 2 - MARGIN - travel)
    return SIZE / 2 + rng.uniform(-slack, slack)


MOVING = {name: f"moving {name}" for name in DIRECTIONS} | {
    "turning": "turning",
    "appearing": "appearing",
    "still": "standing still",
}
MOVES = {name: f"moves {name}" for name in DIRECTIONS} | {
    "turning": "turns",
    "appearing": "appears",
    "still": "stands still",
}
PHRASINGS = (
    "{thing} {moving} {speed} on {wall}",
    "on {wall}, {thing} {speed} {moving}",
    "a video of {thing} {speed} {moving}, {wall}",
    "{thing} that {moves} {speed} on {wall}",
    "{wall} and {thing} that {speed} {moves}",
    "on {wall}, {thing} that {moves} {speed}",
)
HELD_OUT_PHRASINGS = (
    "a video on {wall}: {thing} {moving} {speed}",
    "{wall} with {thing} that {moves} {speed}",
)


def caption(clip: Clip, rng: random.Random, phrasings: Sequence[str] = PHRASINGS) -> str:
    """The clip in one of `phrasings`; each tells shape, colours, motion and speed."""
    text = rng.choice(phrasings).format(
        thing=with_article(f"{clip.colour} {clip.shape}"),
        wall=with_article(f"{clip.background} background"),
        moving=MOVING[clip.motion],
        moves=MOVES[clip.motion],
        speed=clip.speed,
    )
    return " ".join(text.split()).replace(" ,", ",")


def draw(clip: Clip, frames: range = range(FRAMES)) -> np.ndarray:
    """(T, 64, 64, 3) uint8: `frames` of the video, antialiased."""
    ground, colour = (np.array(COLOURS[name], np.float32) for name in (clip.background, clip.colour))
    where = poses(clip.motion, clip.speed, clip.x, clip.y)
    covered = np.stack([coverage(clip.shape, where[k]) for k in frames])[..., None]
    return (ground + covered * (colour - ground)).round().astype(np.uint8)
