"""What hunyuan-mini's videos show, as data: shapes, how they move, and the pixels that they cover."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels of a frame, in each direction
FRAMES = 17
SUPERSAMPLING = 4
RADIUS = 11.0  # pixels of the unit in which the shapes are given

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "turning", "appearing", "still")
SPEEDS = ("slowly", "quickly")
UNHURRIED = ""  # the speed of what stands still
TRAVEL = {"slowly": 12.0, "quickly": 32.0}  # pixels from the first frame to the last
TURN = {"slowly": 45.0, "quickly": 120.0}  # degrees clockwise from the first frame to the last
GROWTH = {"slowly": FRAMES - 1, "quickly": 5}  # the frame in which an appearing shape has its full size
FIRST_SCALE = 0.2  # of an appearing shape, in the first frame


def _star() -> tuple[tuple[float, float], ...]:
    radii = (1.25, 0.52) * 5
    return tuple((r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii))


def _circle(radius: float) -> tuple[tuple[float, float], ...]:
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles)


# The outline of each shape, x to the right and y down, and of the hole in it.
OUTLINES = {
    "circle": (_circle(0.95),),
    "ring": (_circle(1.05), _circle(0.5)),
    "square": (((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),),
    "triangle": (((0, -1.2), (1.1, 0.7), (-1.1, 0.7)),),
    "diamond": (((0, -1.3), (0.7, 0), (0, 1.3), (-0.7, 0)),),
    "star": (_star(),),
    "cross": (
        tuple(
            (0.36 * x, 0.36 * y)
            for x, y in (
                *((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)),
                *((1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)),
            )
        ),
    ),
}
SHAPES = tuple(OUTLINES)
ROUND = ("circle", "ring")  # whose turning nobody could see


@dataclass(frozen=True)
class Pose:
    """Where a shape is in a frame: its middle in pixels, its size (1: full), its turn clockwise in degrees."""

    x: float
    y: float
    scale: float = 1.0
    angle: float = 0.0


def poses(motion: str, speed: str, x: float, y: float) -> list[Pose]:
    """The pose in each of the `FRAMES` frames.

    Args:
        motion: one of MOTIONS.
        speed: one of SPEEDS; UNHURRIED for what stands still.
        x, y: the middle of the way, in pixels.
    """
    ways = [k / (FRAMES - 1) for k in range(FRAMES)]
    if motion in DIRECTIONS:
        dx, dy = (TRAVEL[speed] * d for d in DIRECTIONS[motion])
        return [Pose(x + dx * (w - 0.5), y + dy * (w - 0.5)) for w in ways]
    if motion == "turning":
        return [Pose(x, y, angle=TURN[speed] * w) for w in ways]
    if motion == "appearing":
        grown = [min(1.0, k / GROWTH[speed]) for k in range(FRAMES)]
        return [Pose(x, y, scale=FIRST_SCALE + (1 - FIRST_SCALE) * g) for g in grown]
    return [Pose(x, y)] * FRAMES


def coverage(shape: str, pose: Pose) -> np.ndarray:
    """(64, 64) float32: how much of each pixel the shape covers, from 0 to 1."""
    side, s = SIZE * SUPERSAMPLING, SUPERSAMPLING
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    size = RADIUS * pose.scale * s
    c, n = math.cos(math.radians(pose.angle)), math.sin(math.radians(pose.angle))
    for fill, outline in zip((255, 0), OUTLINES[shape], strict=False):
        points = [(pose.x * s + size * (x * c - y * n), pose.y * s + size * (x * n + y * c)) for x, y in outline]
        pen.polygon(points, fill=fill)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32) / 255
