"""Caches of other libraries: each skips, draws nearly the same, and leaves the model as it was."""

import sys
from functools import cache

import numpy as np
import pytest
from diffusers import FluxPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from repository import REPOSITORY
from tiny import TEXT_TOKENS

import h2cache
from h2cache import H2CacheConfig
from h2cache.eval.errors import NotInstalled, UserError
from h2cache.eval.generation.backends import PeerCache, applied, backend_of, diffusers_cache, fields_of, own_copy
from h2cache.eval.generation.generate import generate
from h2cache.eval.generation.work import WorkCounter

STEPS = 10
CALL = dict(height=64, width=64, num_inference_steps=STEPS, guidance_scale=3.5, max_sequence_length=TEXT_TOKENS)
# Settings at which each skips on a model of random weights, within ten steps.
PEERS = {
    "FirstBlockCache": ("diffusers_first_block_cache", {"threshold": 0.3}),
    "TaylorSeer, lite": ("diffusers_taylorseer", {}),
    "TaylorSeer, modules": ("diffusers_taylorseer_modules", {}),
    "MagCache": ("diffusers_magcache", {"threshold": 1.0, "num_inference_steps": STEPS, "retention_ratio": 0.1}),
    "PyramidAttentionBroadcast": ("diffusers_pab", {}),
    "FasterCache": ("diffusers_fastercache", {}),
    "DBCache": ("cache_dit_dbcache", {"residual_diff_threshold": 0.4, "max_warmup_steps": 2}),
    "DBCache + TaylorSeer": ("cache_dit_dbcache", {"calibrator": "TaylorSeerCalibratorConfig"}),
    "DBCache + DMD": ("cache_dit_dbcache", {"calibrator": "DMDCalibratorConfig"}),
    "DBCache + FoCa": ("cache_dit_dbcache", {"calibrator": "FoCaCalibratorConfig"}),
    "DBPrune": ("cache_dit_dbprune", {"residual_diff_threshold": 0.4, "max_warmup_steps": 2}),
}
SKIPS = {"residual_diff_threshold": 1.0, "max_warmup_steps": 3, "max_continuous_cached_steps": 3}


@cache
def peer(name: str) -> PeerCache:
    """As an experiment makes it: what configs/method has, with other values of some fields."""
    option, fields = PEERS[name]
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        written = compose("run", overrides=[f"method={option}"]).method
    return instantiate(dict(written) | (SKIPS if "calibrator" in fields else {}) | fields, _convert_="all")


def draw(pipe: FluxPipeline, method: PeerCache | H2CacheConfig | None = None) -> tuple[np.ndarray, int]:
    """The image, and the multiply-adds that it took."""
    with WorkCounter(pipe) as work:
        if method is None:
            image = generate(pipe, "a red sign", 3, **CALL).image
        else:
            with applied(pipe, method):
                image = generate(pipe, "a red sign", 3, **CALL).image
    return np.asarray(image, float), work.multiply_adds


@pytest.mark.parametrize("name", PEERS)
def test_it_skips_draws_nearly_the_same_and_leaves_nothing(tiny_pipe, name):
    if PEERS[name][0].startswith("cache_dit"):
        pytest.importorskip("cache_dit")
    pipe = own_copy(tiny_pipe)
    plain, whole = draw(pipe)
    for _ in range(2):
        cached, work = draw(pipe, peer(name))
        assert 0.1 * whole < work < 0.95 * whole
        assert 0 < np.abs(cached - plain).mean() < 40
        after, work = draw(pipe)
        assert np.array_equal(after, plain) and work == whole


def test_after_a_cache_of_diffusers_ours_decide_as_ever(tiny_pipe):
    """They work on the same pipeline, in turns."""
    pipe, ours = own_copy(tiny_pipe), H2CacheConfig(tau1=0.3, tau2=0.3)
    before, work = draw(pipe, ours)
    for name in PEERS:
        if PEERS[name][0].startswith("diffusers"):
            draw(pipe, peer(name))
            after, again = draw(pipe, ours)
            assert np.array_equal(after, before) and again == work, name


def test_a_copy_keeps_cache_dit_off_the_pipeline_that_is_ours(tiny_pipe):
    pytest.importorskip("cache_dit")
    called, plain = FluxPipeline.__call__, draw(tiny_pipe)
    with applied(own_copy(tiny_pipe), peer("DBCache + TaylorSeer")):
        assert FluxPipeline.__call__ is called
        image, work = draw(tiny_pipe)
    assert np.array_equal(image, plain[0]) and work == plain[1]


def test_a_linear_layer_whose_answer_was_forecast_costs_nothing(tiny_pipe):
    """diffusers' TaylorSeer calls `proj_out` at every step, and forecasts what it would return at most of them."""
    _, whole = draw(tiny_pipe)
    _, work = draw(own_copy(tiny_pipe), peer("TaylorSeer, modules"))
    assert work / whole == pytest.approx(0.5, abs=0.08)  # steps 0, 1, 2, 4 and 9; the norms' layers go on


def test_what_is_recorded_of_one(tiny_pipe):
    made = diffusers_cache("FasterCacheConfig", spatial_attention_timestep_skip_range=[-1, 681])
    assert made == diffusers_cache("FasterCacheConfig", spatial_attention_timestep_skip_range=(-1, 681))
    assert hash(made) == hash(diffusers_cache("FasterCacheConfig", spatial_attention_timestep_skip_range=(-1, 681)))
    assert made.identity()["method"] == "diffusers.FasterCacheConfig" and backend_of(made) == "diffusers"
    assert fields_of(made) == made.identity()["fields"] == {"spatial_attention_timestep_skip_range": (-1, 681)}
    assert (backend_of(None), fields_of(None)) == ("none", {}) and backend_of(H2CacheConfig()) == "h2cache"


def test_what_cannot_be_had_is_a_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"diffusers .* has no SlowCacheConfig"):
        diffusers_cache("SlowCacheConfig")
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    peer.cache_clear()
    with pytest.raises(Exception, match="pip install cache-dit") as error:
        peer("DBCache")
    assert isinstance(error.value.__cause__, NotInstalled)


def test_two_caches_at_once_are_refused(tiny_pipe):
    pipe = own_copy(tiny_pipe)
    with applied(pipe, peer("FirstBlockCache")), pytest.raises(RuntimeError, match="diffusers"):
        h2cache.apply(pipe, H2CacheConfig())
