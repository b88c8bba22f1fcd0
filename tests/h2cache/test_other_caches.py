"""A transformer has one cache: another library's is refused before `apply` and after, with the call that removes it."""

import copy
import sys
from types import SimpleNamespace

import cache_dit
import pytest
import torch
from attachments import assert_same_inside, inside
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from diffusers.hooks import HookRegistry
from loops import denoise

import h2cache
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig
from h2cache.runtime import engine
from h2cache.runtime.interception import interception_of

DIFFUSERS = {
    "first_block_cache": FirstBlockCacheConfig(threshold=0.1),
    "mag_cache": MagCacheConfig(mag_ratios=[1.0] * 3, num_inference_steps=3),
    "taylorseer_cache": TaylorSeerCacheConfig(cache_interval=3),
    "faster_cache": FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, is_guidance_distilled=True
    ),
    "pyramid_attention_broadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "sea_cache": SeaCacheConfig(),
    "text_kv_cache": TextKVCacheConfig(),
}


def enable(transformer, name):
    transformer.enable_cache(DIFFUSERS[name])


def hook_directly(transformer, name):
    """As `enable_cache` does it, which then notes on the transformer that there is a cache."""
    getattr(sys.modules["diffusers.hooks"], f"apply_{name}")(transformer, DIFFUSERS[name])


def disable(transformer, told):
    assert "remove one, by transformer.disable_cache() or by handle.remove()" in told
    transformer.disable_cache()


def remove_hooks(transformer, told):
    """Do what the message says, with the names that it says."""
    removal, names = told.split("remove one, by ")[1].split(" or by handle.remove()")[0].split(" for ")
    assert removal == "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(name)"
    for name in names.split(" and "):
        HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(name.strip("'"))


WAYS = [pytest.param(enable, disable, id="enable_cache"), pytest.param(hook_directly, remove_hooks, id="hooks")]


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize(("put_on", "take_off"), WAYS)
def test_diffusers_cache_before_ours_refuses_apply_and_stays(put_on, take_off, name, transformer):
    put_on(transformer, name)
    before = inside(transformer)
    with pytest.raises(RuntimeError, match="two caches do not work together") as refused:
        h2cache.apply(transformer, H2CacheConfig())
    assert_same_inside(transformer, before)
    take_off(transformer, str(refused.value))
    with h2cache.apply(transformer, BlockCacheConfig(threshold=-1)):
        denoise(transformer, steps=1)


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize(("put_on", "take_off"), WAYS)
def test_diffusers_cache_after_ours_refuses_the_next_run(put_on, take_off, name, transformer):
    expected = denoise(transformer, steps=3)
    handle = h2cache.apply(transformer, BlockCacheConfig(threshold=-1))
    put_on(transformer, name)
    with pytest.raises(RuntimeError, match="two caches do not work together") as refused:
        denoise(transformer, steps=1)
    assert not handle.trace._runs
    take_off(transformer, str(refused.value))
    assert torch.equal(denoise(transformer, steps=3), expected)
    assert len(handle.trace) == 3
    handle.remove()


def test_diffusers_cache_in_the_middle_of_a_run_refuses_the_next_call(transformer):
    def late(step, call):
        if step == 2:
            enable(transformer, "first_block_cache")

    with h2cache.apply(transformer, BlockCacheConfig(threshold=-1)) as handle:
        with pytest.raises(RuntimeError, match=r"transformer\.disable_cache\(\)"):
            denoise(transformer, steps=4, before_step=late)
        assert len(handle.trace) == 2


def test_after_our_removal_the_other_cache_works(transformer):
    handle = h2cache.apply(transformer, H2CacheConfig())
    hook_directly(transformer, "first_block_cache")
    handle.remove()
    with transformer.cache_context("only"):
        denoise(transformer, steps=2)


def on_pipe(pipe):
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=1))
    return pipe, "cache_dit.disable_cache(pipe)"


def on_transformer(pipe):
    cache_dit.enable_cache(pipe.transformer, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1))
    return pipe.transformer, "cache_dit.disable_cache(transformer)"


@pytest.mark.parametrize("put_on", [on_pipe, on_transformer])
def test_cache_dit_before_ours_refuses_apply_and_stays(put_on, own_pipe):
    target, removal = put_on(own_pipe)
    try:
        before = inside(own_pipe.transformer)
        with pytest.raises(RuntimeError, match=r"cache-dit.* two caches do not work together") as refused:
            h2cache.apply(own_pipe, H2CacheConfig())
        assert f"by {removal} or by" in str(refused.value)
        assert_same_inside(own_pipe.transformer, before)
    finally:
        cache_dit.disable_cache(target)
    h2cache.apply(own_pipe, H2CacheConfig()).remove()


@pytest.mark.parametrize("put_on", [on_pipe, on_transformer])
def test_cache_dit_after_ours_refuses_the_next_call(put_on, own_pipe):
    transformer = own_pipe.transformer
    expected = denoise(transformer, steps=3)
    with h2cache.apply(own_pipe, BlockCacheConfig(threshold=-1)) as handle:
        target, removal = put_on(own_pipe)
        try:
            with pytest.raises(RuntimeError, match="two caches do not work together") as refused:
                denoise(transformer, steps=1)
            assert f"by {removal} or by" in str(refused.value)
        finally:
            cache_dit.disable_cache(target)
        assert torch.equal(denoise(transformer, steps=3), expected)
        assert len(handle.trace) == 3


def test_a_cache_that_only_says_that_it_is_there_is_refused(transformer):
    """ParaAttention and nunchaku note `_is_cached` on the transformer, and take nothing back."""
    transformer._is_cached = True
    with pytest.raises(RuntimeError, match=r"loading the transformer anew or by handle\.remove\(\)"):
        h2cache.apply(transformer, H2CacheConfig())


def test_of_two_transformers_neither_is_touched_where_one_is_refused(transformer):
    pair = SimpleNamespace(transformer=transformer, transformer_2=copy.deepcopy(transformer))
    enable(pair.transformer_2, "first_block_cache")
    with pytest.raises(RuntimeError, match="two caches do not work together"):
        h2cache.apply(pair, H2CacheConfig())
    assert interception_of(pair.transformer) is None


def test_other_hooks_of_diffusers_are_no_caches(transformer):
    """Its offloading and its layer-wise casting go together with a cache."""
    transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with h2cache.apply(transformer, BlockCacheConfig(threshold=-1)) as handle:
        denoise(transformer, steps=2)
    assert len(handle.trace) == 2


def test_the_modules_are_looked_through_once_a_run(transformer, monkeypatch):
    """Each call of the model looks at the transformer alone."""
    looks = []
    monkeypatch.setattr(engine, "refuse_hooked_caches", lambda module: looks.append("modules"))
    monkeypatch.setattr(engine, "refuse_other_caches", lambda module: looks.append("transformer"))
    with h2cache.apply(transformer, BlockCacheConfig(threshold=-1)):
        for _ in range(2):
            denoise(transformer, steps=3)
    assert looks == ["transformer", "modules", "transformer", "transformer"] * 2
