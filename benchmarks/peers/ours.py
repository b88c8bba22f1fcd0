"""The methods of this repository, swept. Plans are swept by their files: one was calibrated for each budget."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from diffusers import FluxPipeline

import h2cache
from baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache import CacheConfig, H2CacheConfig

from .contender import OURS, Contender, described

PLAN = "plan"
THRESHOLDS = (0.04, 0.055, 0.075, 0.1, 0.14, 0.19, 0.26, 0.35)
RATIOS = (
    0.0,
    0.75,
    1.47,
)  # of H2's second threshold to its first; 0: the detail stage is only skipped along; published
INTERVALS = (2, 3, 4, 5, 6, 7, 8)
SIGMAS = {"stage": (0.5, 0.6, "auto"), "module": (0.5, 0.6)}


def contenders(coefficients: Sequence[float], plans: Path, steps: int) -> Iterator[Contender]:
    """`coefficients` of TeaCache's polynomial; `plans`, a folder, of which those made for `steps` steps are taken."""
    yield from _plans(plans, steps)
    for tau, ratio in product(THRESHOLDS, RATIOS):
        thresholds = dict(tau1=tau, tau2=round(tau * ratio, 4))
        yield _row("H2-Cache", H2CacheConfig(**thresholds), **thresholds)
        yield _row("H2-Cache, Hermite", H2CacheConfig(**thresholds, forecast="hermite"), **thresholds)
    for threshold in THRESHOLDS:
        yield _row("Block Cache", BlockCacheConfig(threshold), threshold=threshold)
        yield _row("TeaCache", TeaCacheConfig(threshold, tuple(coefficients)), threshold=threshold)
    for granularity, interval in product(("stage", "module"), INTERVALS):
        yield from _forecasts(granularity, interval)
    for interval, forecast in product(INTERVALS, ("taylor", "hermite")):
        name = {"taylor": "ClusCa", "hermite": "Hi-ClusCa"}[forecast]
        yield _row(name, ClusCaConfig(interval, forecast=forecast), interval=interval)


def _forecasts(granularity: str, interval: int) -> Iterator[Contender]:
    shared = dict(interval=interval, granularity=granularity)
    yield _row(f"Reuse, {granularity}s", TaylorSeerConfig(**shared, order=0), interval=interval)
    for order in (1, 2):
        shown = dict(interval=interval, order=order)
        yield _row(f"TaylorSeer, {granularity}s", TaylorSeerConfig(**shared, order=order), **shown)
        for sigma in SIGMAS[granularity]:
            config = HiCacheConfig(**shared, order=order, sigma=sigma)
            yield _row(f"HiCache, {granularity}s", config, **shown, sigma=sigma)


def _plans(folder: Path, steps: int) -> Iterator[Contender]:
    """None where there is no such folder. A plan that is calibrated anew is another contender."""
    for file in sorted(folder.glob("*.json")):
        plan = h2cache.Plan.load(file)
        if plan.steps == steps:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
            yield _row(PLAN, h2cache.PlanConfig(plan), file=file.stem, digest=digest)


def _row(method: str, config: CacheConfig, **shown: object) -> Contender:
    return Contender(OURS, method, described(**shown), partial(_applied, config))


def _applied(config: CacheConfig, pipe: FluxPipeline) -> h2cache.Handle:
    return h2cache.apply(pipe, config)
