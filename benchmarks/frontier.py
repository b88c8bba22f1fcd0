"""From measurements to frontiers: which settings are worth having, and what a method gives at equal work.

Arrays have one float64 number a prompt, (P,), in the same order of prompts for everything that is compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Point:
    """One setting. `work` is a fraction of the uncached run's, `wall` the speedup of denoising times; all (P,)."""

    setting: str
    work: np.ndarray
    wall: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray

    @property
    def speedup(self) -> float:
        """In blocks: how many times less of their work was done."""
        return float(1 / self.work.mean())

    def at(self, rows: np.ndarray) -> "Point":
        """The same setting on some of the prompts, or on some more than once."""
        fields = ("work", "wall", "psnr", "ssim")
        return replace(self, **{name: getattr(self, name)[rows] for name in fields})


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval, whose ends are NaN where there is none."""

    mean: float
    low: float
    high: float


def mean_interval(values: np.ndarray) -> Value:
    """Of values (P,), by Student's t; of paired differences it is the paired interval. One value has none."""
    mean = float(values.mean())
    if len(values) < 2:
        return Value(mean, np.nan, np.nan)
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Value(mean, mean - half, mean + half)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other equals or beats in both mean work and mean PSNR, from the slowest to the fastest."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.work.mean(), -each.psnr.mean())):
        if not best or point.psnr.mean() > best[-1].psnr.mean():
            best.append(point)
    return best[::-1]


def around(points: Sequence[Point], speedups: Sequence[float]) -> list[Point]:
    """The neighbours of each speedup on a frontier: what it takes to interpolate there."""
    chosen: set[int] = set()
    for speedup in speedups:
        slower = [i for i, point in enumerate(points) if point.speedup <= speedup]
        faster = [i for i, point in enumerate(points) if point.speedup > speedup]
        chosen |= {*slower[-1:], *faster[:1]}
    return [point for i, point in enumerate(points) if i in chosen]


def at_speedup(points: Sequence[Point], speedup: float, what: str) -> np.ndarray | None:
    """(P,) of "psnr", "ssim" or "wall" at a speedup in blocks, or at a higher one, on a frontier.

    Between two settings, linear in the logarithm of their mean work ("wall": its own logarithm); where even the slowest
    setting is faster, that setting. None where none is so fast; one within 1 % of the speedup counts as being there.
    """
    weights = _weights([np.log(point.speedup) for point in points], np.log(speedup), tolerance=0.01)
    if weights is None:
        return None
    if what == "wall":
        return np.exp(sum(weight * np.log(points[i].wall) for i, weight in weights))
    return sum(weight * getattr(points[i], what) for i, weight in weights)


def speedup_at(points: Sequence[Point], psnr: float) -> float | None:
    """The speedup in blocks at which a frontier has a mean PSNR; where all of it has more, that of its fastest setting.

    None where it has less everywhere.
    """
    weights = _weights([point.psnr.mean() for point in points[::-1]], psnr, tolerance=0.0)
    if weights is None:
        return None
    return float(np.exp(sum(weight * np.log(points[::-1][i].speedup) for i, weight in weights)))


def _weights(positions: Sequence[float], wanted: float, tolerance: float) -> list[tuple[int, float]] | None:
    """Indexes and weights that interpolate ascending `positions` at `wanted`: the first where all are above it, None
    where all are below."""
    if not positions or wanted > positions[-1] + tolerance:
        return None
    for i, (low, high) in enumerate(pairwise(positions)):
        if low <= wanted <= high:
            share = (wanted - low) / (high - low)
            return [(i, 1 - share), (i + 1, share)]
    return [(0 if wanted < positions[0] else len(positions) - 1, 1.0)]


@dataclass(frozen=True)
class Advantage:
    """How much faster the champion is than a rival at the rival's PSNR: ratios of speedups, with 95 % intervals.

    `at_least`: the champion has a higher PSNR at all of its settings, and could be faster still.
    """

    psnr: float
    blocks: Value
    wall: Value
    at_least: bool


def advantage(champion: Sequence[Point], rival: Sequence[Point], speedup: float, draws: int = 1000) -> Advantage | None:
    """At the PSNR that `rival` has at `speedup`; None where it is not so fast, or the champion never so near.

    Intervals are percentiles of a bootstrap over prompts, the same prompts for both.
    """
    plain = _ratios(champion, rival, speedup)
    if plain is None:
        return None
    prompts = len(champion[0].psnr)
    rng = np.random.default_rng(0)
    drawn = []
    for rows in rng.integers(prompts, size=(draws, prompts)):
        ratios = _ratios(
            frontier([point.at(rows) for point in champion]), frontier([point.at(rows) for point in rival]), speedup
        )
        if ratios is not None:
            drawn.append(ratios)
    # None where it was too often outside of what the settings reach: the percentiles would be of the rest.
    known = len(drawn) >= 0.9 * draws
    ends = np.percentile(drawn, (2.5, 97.5), axis=0) if known else np.full((2, 3), np.nan)
    values = [Value(*column) for column in zip(plain, *ends, strict=True)]
    return Advantage(plain[0], values[1], values[2], at_least=champion[-1].psnr.mean() > plain[0])


def _ratios(champion: Sequence[Point], rival: Sequence[Point], speedup: float) -> tuple[float, float, float] | None:
    psnr = at_speedup(rival, speedup, "psnr")
    reached = None if psnr is None else speedup_at(champion, psnr.mean())
    if reached is None:
        return None
    walls = [np.median(at_speedup(champion, reached, "wall")), np.median(at_speedup(rival, speedup, "wall"))]
    return float(psnr.mean()), reached / speedup, float(walls[0] / walls[1])
