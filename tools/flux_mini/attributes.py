"""What a scene, a prompt or a picture says, apart from its word; pictures are read by rules, nothing here is trained.

Every shape at every shift divides a picture into parts of one colour each. The shape whose parts agree best within
themselves is the one that is seen, and the colours that its parts vote for are the sign's and the wall's. Where the
shape is, there is the place of its word: what differs from the sign's colour there is letters.
"""

import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from .scenes import COLOURS, LAYOUTS, SHAPES, SIZE, WORD_BOX, Scene, draw, letter_boxes

NAMES = tuple(COLOURS)
PALETTE = np.array([COLOURS[name] for name in NAMES], np.float32)
SHIFTS = range(-3, 4)
WINDOW = (48, 120)  # rows and columns of pixels around the middle of a word's place, enough for any word
STRIDE = 2  # shapes are compared on every second pixel of every second row
# Parts of a picture, and the colours that tell them apart in a drawing made for that purpose.
WALL, SIGN, EDGE = 0, 1, 2
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
    pixels = np.asarray(image, np.float32)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"expected a {SIZE}x{SIZE} RGB image, got an array of shape {pixels.shape}")
    template, sign_colour = _best_template(pixels)
    wall = pixels[_parts(template)[WALL]]
    wall_colour = np.bincount(_nearest(wall, _wall_palette()) % len(NAMES), minlength=len(NAMES)).argmax()
    letters, text = _letters(pixels, template)
    distances = np.square(PALETTE - text).sum(axis=-1)
    distances[sign_colour] = np.inf
    layout = LAYOUTS[_bend(letters) > ARCHED_BEND]
    seen = Attributes(template.shape, NAMES[sign_colour], NAMES[wall_colour], NAMES[distances.argmin()], layout)
    return Sight(seen, letters)


def letters_of(scene: Scene) -> np.ndarray:
    """What `look` gives as the letters of the drawn scene, without a search for its shape."""
    return _letters(np.asarray(draw(scene), np.float32), _template(scene.shape, scene.shift))[0]


def window_corner(scene: Scene) -> tuple[int, int]:
    """x and y of the first pixel of the window in which the scene's letters are seen."""
    (middle,) = letter_boxes(replace(scene, word="I", layout="straight"))
    rows, columns = WINDOW
    return round(middle.x) - columns // 2, round(middle.y) - rows // 2


def _nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(..., 3) pixels to (...) indices into `palette` (K, 3)."""
    return np.square(pixels[..., None, :] - palette).sum(axis=-1).argmin(axis=-1)


def _template(shape: str, shift: tuple[int, int]) -> Scene:
    # An empty word can be drawn only as an arch, which has no first letter to place.
    return Scene(shape, "red", "", "green", "arched", "bold", "plain", "blue", shift)


@cache
def _wall_palette() -> np.ndarray:
    """(22, 3): every colour, then every colour as the dark stripe of a wall."""
    walls = [Scene("label", "red", "", "green", "arched", "bold", "striped", name) for name in NAMES]
    return np.concatenate([PALETTE, [draw(scene).getpixel((2, 2)) for scene in walls]])


@cache
def _templates() -> tuple[list[Scene], np.ndarray]:
    """Every shape at every shift without a word, and its parts (T, 5, P) on the coarse grid of P pixels."""
    scenes = [_template(shape, (dx, dy)) for shape in SHAPES for dx in SHIFTS for dy in SHIFTS]
    parts = [_coarse(_parts(scene).transpose(1, 2, 0)).T for scene in scenes]
    return scenes, np.stack(parts).astype(np.float32)


@cache
def _parts(template: Scene) -> np.ndarray:
    """(5, 128, 128) masks: wall, sign, edges in the letters' colour, and a shop's dark front and window."""
    nearest = _nearest(np.asarray(draw(template), np.float32), PART_COLOURS)
    return nearest == np.arange(len(PART_COLOURS))[:, None, None]


def _coarse(pixels: np.ndarray) -> np.ndarray:
    """(128, 128, C) to (P, C)"""
    return pixels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].reshape(-1, pixels.shape[-1])


def _best_template(pixels: np.ndarray) -> tuple[Scene, int]:
    """The shape and shift of which most pixels have the colour that their part votes for, and the sign's colour."""
    scenes, parts = _templates()
    nearest = np.eye(len(NAMES), dtype=np.float32)[_nearest(_coarse(pixels), PALETTE)]
    votes = (parts.reshape(-1, parts.shape[-1]) @ nearest).reshape(*parts.shape[:2], len(NAMES))
    rows = np.arange(len(scenes))
    # A sign differs from its wall, and letters and edges from their sign: else a badge would explain any round sign.
    votes[rows, SIGN, votes[:, WALL].argmax(axis=-1)] = 0
    sign_colours = votes[:, SIGN].argmax(axis=-1)
    votes[rows, EDGE, sign_colours] = 0
    best = votes.max(axis=-1).sum(axis=-1).argmax()
    return scenes[best], int(sign_colours[best])


@cache
def _places(template: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Where in the window the word may stand (48, 120), and where no pixel is a stray one from beyond the sign."""
    width, height = WORD_BOX[template.shape]
    ys, xs = np.ogrid[: WINDOW[0], : WINDOW[1]]
    near = (abs(xs + 0.5 - WINDOW[1] / 2) <= width / 2 + 2) & (abs(ys + 0.5 - WINDOW[0] / 2) <= 0.6 * height + 1)
    sign = Image.fromarray(_parts(template)[SIGN]).convert("L")
    place, inner = (np.asarray(sign.filter(ImageFilter.MinFilter(2 * margin + 1))) > 0 for margin in (1, 4))
    window = _window(template)
    return near & place[window], near & inner[window]


def _window(scene: Scene) -> tuple[slice, slice]:
    x, y = window_corner(scene)
    return slice(y, y + WINDOW[0]), slice(x, x + WINDOW[1])


def _letters(pixels: np.ndarray, template: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The letters in the window, 0 where the word may not stand, and their RGB."""
    place, inner = _places(template)
    pixels = pixels[_window(template)]
    inside = pixels[inner]
    ground = np.median(inside, axis=0)
    # Thin letters are mostly antialiased: only the pixels farthest from the ground have the letters' own colour.
    distances = np.square(inside - ground).sum(axis=-1)
    farthest = np.argsort(distances, kind="stable")[-(len(inside) // 32) :]
    text = np.median(inside[farthest], axis=0)
    along = (pixels - ground) @ (text - ground) / max(1.0, float(np.square(text - ground).sum()))
    return along.clip(0, 1) * place, text


def _bend(letters: np.ndarray) -> float:
    """Curvature of the parabola through the letters' pixels (weights, (H, W)), as a multiple of 1 / their spread;
    positive where the middle is above the ends."""
    ys, xs = np.nonzero(letters > 0.3)
    if len(ys) < 3 or np.ptp(xs) < 3:
        return 0.0
    return float(np.polyfit(xs, ys, 2, w=np.sqrt(letters[ys, xs]))[0] * xs.std())
