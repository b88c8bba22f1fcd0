"""Settings: what is allowed, what a refusal says, and what the defaults are."""

import dataclasses
import math

import pytest
from loops import denoise

import h2cache
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig

THRESHOLD = "a number (relL1 below it is a hit; negative: never hit)"
REFUSED = [
    *[(H2CacheConfig, name, value, THRESHOLD) for name in ("tau1", "tau2") for value in ("0.1", None, True, math.nan)],
    *[(H2CacheConfig, name, value, ">= 1 or None") for name in ("pool1", "pool2") for value in (0, -3, 2.0, "9", True)],
    *[(H2CacheConfig, "hierarchical", value, "True or False") for value in (1, None, "yes")],
    *[(H2CacheConfig, "forecast", value, "'reuse', 'taylor', 'hermite'") for value in ("Taylor", "", None, 1)],
    *[(H2CacheConfig, "order", value, ">= 1") for value in (0, -1, 1.5, None, True)],
    *[(H2CacheConfig, "sigma", value, "(0, 1)") for value in (0, 1, -0.5, 1.5, math.nan, "auto", None)],
    *[(H2CacheConfig, "warmup_steps", value, ">= 1") for value in (0, -1, 1.5, None)],
    *[(H2CacheConfig, "max_consecutive_hits", value, ">= 1 or None") for value in (0, -1, 2.5, "2", True)],
    *[
        (H2CacheConfig, "split", value, "a number in (0, 1)")
        for value in (0, 1, -0.5, 1.5, math.nan, "0.5", None, True)
    ],
    *[(H2CacheConfig, "pieces", value, ">= 1") for value in (0, -1, 1.5, "2", None, True)],
    *[(H2CacheConfig, "stages", value, "'both', 'structure', 'detail'") for value in ("double", None, 2, "Both")],
    *[(BlockCacheConfig, "threshold", value, THRESHOLD) for value in ("0.1", None, False, math.nan)],
    *[(TeaCacheConfig, "threshold", value, THRESHOLD) for value in ("0.1", None, False, math.nan)],
    *[
        (TeaCacheConfig, "coefficients", value, "finite numbers")
        for value in ((), (1.0, math.nan), (math.inf,), ("1",))
    ],
    *[(TeaCacheConfig, "num_steps", value, ">= 1 or None") for value in (0, -1, 2.5, "2", True)],
    *[(HiCacheConfig, "basis", value, "'hermite', 'taylor'") for value in ("Hermite", None)],
    *[(HiCacheConfig, "sigma", value, '(0, 1) or "auto"') for value in (0, 1, 1.5, -0.5, math.nan, "Auto", None, True)],
    *[(ClusCaConfig, name, value, ">= 1") for name in ("clusters", "iterations") for value in (0, -1, 1.5, None)],
    *[(ClusCaConfig, "propagation", value, "[0, 1]") for value in (-0.1, 1.1, math.nan, "0", None, True)],
    *[(ClusCaConfig, "forecast", value, "'taylor', 'hermite'") for value in ("reuse", None)],
    *[(ClusCaConfig, "sigma", value, "(0, 1)") for value in (0, 1.5, "auto")],
    *[(ClusCaConfig, "seed", value, ">= 0") for value in (-1, 0.5, None)],
    *[(ClusCaConfig, "fresh", value, "'output', 'input'") for value in ("both", None)],
    (ClusCaConfig, "granularity", "stage", "one of 'module'"),
]
for scheduled in (TaylorSeerConfig, HiCacheConfig, ClusCaConfig):
    REFUSED += [
        *[(scheduled, "interval", value, ">= 1") for value in (0, -1, 2.5, "5", None, True)],
        *[(scheduled, "order", value, ">= 0") for value in (-1, 1.5, None, True)],
        *[(scheduled, "first_enhance", value, ">= 1") for value in (0, -1, 2.5, None)],
        *[(scheduled, "granularity", value, "'module'") for value in ("block", None)],
    ]
CONFIGS = (H2CacheConfig, BlockCacheConfig, TeaCacheConfig, TaylorSeerConfig, HiCacheConfig, ClusCaConfig)
REFUSED += [(config, "batch_decision", value, "'sample', 'mean'") for config in CONFIGS for value in ("max", None)]


@pytest.mark.parametrize(("config", "name", "value", "allowed"), REFUSED)
def test_a_refusal_names_class_field_value_and_what_is_allowed(config, name, value, allowed):
    with pytest.raises(ValueError) as refusal:
        config(**{name: value})
    message = str(refusal.value)
    assert message.startswith(f"{config.__name__}.{name} = {value!r}: must be ")
    assert allowed in message


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (H2CacheConfig, dict(tau1=0, tau2=3)),
        (H2CacheConfig, dict(tau1=-1, tau2=math.inf)),
        (H2CacheConfig, dict(pool1=None, pool2=1)),
        (H2CacheConfig, dict(hierarchical=False, stages="detail")),
        (H2CacheConfig, dict(split=0.01, pieces=5)),
        (H2CacheConfig, dict(forecast="hermite", order=4, sigma=0.999)),
        (H2CacheConfig, dict(warmup_steps=9, max_consecutive_hits=1, batch_decision="mean")),
        (BlockCacheConfig, dict(threshold=-1)),
        (BlockCacheConfig, dict(threshold=0.12, batch_decision="mean")),
        (TeaCacheConfig, dict(threshold=math.inf, coefficients=(0, -1.5), num_steps=1)),
        (TaylorSeerConfig, dict(interval=1, order=0, first_enhance=1, granularity="stage")),
        (HiCacheConfig, dict(sigma="auto", order=3)),
        (HiCacheConfig, dict(sigma=0.01, basis="taylor")),
        (ClusCaConfig, dict(clusters=1, propagation=0, forecast="hermite", fresh="input")),
    ],
)
def test_allowed(config, fields):
    made = config(**fields)
    assert {name: getattr(made, name) for name in fields} == fields


def test_every_field_has_a_refusal_above():
    """A field that is not validated would be found out by its first user."""
    for config in CONFIGS:
        tested = {name for kind, name, *_ in REFUSED if kind is config}
        assert tested == {field.name for field in dataclasses.fields(config)}


def test_the_defaults_are_the_published_settings():
    assert dataclasses.asdict(H2CacheConfig()) == dict(
        tau1=0.15,
        tau2=0.22,
        pool1=2048,
        pool2=384,
        hierarchical=True,
        forecast="reuse",
        order=1,
        sigma=0.5,
        warmup_steps=1,
        max_consecutive_hits=None,
        stages="both",
        split=1 / 3,
        pieces=1,
        batch_decision="sample",
    )
    assert dataclasses.asdict(BlockCacheConfig()) == dict(threshold=0.12, batch_decision="sample")
    tea = TeaCacheConfig()
    assert tea.coefficients == (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)
    assert (tea.threshold, tea.num_steps) == (0.4, None)
    schedule = dict(order=1, first_enhance=3, granularity="module", batch_decision="sample")
    assert dataclasses.asdict(TaylorSeerConfig()) == dict(interval=6, **schedule)
    assert dataclasses.asdict(HiCacheConfig()) == dict(interval=5, sigma=0.5, basis="hermite", **schedule)
    clusters = dict(clusters=16, iterations=10, propagation=0.005, seed=0, fresh="output")
    assert dataclasses.asdict(ClusCaConfig()) == dict(interval=5, forecast="taylor", sigma=0.5, **clusters, **schedule)


def test_coefficients_may_come_as_a_list():
    """As YAML has them; the config stays hashable."""
    assert TeaCacheConfig(coefficients=[1.0, 0.5]) == TeaCacheConfig(coefficients=(1.0, 0.5))


def test_auto_is_for_the_hermite_basis():
    with pytest.raises(ValueError, match=r"HiCacheConfig\.sigma = 'auto': must be a number in \(0, 1\) with basis"):
        HiCacheConfig(sigma="auto", basis="taylor")


@pytest.mark.parametrize("tokens", [dict(text_tokens=4), dict(height=2, width=2, text_tokens=9)])
def test_more_clusters_than_tokens_are_refused_before_anything_is_computed(transformer, tokens):
    """The tokens are known at the first call; the next run with enough of them goes well."""
    with h2cache.apply(transformer, ClusCaConfig(clusters=5)) as handle:
        with pytest.raises(ValueError, match="clusters = 5: must be from 1 to 4, the tokens of a stream"):
            denoise(transformer, steps=2, **tokens)
        assert len(handle.trace) == 0 and handle.held_bytes() == 0
        denoise(transformer, steps=5)


@pytest.mark.parametrize("config", [config() for config in CONFIGS], ids=lambda config: type(config).__name__)
def test_frozen(config):
    name = dataclasses.fields(config)[-1].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    assert hash(config) == hash(dataclasses.replace(config))
