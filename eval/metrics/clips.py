"""Whether a video by hunyuan-mini shows what its prompt tells, read from its pixels; by rules, nothing here is trained.

The shape is what differs from the border. Where its middle is, how large it is and how it is turned, frame by frame, is
compared with every motion of `h2cache.eval.metrics.motions`; what fits none of them is unsteady, and so never as asked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from h2cache.eval.metrics.motions import (
    DIRECTIONS,
    FRAMES,
    ROUND,
    SHAPES,
    SIZE,
    SPEEDS,
    UNHURRIED,
    Pose,
    coverage,
    poses,
)

NOTHING = "nothing"  # the shape of a video without one
UNSTEADY = "unsteady"  # the motion of what moves like none of MOTIONS
BORDER = 3  # pixels around a frame that no shape reaches
LEAST_CONTRAST = 40.0  # RGB distance between a shape and its background
LEAST_AREA = 12.0  # pixels that a frame must have of a shape for it to have a middle
PATCH = 34  # pixels around a shape's middle that are compared with the templates
ANGLES = range(0, 180, 5)  # degrees; no shape has a longer period
# Degrees after which a turning shape looks the same.
PERIODS = {"square": 90, "triangle": 120, "diamond": 180, "star": 72, "cross": 90}
# How far a video may be from its motion, as root mean square over the frames.
MOST_PIXELS, MOST_SCALE, MOST_DEGREES = 2.5, 0.14, 10.0
STARTS_SMALL = 0.65  # of its last size: whether a shape is appearing


@dataclass(frozen=True)
class ClipAttributes:
    """What a video shows. UNHURRIED is the speed of what is still or unsteady."""

    shape: str
    colour: str
    background: str
    motion: str
    speed: str


@dataclass(frozen=True, eq=False)
class Track:
    """A shape through a video of T frames.

    Fields:
        masks: (T, 64, 64) how much of each pixel it covers, from 0 to 1.
        middles: (T, 2) x and y of its centroid in pixels; NaN where it is too small to have one.
        areas: (T,) in pixels.
    """

    masks: np.ndarray
    middles: np.ndarray
    areas: np.ndarray


def told(prompt: str, colours: Sequence[str]) -> ClipAttributes:
    """What a prompt of hunyuan-mini's grammar tells; ValueError if it tells less."""
    names = "|".join(colours)
    thing = re.search(rf"\b({names}) ({'|'.join(SHAPES)})\b", prompt)
    wall = re.search(rf"\b({names}) background\b", prompt)
    direction = re.search(rf"\bmov(?:ing|es) ({'|'.join(DIRECTIONS)})\b", prompt)
    other = re.search(r"\b(turn|appear|(?:standing|stands) still)", prompt)
    if not (thing and wall and (direction or other)):
        raise ValueError(f"not a caption of a clip: {prompt!r}")
    motion = direction[1] if direction else {"turn": "turning", "appear": "appearing"}.get(other[1], "still")
    speed = next((word for word in SPEEDS if re.search(rf"\b{word}\b", prompt)), UNHURRIED)
    if (speed == UNHURRIED) != (motion == "still"):
        raise ValueError(f"a speed belongs to everything but what stands still: {prompt!r}")
    return ClipAttributes(thing[2], thing[1], wall[1], motion, speed)


def pixels_of(video: Sequence[Image.Image]) -> np.ndarray:
    """(17, 64, 64, 3) float32; ValueError for a video of another length or size."""
    pixels = np.stack([np.asarray(frame.convert("RGB"), np.float32) for frame in video])
    if pixels.shape != (FRAMES, SIZE, SIZE, 3):
        raise ValueError(f"expected {FRAMES} frames of {SIZE}x{SIZE} pixels, got an array of shape {pixels.shape}")
    return pixels


def watch(pixels: np.ndarray, palette: np.ndarray, colours: Sequence[str]) -> ClipAttributes:
    """What is seen in a video.

    Args:
        pixels: (17, 64, 64, 3), 0 to 255.
        palette: (C, 3), the colours that shapes and backgrounds may have.
        colours: their C names.
    """
    inner = pixels[:, BORDER:-BORDER, BORDER:-BORDER]
    frame = np.ones((SIZE, SIZE), bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(pixels[:, frame].reshape(-1, 3), axis=0)
    background = int(np.square(palette - ground).sum(axis=-1).argmin())
    distances = np.linalg.norm(inner - ground, axis=-1)
    far = np.percentile(distances, 99)
    if far < LEAST_CONTRAST:
        return ClipAttributes(NOTHING, NOTHING, colours[background], UNSTEADY, UNHURRIED)
    body = np.median(inner[distances > 0.7 * far], axis=0)
    away = np.square(palette - body).sum(axis=-1)
    away[background] = np.inf
    track = follow(((pixels - ground) @ (body - ground) / np.square(body - ground).sum()).clip(0, 1))
    motion, speed = _motion(track)
    return ClipAttributes(*_shape(track, motion, speed, colours[int(away.argmin())], colours[background]))


def follow(masks: np.ndarray) -> Track:
    """The track of the shape that covers (T, 64, 64) pixels, faint ones left out."""
    masks = np.where(masks > 0.25, masks, 0)
    areas = masks.sum(axis=(1, 2))
    at = np.arange(SIZE) + 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        middles = np.stack([(masks.sum(axis=1) @ at) / areas, (masks.sum(axis=2) @ at) / areas], axis=-1)
    middles[areas < LEAST_AREA] = np.nan
    return Track(masks, middles, areas)


def _motion(track: Track) -> tuple[str, str]:
    """Motion and speed as sizes and middles tell them: "still" for what may be turning as well."""
    last = np.median(track.areas[-4:])
    if last < LEAST_AREA:
        return UNSTEADY, UNHURRIED
    sizes = np.sqrt(track.areas / last)
    if sizes[0] < STARTS_SMALL:
        misses = {speed: _rms(sizes - [pose.scale for pose in poses("appearing", speed, 0, 0)]) for speed in SPEEDS}
        speed = min(misses, key=misses.get)
        return ("appearing", speed) if misses[speed] < MOST_SCALE else (UNSTEADY, UNHURRIED)
    if np.isnan(track.middles).any():
        return UNSTEADY, UNHURRIED
    ways = {("still", UNHURRIED): poses("still", UNHURRIED, 0, 0)}
    ways |= {(d, speed): poses(d, speed, 0, 0) for d in DIRECTIONS for speed in SPEEDS}
    misses = {}
    for way, expected in ways.items():
        gap = track.middles - [(pose.x, pose.y) for pose in expected]
        misses[way] = _rms(np.linalg.norm(gap - gap.mean(axis=0), axis=-1))
    best = min(misses, key=misses.get)
    return best if misses[best] < MOST_PIXELS else (UNSTEADY, UNHURRIED)


def _shape(track: Track, motion: str, speed: str, *colours: str) -> tuple[str, str, str, str, str]:
    """The fields of `ClipAttributes`: the shape, and whether what stays in its place is turning."""
    whole = np.flatnonzero(track.areas > 0.8 * np.median(track.areas[-4:]))
    whole = [k for k in whole if not np.isnan(track.middles[k]).any()]
    if not whole:
        return NOTHING, *colours, UNSTEADY, UNHURRIED
    patches = np.stack([_standard(track.masks[k], *track.middles[k]).reshape(-1) for k in whole])
    names, templates = _templates()
    likeness = (patches @ templates.reshape(-1, PATCH * PATCH).T).reshape(len(whole), len(names), len(ANGLES))
    programmes = [(motion, speed)] if motion != "still" else [("still", UNHURRIED), *(("turning", s) for s in SPEEDS)]
    scores = {}
    for programme in programmes:
        angles = np.array([pose.angle for pose in poses(*programme, 0, 0)])[whole]
        at = np.round(angles / ANGLES.step).astype(int) % len(ANGLES)
        for index, name in enumerate(names):
            if programme[0] != "turning" or name not in ROUND:
                periodic = at if name in ("diamond", *ROUND) else _in_period(angles, name)
                scores[name, *programme] = likeness[np.arange(len(whole)), index, periodic].mean()
    name, motion, speed = max(scores, key=scores.get)
    if motion == "turning":
        seen = likeness[:, names.index(name)].argmax(axis=-1) * ANGLES.step
        expected = np.array([pose.angle for pose in poses(motion, speed, 0, 0)])[whole]
        period = PERIODS[name]
        if _rms((seen - expected + period / 2) % period - period / 2) > MOST_DEGREES:
            motion, speed = UNSTEADY, UNHURRIED
    return name, *colours, motion, speed


def _in_period(angles: np.ndarray, name: str) -> np.ndarray:
    """The nearest positions in ANGLES of angles that may go beyond them."""
    return np.round(angles % PERIODS[name] / ANGLES.step).astype(int) % len(ANGLES)


def _standard(mask: np.ndarray, x: float, y: float) -> np.ndarray:
    """(34, 34): the part of a mask around (x, y), moved there by parts of pixels, of mean 0 and norm 1."""
    middle = (SIZE - 1) / 2
    moved = ndimage.shift(mask, (middle - (y - 0.5), middle - (x - 0.5)), order=1)
    start = (SIZE - PATCH) // 2
    patch = moved[start : start + PATCH, start : start + PATCH]
    patch = patch - patch.mean()
    return patch / max(1e-6, float(np.linalg.norm(patch)))


@cache
def _templates() -> tuple[list[str], np.ndarray]:
    """The shapes, and (K, A, 34, 34): what `_standard` makes of each of them in every one of ANGLES."""
    turned = []
    for shape in SHAPES:
        masks = np.stack([coverage(shape, Pose(SIZE / 2, SIZE / 2, angle=angle)) for angle in ANGLES])
        track = follow(masks)
        turned.append([_standard(mask, *middle) for mask, middle in zip(track.masks, track.middles, strict=True)])
    return list(SHAPES), np.array(turned)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
