"""Metrics of a set of images: how far a setting's images, as a set, are from the baseline's.

Other metrics compare image with image. These compare two clouds of features by the Fréchet distance of FID (Heusel et
al. 2017), of normal distributions with the clouds' means and covariances: what a method does to all images alike, such
as blur, counts; what it does to one image and another undoes does not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from h2cache.eval.metrics.metric import Means

RESAMPLES, SEED, CONFIDENCE = 500, 0, 0.95

Features = Callable[[Path], np.ndarray]  # (D,) of the image in a file


@dataclass(frozen=True)
class SetMetric:
    """A squared Fréchet distance of features; 0 for equal means and covariances, lower is nearer.

    `h2cache.eval.metrics.registry.SET_METRICS` has ours by name; pyiqa has more.

    Fields:
        label: its name in tables.
        load: makes what gives an image's features. Unavailable says that it cannot be had.
        standardized: whether each feature is in standard deviations of the baseline's images.
        fetches: whether `load` may ask a network.
        form: a format specification for tables.
    """

    label: str
    load: Callable[[Means], Features]
    standardized: bool = False
    fetches: bool = False
    form: str = ".3f"


@dataclass(frozen=True)
class SetScore:
    """Of `n` images. low, high: 95 % percentile bootstrap over prompts, both sets drawn together; NaN for fewer than
    three prompts, and so is `value` for fewer than two images."""

    n: int
    value: float
    low: float = math.nan
    high: float = math.nan


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Fréchet distance of two sets of features, (N, D) and (M, D), N and M from 2.

    |mean a - mean b|^2 + tr A + tr B - 2 tr (A B)^(1/2) with covariances A and B. The last trace is the nuclear norm of
    X Y^T for A = X^T X and B = Y^T Y, so that no root of a D x D matrix is taken.
    """
    x, y = ((each - each.mean(axis=0)) / math.sqrt(len(each) - 1) for each in (a, b))
    spread = (x**2).sum() + (y**2).sum()
    x, y = (np.linalg.qr(each, mode="r") for each in (x, y))
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    apart = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return max(0.0, float(apart + spread - 2 * shared))


def set_score(metric: SetMetric, images: np.ndarray, references: np.ndarray, prompts: Sequence[str]) -> SetScore:
    """How far `images` are from `references`, features (N, D) of the same `prompts`, one each."""
    n = len(images)
    if n < 2:
        return SetScore(n, math.nan)
    if metric.standardized:
        scale = references.std(axis=0, ddof=1)
        images, references = (each / np.where(scale > 0, scale, 1) for each in (images, references))
    value = frechet(images, references)
    of_prompt = [np.flatnonzero(np.asarray(prompts) == prompt) for prompt in dict.fromkeys(prompts)]
    if len(of_prompt) < 3:
        return SetScore(n, value)
    generator, drawn = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        index = np.concatenate([of_prompt[k] for k in generator.integers(len(of_prompt), size=len(of_prompt))])
        drawn.append(frechet(images[index], references[index]))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return SetScore(n, value, float(low), float(high))


def look(file: Path) -> np.ndarray:
    """What a picture looks like at a glance, (9,): mean and spread of light, red against green and yellow against blue,
    in 0..1, and the logarithm of the mean difference of light between pixels 1, 2 and 4 apart."""
    with Image.open(file) as image:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.float64) / 255, 2, 0)
    light = (red + green + blue) / 3
    opponents = (light, red - green, (red + green) / 2 - blue)
    colours = [value for each in opponents for value in (each.mean(), each.std())]
    edges = [np.abs(light[:, k:] - light[:, :-k]).mean() + np.abs(light[k:] - light[:-k]).mean() for k in (1, 2, 4)]
    return np.array([*colours, *np.log(np.array(edges) + 1 / 255)])


LOOK = SetMetric("distance of looks", lambda means: look, standardized=True)
