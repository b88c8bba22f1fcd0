"""What makes a small picture of a scene: 32x32 pixels, and on request a blur, noise or JPEG's artefacts on top.

Everything random comes from the `random.Random` that the caller owns.
"""

import io
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

SMALL = 32


def shrink(image: Image.Image) -> Image.Image:
    """The picture at 32x32, antialiased (Pillow's bicubic filter)."""
    return image.resize((SMALL, SMALL), Image.Resampling.BICUBIC)


def small(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture at 32x32 and nothing else; draws nothing from `rng`."""
    return shrink(image)


def blurred(image: Image.Image, rng: random.Random) -> Image.Image:
    """Blurred by a Gaussian of 1.5 to 4 pixels of the large picture, then shrunk."""
    return shrink(image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 4.0))))


def noisy(image: Image.Image, rng: random.Random) -> Image.Image:
    """Shrunk, then Gaussian noise with a standard deviation of 4 to 16 of 255 levels on every value."""
    pixels = np.asarray(shrink(image), np.float32)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0.0, rng.uniform(4.0, 16.0), pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8))


def compressed(image: Image.Image, rng: random.Random) -> Image.Image:
    """Shrunk, then through JPEG at a quality of 25 to 75."""
    buffer = io.BytesIO()
    shrink(image).save(buffer, "JPEG", quality=rng.randint(25, 75))
    return Image.open(buffer).convert("RGB")


DEGRADATIONS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "small": small,
    "blurred": blurred,
    "noisy": noisy,
    "jpeg": compressed,
}
# How often training takes each of them.
WEIGHTS = (3, 1, 1, 1)


def degraded(image: Image.Image, rng: random.Random) -> Image.Image:
    """The 128x128 picture as a 32x32 one, degraded in a way that `rng` chooses by WEIGHTS."""
    kind = rng.choices(tuple(DEGRADATIONS), weights=WEIGHTS)[0]
    return DEGRADATIONS[kind](image, rng)
