"""What a scene, a prompt or a picture says, apart from its word; pictures are read by rules, nothing here is trained.

`h2cache.eval.metrics.signs` finds the sign and its letters; colours and layout are read off where it finds them.
"""

import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

from h2cache.eval.metrics.signs import WALL, Place, Signs, find, letters_at, nearest, pixels_of

from .scenes import COLOURS, LAYOUTS, SHAPES, WORD_BOX, Scene, draw, letter_boxes

NAMES = tuple(COLOURS)
PALETTE = np.array([COLOURS[name] for name in NAMES], np.float32)
# The colours that tell parts of a picture apart in a drawing made for it, in the order of `h2cache.eval.metrics.signs`.
PART_COLOURS = np.array(
    [COLOURS["blue"], COLOURS["red"], COLOURS["green"], [0.6 * c for c in COLOURS["red"]], (190, 215, 225)], np.float32
)
# An arc over 1.5 radians bends by about 0.2, straight words of held-out letters by less than 0.035 (see `_bend`).
ARCHED_BEND = 0.065


@dataclass(frozen=True)
class Attributes:
    """`shape_colour`, `wall_colour` and `text_colour` are names of `COLOURS`."""

    shape: str
    shape_colour: str
    wall_colour: str
    text_colour: str
    layout: str

    @classmethod
    def of(cls, scene: Scene) -> "Attributes":
        return cls(scene.shape, scene.shape_colour, scene.wall_colour, scene.text_colour, scene.layout)


def told(prompt: str) -> Attributes:
    """What a caption of `scenes.caption` tells; ValueError if it tells less. No layout told means a straight word."""
    colour, shape = "|".join(COLOURS), "|".join(SHAPES)
    patterns = (
        rf"({colour}) ({shape})\b",
        rf"({colour}) (?:bold|serif) letters",
        rf"({colour}) (?:background|brick wall|striped wall)",
    )
    found = [re.search(pattern, prompt) for pattern in patterns]
    if None in found:
        raise ValueError(f"not a caption of a scene: {prompt!r}")
    sign, text, wall = found
    layout = "arched" if " in an arch" in prompt else "straight"
    return Attributes(sign[2], sign[1], wall[1], text[1], layout)


@dataclass(frozen=True)
class Sight:
    """What is seen in an image: its attributes, and its letters as (48, 120) float32 from 0, ground, to 1."""

    attributes: Attributes
    letters: np.ndarray


def look(image: Image.Image) -> Sight:
    """What is seen in a 128x128 RGB image. An image without text gets some text colour and layout all the same."""
    pixels = pixels_of(image)
    place, sign_colour = find(pixels, signs())
    wall = pixels[signs().parts_at(place) == WALL]
    wall_colour = np.bincount(nearest(wall, _wall_palette()) % len(NAMES), minlength=len(NAMES)).argmax()
    letters, text = letters_at(pixels, signs(), place)
    distances = np.square(PALETTE - text).sum(axis=-1)
    distances[sign_colour] = np.inf
    layout = LAYOUTS[_bend(letters) > ARCHED_BEND]
    seen = Attributes(SHAPES[place.shape], NAMES[sign_colour], NAMES[wall_colour], NAMES[distances.argmin()], layout)
    return Sight(seen, letters)


def letters_of(scene: Scene) -> np.ndarray:
    """What `look` gives as the letters of the drawn scene, without a search for its shape."""
    return letters_at(np.asarray(draw(scene), np.float32), signs(), _place(scene))[0]


def window_corner(scene: Scene) -> tuple[int, int]:
    """x and y of the first pixel of the window in which the scene's letters are seen."""
    return signs().corner(_place(scene))


@cache
def signs() -> Signs:
    """Every shape without a word, drawn for `h2cache.eval.metrics.signs`."""
    # An empty word can be drawn only as an arch, which has no first letter to place.
    templates = [Scene(shape, "red", "", "green", "arched", "bold", "plain", "blue") for shape in SHAPES]
    parts = [nearest(np.asarray(draw(template), np.float32), PART_COLOURS) for template in templates]
    letters = [letter_boxes(replace(template, word="I", layout="straight"))[0] for template in templates]
    return Signs(
        parts=np.stack(parts).astype(np.uint8),
        middles=np.array([(letter.x, letter.y) for letter in letters], np.float32),
        boxes=np.array([WORD_BOX[shape] for shape in SHAPES], np.float32),
        palette=PALETTE,
    )


def _place(scene: Scene) -> Place:
    return Place(SHAPES.index(scene.shape), *scene.shift)


@cache
def _wall_palette() -> np.ndarray:
    """(22, 3): every colour, then every colour as the dark stripe of a wall."""
    walls = [Scene("label", "red", "", "green", "arched", "bold", "striped", name) for name in NAMES]
    return np.concatenate([PALETTE, [draw(scene).getpixel((2, 2)) for scene in walls]])


def _bend(letters: np.ndarray) -> float:
    """Curvature of the parabola through the letters' pixels (weights, (H, W)), as a multiple of 1 / their spread;
    positive where the middle is above the ends."""
    ys, xs = np.nonzero(letters > 0.3)
    if len(ys) < 3 or np.ptp(xs) < 3:
        return 0.0
    return float(np.polyfit(xs, ys, 2, w=np.sqrt(letters[ys, xs]))[0] * xs.std())
