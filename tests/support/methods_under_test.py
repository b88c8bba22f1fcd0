"""Every method, as the tests configure it, and what tests ask of a configuration."""

import math
from collections.abc import Callable
from itertools import count, cycle
from typing import Any
from zlib import crc32

import pytest
from thorough import named, product

from h2cache import CacheConfig, Decision, H2CacheConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.policy.stages import ModuleStage
from h2cache.runtime.run_state import SampleMemory

# Every method on blocks, with settings that sometimes hit and sometimes miss on the tiny models and on flux-mini. Plans
# are schedulers; tests/properties/test_plans.py has the same rules for them.
METHODS = [
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35), id="h2-reuse"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, pool1=4, pool2=6), id="h2-pooled"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, forecast="taylor", warmup_steps=2), id="h2-taylor"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, forecast="hermite", order=2), id="h2-hermite"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, hierarchical=False), id="h2-flat"),
    pytest.param(TeaCacheConfig(threshold=0.4, coefficients=(1.0, 0.0)), id="teacache"),
    pytest.param(TaylorSeerConfig(interval=3), id="taylorseer"),
    pytest.param(TaylorSeerConfig(interval=4, order=2, granularity="stage"), id="taylorseer-stage"),
    pytest.param(HiCacheConfig(interval=3, order=2), id="hicache"),
    pytest.param(HiCacheConfig(interval=3, granularity="stage", sigma="auto"), id="hicache-auto-stage"),
    pytest.param(ClusCaConfig(interval=3, clusters=3), id="clusca"),
    pytest.param(BlockCacheConfig(threshold=0.3), id="block-cache"),
]


def kind(config: CacheConfig) -> tuple:
    """What a composition is made of, apart from numbers: those of one kind take the same way through the engine."""
    return tuple(
        (
            (type(stage), stage.roles, type(stage.probe), stage.parent is None, stage.learns),
            getattr(stage, "clusters", None) is None,
        )
        for stage in config.compose()
    )


def measures(config: CacheConfig) -> bool:
    """Whether images are looked at, so that each is decided about by itself. Else a schedule decides for all alike."""
    return any(stage.probe is not None for stage in config.compose())


def runs_first_block(config: CacheConfig) -> bool:
    """Whether the first block of every stage runs at each step; else no block runs where a stage is skipped."""
    return all(stage.runs_first_block for stage in config.compose())


def skips_modules(config: CacheConfig) -> bool:
    """Whether blocks run throughout, and the attention and MLP modules inside them are skipped."""
    return any(isinstance(stage, ModuleStage) for stage in config.compose())


def has_clusters(config: CacheConfig) -> bool:
    """Whether a few fresh tokens correct what is forecast in the steps that are skipped."""
    return any(getattr(stage, "clusters", None) is not None for stage in config.compose())


def warmup_steps(config: CacheConfig) -> int:
    """The first steps of a run that compute because they are the first."""
    rule = config.compose()[0].rule
    return next(step for step in count() if rule.without_measuring(SampleMemory(), step, False) is not Decision.WARMUP)


def methods(predicate: Callable[[CacheConfig], bool]) -> list:
    return [method for method in METHODS if predicate(method.values[0])]


MEASURING = methods(measures)
SCHEDULED = methods(lambda config: not measures(config))
FIRST_BLOCK = methods(runs_first_block)
EARLY = methods(lambda config: measures(config) and not runs_first_block(config))  # measures before any block runs
MODULES = methods(skips_modules)
# One method of each kind, where a test has more to vary than the method.
KINDS = list({kind(method.values[0]): method for method in reversed(METHODS)}.values())[::-1]


SOME_KINDS = [
    KINDS[0].id,
    next(method.id for method in KINDS if method in MODULES),
]  # stages, and modules inside blocks

some_kinds = product("config", KINDS, kept=lambda method: method in SOME_KINDS)

# Of the same kind as another method: H2-Cache with a forecast, which none of the kinds has that measures, and the rest.
VARIANTS = (("h2-taylor", "h2-hermite"), ("h2-pooled", "hicache"))
assert {method.id for method in METHODS if method not in KINDS} == {name for pair in VARIANTS for name in pair}


def drawn_for(test: Callable[..., None]) -> set[str]:
    """The methods that `make test` runs a test with: one of each kind, and the variants that its name draws."""
    draw = crc32(test.__name__.encode()) % 2
    return {method.id for method in KINDS} | {pair[draw] for pair in VARIANTS}


def every_method(test: Callable[..., None]) -> Callable[..., None]:
    """(config): every method. All but those of `drawn_for` are thorough."""
    return product("config", METHODS, kept=lambda method: method in drawn_for(test))(test)


def every_method_once(name: str, values: dict[str, Any], most: str) -> Callable[[Callable[..., None]], Callable]:
    """(config, `name`): every method of `drawn_for` with the value called `most`, and two with each of the others.

    Of the two one measures and one follows a schedule; the next value has the next two. The rest is thorough.
    """
    others = [key for key in values if key != most]
    two_each = set()
    for kinds in ([each for each in KINDS if each in MEASURING], [each for each in KINDS if each in SCHEDULED]):
        two_each |= {(method.id, key) for method, key in zip(cycle(kinds), others, strict=False)}

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        covered = two_each | {(method, most) for method in drawn_for(test)}
        return product(f"config, {name}", METHODS, named(values), kept=lambda *ids: ids in covered)(test)

    return mark


def never_hitting(config: CacheConfig) -> CacheConfig:
    """The same method with thresholds that nothing is below, or computing one step in one."""
    return _set(config, tau1=-1.0, tau2=-1.0, threshold=-1.0, interval=1)


def always_hitting(config: CacheConfig) -> CacheConfig:
    """The same method with thresholds that all is below, or no end to its forecasts, and with no step as the last."""
    values = dict(tau1=math.inf, tau2=math.inf, threshold=math.inf, interval=10**9, num_steps=10**9)
    return _set(config, **values)


def _set(config: CacheConfig, **values: Any) -> CacheConfig:
    """Those fields that the method has."""
    return config.updated(**{name: value for name, value in values.items() if hasattr(config, name)})
