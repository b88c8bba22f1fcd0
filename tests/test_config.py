"""Settings: what is allowed, what a refusal says, what the defaults are, and what `apply` and `update` do with them."""

import dataclasses
import math

import pytest
import torch
from loops import denoise

import h2cache
from baselines import BlockCacheConfig
from h2cache import CacheConfig, H2CacheConfig

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
    *[(H2CacheConfig, "stages", value, "'both', 'structure', 'detail'") for value in ("double", None, 2, "Both")],
    *[(H2CacheConfig, "batch_decision", value, "'sample', 'mean'") for value in ("max", None)],
    *[(BlockCacheConfig, "threshold", value, THRESHOLD) for value in ("0.1", None, False, math.nan)],
    *[(BlockCacheConfig, "batch_decision", value, "'sample', 'mean'") for value in ("max", None)],
]


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
        (H2CacheConfig, dict(forecast="hermite", order=4, sigma=0.999)),
        (H2CacheConfig, dict(warmup_steps=9, max_consecutive_hits=1, batch_decision="mean")),
        (BlockCacheConfig, dict(threshold=-1)),
        (BlockCacheConfig, dict(threshold=0.12, batch_decision="mean")),
    ],
)
def test_allowed(config, fields):
    made = config(**fields)
    assert {name: getattr(made, name) for name in fields} == fields


def test_every_field_has_a_refusal_above():
    """A field that is not validated would be found out by its first user."""
    for config in (H2CacheConfig, BlockCacheConfig):
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
        batch_decision="sample",
    )
    assert dataclasses.asdict(BlockCacheConfig()) == dict(threshold=0.12, batch_decision="sample")


@pytest.mark.parametrize("config", [H2CacheConfig(), BlockCacheConfig()])
def test_frozen(config):
    name = dataclasses.fields(config)[-1].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(tau3=0.1), ["tau3", "no field", "tau1", "max_consecutive_hits"]),
        (dict(threshold=0.1), ["threshold", "no field"]),
        (dict(tau1="low"), ["H2CacheConfig.tau1", "'low'", "number"]),
        (dict(tau1=0.5, pool2=0), ["H2CacheConfig.pool2", "0"]),
        (dict(tau1=0.5, tau3=0.1), ["tau3"]),
    ],
)
def test_an_update_that_is_refused_changes_nothing(transformer, change, said):
    with h2cache.apply(transformer, H2CacheConfig(tau1=-1)) as handle:
        with pytest.raises(ValueError) as refusal:
            handle.update(**change)
        assert all(word in str(refusal.value) for word in said)
        assert handle.config == H2CacheConfig(tau1=-1)
        denoise(transformer, steps=2)
        assert {row.threshold for row in handle.trace} == {-1, 0.22}


def test_an_update_changes_only_what_it_names(transformer):
    with h2cache.apply(transformer, H2CacheConfig(tau1=0.1, pool1=7)) as handle:
        handle.update(tau1=0.2)
        assert handle.config == H2CacheConfig(tau1=0.2, pool1=7)
        handle.update()
        assert handle.config == H2CacheConfig(tau1=0.2, pool1=7)


def _pipe_with(transformer):
    return type("SomePipeline", (), {"transformer": transformer})()


@pytest.mark.parametrize(
    "target",
    [None, "flux", torch.nn.Linear(2, 2), object(), _pipe_with(None), _pipe_with(torch.nn.Linear(2, 2))],
    ids=["None", "text", "module", "object", "pipeline without transformer", "pipeline with another transformer"],
)
def test_apply_refuses_what_it_does_not_know_and_says_what_it_supports(target):
    with pytest.raises(TypeError) as refusal:
        h2cache.apply(target, H2CacheConfig())
    assert type(target).__name__ in str(refusal.value)
    assert "FluxTransformer2DModel" in str(refusal.value)


@pytest.mark.parametrize("config", [None, 0.1, {"tau1": 0.1}, H2CacheConfig, "h2cache"])
def test_apply_refuses_what_is_no_configuration(transformer, config):
    with pytest.raises(TypeError, match="H2CacheConfig"):
        h2cache.apply(transformer, config)


def test_apply_refuses_a_whole_compiled_model(transformer):
    """Its decisions would be traced once and frozen. Compiling blocks is fine, and the message says so."""
    compiled = torch.compile(transformer)  # nothing is compiled before the first call
    for target in (compiled, _pipe_with(compiled)):
        with pytest.raises(TypeError, match="compile_repeated_blocks"):
            h2cache.apply(target, H2CacheConfig())


@pytest.mark.parametrize("config", [None, CacheConfig()], ids=["no config", "a config that is no method"])
def test_a_refused_apply_leaves_the_method_before_it_in_force(transformer, config):
    with h2cache.apply(transformer, BlockCacheConfig()) as handle:
        with pytest.raises(TypeError):
            h2cache.apply(transformer, config)
        denoise(transformer, steps=2)
        assert len(handle.trace) == 2


def test_apply_takes_a_pipeline_or_its_transformer(tiny_pipe):
    for target in (tiny_pipe, tiny_pipe.transformer):
        with h2cache.apply(target, BlockCacheConfig()) as handle:
            denoise(tiny_pipe.transformer, steps=2)
        assert len(handle.trace) == 2
