"""Whether a picture by flux-mini shows what its prompt tells, apart from the word; by rules, nothing here is trained.

`h2cache.eval.metrics.signs` finds the sign and its letters; colours and layout are read off where it finds them.
"""

import math
import re
from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image

from h2cache.eval.files import file_digest
from h2cache.eval.metrics.metric import Means, Metric, Scorer, Shown
from h2cache.eval.metrics.reader import WEIGHTS, loaded_reader
from h2cache.eval.metrics.signs import WALL, Signs, find, letters_at, nearest, pixels_of

LAYOUTS = ("straight", "arched")
# An arc over 1.5 radians bends by about 0.2, straight words of held-out letters by less than 0.035 (see `_bend`).
ARCHED_BEND = 0.065


@dataclass(frozen=True)
class Attributes:
    """Shape, layout and colours, by their names in `Signs`."""

    shape: str
    shape_colour: str
    wall_colour: str
    text_colour: str
    layout: str


@dataclass(frozen=True)
class Sight:
    """What is seen in an image: its attributes, and its letters as (48, 120) float32 from 0, ground, to 1."""

    attributes: Attributes
    letters: np.ndarray


def told(prompt: str, signs: Signs) -> Attributes:
    """What a prompt of flux-mini's grammar tells; ValueError if it tells less. No layout told means a straight word."""
    colour, shape = "|".join(signs.colours), "|".join(signs.shapes)
    patterns = (
        rf"({colour}) ({shape})\b",
        rf"({colour}) (?:bold|serif) letters",
        rf"({colour}) (?:background|brick wall|striped wall)",
    )
    found = [re.search(pattern, prompt) for pattern in patterns]
    if None in found:
        raise ValueError(f"not a caption of a scene: {prompt!r}")
    sign, text, wall = found
    layout = LAYOUTS[" in an arch" in prompt]
    return Attributes(sign[2], sign[1], wall[1], text[1], layout)


def look(image: Image.Image, signs: Signs) -> Sight:
    """What is seen in a 128x128 RGB image. An image without text gets some text colour and layout all the same."""
    pixels = pixels_of(image)
    place, sign_colour = find(pixels, signs)
    wall = pixels[signs.parts_at(place) == WALL]
    colours = len(signs.colours)
    wall_colour = np.bincount(nearest(wall, signs.walls) % colours, minlength=colours).argmax()
    letters, text = letters_at(pixels, signs, place)
    distances = np.square(signs.palette - text).sum(axis=-1)
    distances[sign_colour] = np.inf
    names = [signs.colours[colour] for colour in (sign_colour, wall_colour, distances.argmin())]
    return Sight(Attributes(signs.shapes[place.shape], *names, LAYOUTS[_bend(letters) > ARCHED_BEND]), letters)


def _bend(letters: np.ndarray) -> float:
    """Curvature of the parabola through the letters' pixels (weights, (H, W)), as a multiple of 1 / their spread;
    positive where the middle is above the ends."""
    ys, xs = np.nonzero(letters > 0.3)
    if len(ys) < 3 or np.ptp(xs) < 3:
        return 0.0
    return float(np.polyfit(xs, ys, 2, w=np.sqrt(letters[ys, xs]))[0] * xs.std())


def load_adherence(means: Means) -> Scorer:
    """What says of a picture how many of its prompt's five attributes it shows, from 0 to 1.

    NaN for pictures of another size than flux-mini's, and for prompts that are not of its grammar.
    """
    signs = loaded_reader().signs

    def adherence(shown: Shown) -> float:
        try:
            asked, seen = told(shown.prompt, signs), look(shown.image.convert("RGB"), signs).attributes
        except ValueError:
            return math.nan
        return float(np.mean(np.equal(astuple(asked), astuple(seen))))

    return adherence


ADHERENCE = Metric("attributes right", load_adherence, version=lambda means: f"1-{file_digest(WEIGHTS)}", form="%")
