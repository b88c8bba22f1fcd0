"""Where the word stands in a picture by flux-mini; rules, nothing here is trained.

Every shape at every shift divides a picture into parts of one colour each. The shape whose parts agree best within
themselves is the one that is seen, in the colour that its sign votes for. Where the shape is, there is the place of its
word: what differs from the sign's colour there is letters.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageFilter

SIZE = 128
SHIFTS = range(-3, 4)  # pixels that a shape may be off the middle, in each direction
WINDOW = (48, 120)  # rows and columns of pixels around the middle of a word's place, enough for any word
STRIDE = 2  # shapes are compared on every second pixel of every second row
WALL, SIGN, EDGE = 0, 1, 2  # a shop's dark front and its window come after these


@dataclass(frozen=True)
class Place:
    """A shape (its position in `Signs`), and how far right and down it is off the middle."""

    shape: int
    dx: int
    dy: int


@dataclass(frozen=True, eq=False)
class Signs:
    """What flux-mini draws, as data, so that a picture can be read without the tools that draw scenes.

    parts: (K, 128, 128) uint8, which part of each of K shapes in the middle a pixel belongs to: WALL, SIGN, EDGE, ...
    middles: (K, 2) x and y of the middle of the word's place. boxes: (K, 2) the width and height a word may take there.
    palette: (C, 3) float32, the colours of signs and walls. walls: (2 C, 3), these and each as a wall's dark stripe.
    shapes, colours: their K and C names.
    """

    parts: np.ndarray
    middles: np.ndarray
    boxes: np.ndarray
    palette: np.ndarray
    walls: np.ndarray
    shapes: tuple[str, ...]
    colours: tuple[str, ...]

    @cached_property
    def places(self) -> list[Place]:
        return [Place(shape, dx, dy) for shape in range(len(self.parts)) for dx in SHIFTS for dy in SHIFTS]

    @cached_property
    def coarse(self) -> np.ndarray:
        """(T, parts, P) float32: the masks of every place on the coarse grid of P pixels."""
        grids = np.stack([coarse(self.parts_at(place)).reshape(-1) for place in self.places])
        return (grids[:, None, :] == np.arange(self.parts.max() + 1)[None, :, None]).astype(np.float32)

    def parts_at(self, place: Place) -> np.ndarray:
        """(128, 128): which part a pixel belongs to when the shape is at this place."""
        margin = max(SHIFTS)
        padded = np.pad(self.parts[place.shape], margin, constant_values=WALL)
        top, left = margin - place.dy, margin - place.dx
        return padded[top : top + SIZE, left : left + SIZE]

    def corner(self, place: Place) -> tuple[int, int]:
        """x and y of the first pixel of the window in which the letters at this place are seen."""
        x, y = self.middles[place.shape].tolist()
        rows, columns = WINDOW
        return round(x) + place.dx - columns // 2, round(y) + place.dy - rows // 2


def pixels_of(image: Image.Image) -> np.ndarray:
    """(128, 128, 3) float32; ValueError for any other picture."""
    pixels = np.asarray(image, np.float32)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"expected a {SIZE}x{SIZE} RGB image, got an array of shape {pixels.shape}")
    return pixels


def nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(..., 3) pixels to (...) indices into `palette` (K, 3)."""
    return np.square(pixels[..., None, :] - palette).sum(axis=-1).argmin(axis=-1)


def coarse(pixels: np.ndarray) -> np.ndarray:
    """(128, 128, ...) to (64, 64, ...)"""
    return pixels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def find(pixels: np.ndarray, signs: Signs) -> tuple[Place, int]:
    """The place of which most pixels have the colour that their part votes for, and the colour of its sign."""
    colours = len(signs.palette)
    seen = np.eye(colours, dtype=np.float32)[nearest(coarse(pixels), signs.palette).reshape(-1)]
    places, parts, grid = signs.coarse.shape
    votes = (signs.coarse.reshape(-1, grid) @ seen).reshape(places, parts, colours)
    rows = np.arange(places)
    # A sign differs from its wall, and letters and edges from their sign: else a badge would explain any round sign.
    votes[rows, SIGN, votes[:, WALL].argmax(axis=-1)] = 0
    sign_colours = votes[:, SIGN].argmax(axis=-1)
    votes[rows, EDGE, sign_colours] = 0
    best = votes.max(axis=-1).sum(axis=-1).argmax()
    return signs.places[best], int(sign_colours[best])


def letters_at(pixels: np.ndarray, signs: Signs, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """The letters in the window as (48, 120) from 0, ground, to 1, 0 where the word may not stand; and their RGB."""
    may_stand, inner = _masks(signs, place)
    pixels = pixels[_window(signs, place)]
    inside = pixels[inner]
    ground = np.median(inside, axis=0)
    # Thin letters are mostly antialiased: only the pixels farthest from the ground have the letters' own colour.
    distances = np.square(inside - ground).sum(axis=-1)
    farthest = np.argsort(distances, kind="stable")[-(len(inside) // 32) :]
    text = np.median(inside[farthest], axis=0)
    along = (pixels - ground) @ (text - ground) / max(1.0, float(np.square(text - ground).sum()))
    return along.clip(0, 1) * may_stand, text


@cache
def _masks(signs: Signs, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Where in the window the word may stand (48, 120), and where no pixel is a stray one from beyond the sign."""
    width, height = signs.boxes[place.shape].tolist()
    ys, xs = np.ogrid[: WINDOW[0], : WINDOW[1]]
    near = (abs(xs + 0.5 - WINDOW[1] / 2) <= width / 2 + 2) & (abs(ys + 0.5 - WINDOW[0] / 2) <= 0.6 * height + 1)
    sign = Image.fromarray(signs.parts_at(place) == SIGN).convert("L")
    may_stand, inner = (np.asarray(sign.filter(ImageFilter.MinFilter(2 * margin + 1))) > 0 for margin in (1, 4))
    window = _window(signs, place)
    return near & may_stand[window], near & inner[window]


def _window(signs: Signs, place: Place) -> tuple[slice, slice]:
    x, y = signs.corner(place)
    return slice(y, y + WINDOW[0]), slice(x, x + WINDOW[1])
