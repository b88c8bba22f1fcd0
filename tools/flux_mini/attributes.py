"""The shapes and colours of flux-mini's scenes as data for `h2cache.eval.metrics`, and what a scene itself shows."""

from dataclasses import replace
from functools import cache

import numpy as np

from h2cache.eval.metrics.attributes import Attributes
from h2cache.eval.metrics.signs import Place, Signs, letters_at, nearest

from .scenes import COLOURS, SHAPES, WORD_BOX, Scene, draw, letter_boxes

PALETTE = np.array(list(COLOURS.values()), np.float32)
# The colours that tell parts of a picture apart in a drawing made for it, in the order of `h2cache.eval.metrics.signs`.
PART_COLOURS = np.array(
    [COLOURS["blue"], COLOURS["red"], COLOURS["green"], [0.6 * c for c in COLOURS["red"]], (190, 215, 225)], np.float32
)


def attributes_of(scene: Scene) -> Attributes:
    return Attributes(scene.shape, scene.shape_colour, scene.wall_colour, scene.text_colour, scene.layout)


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
    walls = [Scene("label", "red", "", "green", "arched", "bold", "striped", name) for name in COLOURS]
    return Signs(
        parts=np.stack(parts).astype(np.uint8),
        middles=np.array([(letter.x, letter.y) for letter in letters], np.float32),
        boxes=np.array([WORD_BOX[shape] for shape in SHAPES], np.float32),
        palette=PALETTE,
        walls=np.concatenate([PALETTE, [draw(wall).getpixel((2, 2)) for wall in walls]]).astype(np.float32),
        shapes=SHAPES,
        colours=tuple(COLOURS),
    )


def _place(scene: Scene) -> Place:
    return Place(SHAPES.index(scene.shape), *scene.shift)
