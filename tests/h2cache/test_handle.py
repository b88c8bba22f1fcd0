"""`apply` and its handle: what they take, what they refuse, and what an update changes."""

import logging
import re

import pytest
import torch
from loops import denoise

import h2cache
from h2cache import CacheConfig, H2CacheConfig
from h2cache.baselines import BlockCacheConfig


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


def test_removing_a_replaced_cache_says_so_and_leaves_the_newer_one(transformer, caplog):
    first = h2cache.apply(transformer, H2CacheConfig())
    with h2cache.apply(transformer, BlockCacheConfig()) as second:
        with caplog.at_level(logging.WARNING, "h2cache"):
            first.remove()
        assert "already replaced by a later h2cache.apply" in caplog.text
        denoise(transformer, steps=2)
        assert (len(first.trace), len(second.trace)) == (0, 2)
    caplog.clear()
    second.remove()
    assert not caplog.records, "removing twice is no mistake"


def test_a_replaced_cache_takes_no_update(transformer):
    first = h2cache.apply(transformer, H2CacheConfig())
    with (
        h2cache.apply(transformer, H2CacheConfig()),
        pytest.raises(RuntimeError, match="removed or replaced by another"),
    ):
        first.update(tau1=0.5)


def test_a_handle_says_what_it_is_and_what_ran(transformer):
    with h2cache.apply(transformer, H2CacheConfig(tau1=0.15)) as handle:
        assert re.fullmatch(r"<CacheHandle of H2CacheConfig\(.*tau1=0.15, .*\): runs 0, steps 0>", repr(handle))
