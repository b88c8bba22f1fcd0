"""nunchaku's own caches beside ours: refused in both orders, with the call that takes one off."""
# ruff: noqa: F811 - fixtures

import re
from contextlib import ExitStack
from functools import wraps
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from families.base import family_pipe
from nunchakus import CLASSES, Subject, flux, nunchaku, standin  # noqa: F401
from pictures import picture
from torch import nn

import h2cache
from h2cache import H2CacheConfig
from h2cache.runtime.interception import interception_of

NEVER = H2CacheConfig(tau1=-1, tau2=-1)


class Caches:
    """nunchaku's caches, each put on a transformer and taken off as the refusal says."""

    def __init__(self, package: ModuleType, subject: Subject):
        self.package, self.transformer, self.stack = package, subject.transformer, ExitStack()
        self.adapters = package.caching.diffusers_adapters

    def first_block(self) -> None:
        adapter = self.adapters.flux if type(self.transformer).__name__ == CLASSES["v1"] else self.adapters.flux_v2
        adapter.apply_cache_on_transformer(self.transformer, residual_diff_threshold=0.5)

    def first_block_twice(self) -> None:
        """As with other thresholds the second time."""
        self.first_block(), self.first_block()

    def first_block_that_ran(self) -> None:
        self.first_block()
        with self.package.caching.fbcache.cache_context(self.package.caching.fbcache.create_cache_context()):
            Subject(None, self.transformer).denoise(steps=2)

    def teacache(self) -> None:
        self.stack.enter_context(self.package.caching.teacache.TeaCache(self.transformer, num_steps=4))

    def below_an_ip_adapter(self) -> None:
        self.first_block()
        self._image_adapter()

    def taken_over_by_an_ip_adapter(self) -> None:
        self.first_block_that_ran()
        self._image_adapter()

    def _image_adapter(self) -> None:
        adapters = self.package.models.ip_adapter.diffusers_adapters.flux
        adapters.apply_IPA_on_transformer(self.transformer, repo_id="any")
        self.transformer.transformer_blocks[0].set_ip_hidden_states([torch.ones(1, 4, 24)])

    def below_a_hook(self) -> None:
        """As accelerate puts them on: the forward that was there is named as what is wrapped."""
        self.first_block()
        inner = self.transformer.forward
        self.transformer.forward = wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))

    def take_off(self, message: str) -> None:
        code = re.search(r"remove one, by (.*) or by handle.remove\(\)$", message)[1]
        if code == "leaving the block of `with TeaCache(...)`":
            self.stack.close()
        else:
            for statement in code.split(" and "):
                exec(statement, {"transformer": self.transformer})


ON_BOTH = ["first_block", "first_block_twice", "first_block_that_ran", "teacache", "below_a_hook"]
ON_V1 = ["below_an_ip_adapter", "taken_over_by_an_ip_adapter"]
every_cache = pytest.mark.parametrize(
    ("generation", "name"), [(g, name) for g in CLASSES for name in [*ON_BOTH, *(ON_V1 if g == "v1" else [])]]
)


@every_cache
def test_ours_behind_theirs(generation, name, nunchaku):
    subject = standin(nunchaku, generation, flux())
    caches = Caches(nunchaku, subject)
    getattr(caches, name)()
    with pytest.raises(RuntimeError, match="two caches do not work together") as caught:
        h2cache.apply(subject.transformer, NEVER)
    assert interception_of(subject.transformer) is None, "nothing was put on"
    caches.take_off(str(caught.value))
    plain = subject.denoise(steps=3)
    with h2cache.apply(subject.transformer, NEVER) as handle:
        assert torch.equal(subject.denoise(steps=3), plain)
    assert len(handle.trace) == 6


@every_cache
def test_theirs_behind_ours(generation, name, nunchaku):
    """Noticed at the next call, which is one of theirs where they run."""
    subject = standin(nunchaku, generation, flux())
    caches = Caches(nunchaku, subject)
    handle = h2cache.apply(subject.transformer, NEVER)
    subject.denoise(steps=2)
    with pytest.raises(RuntimeError, match="two caches do not work together") as caught:
        getattr(caches, name)()
        subject.denoise(steps=2)
    caches.take_off(str(caught.value))
    handle.trace.clear()
    cached = subject.denoise(steps=3)
    assert len(handle.trace) == 6
    handle.remove()
    assert torch.equal(subject.denoise(steps=3), cached)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("generation", CLASSES)
def test_on_a_pipeline(generation, ours_first, nunchaku, tiny_pipe, monkeypatch):
    monkeypatch.setattr(FluxPipeline, "__call__", FluxPipeline.__call__)
    monkeypatch.setattr(FluxPipeline, "_is_cached", False, raising=False)
    monkeypatch.setattr(tiny_pipe, "transformer", standin(nunchaku, generation, flux()).transformer)
    adapters = nunchaku.caching.diffusers_adapters
    put_on = {"v1": adapters.flux, "v2": adapters.flux_v2}[generation].apply_cache_on_pipe
    if ours_first:
        h2cache.apply(tiny_pipe, NEVER)
        put_on(tiny_pipe)
        with pytest.raises(RuntimeError, match="nunchaku's own caches"):
            picture(tiny_pipe, "a sign")
    else:
        put_on(tiny_pipe)
        with pytest.raises(RuntimeError, match="nunchaku's own caches"):
            h2cache.apply(tiny_pipe, NEVER)


@pytest.mark.parametrize("generation", CLASSES)
def test_other_forwards_on_the_transformer_are_no_caches(generation, nunchaku):
    """nunchaku's PuLID pipeline, hooks and callers put some there, too."""
    subject = standin(nunchaku, generation, flux())
    plain = subject.denoise(steps=3)
    kind = type(subject.transformer)

    def of_a_caller(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    for forward in (of_a_caller, wraps(kind.forward)(of_a_caller)):
        subject.transformer.forward = MethodType(forward, subject.transformer)
        with h2cache.apply(subject.transformer, NEVER) as handle:
            assert torch.equal(subject.denoise(steps=3), plain)
        assert len(handle.trace) == 6


def test_a_cache_of_somebody_else_on_other_blocks_is_not_nunchaku_s(monkeypatch):
    """Z-Image has no `transformer_blocks` to look at."""
    transformer = family_pipe("z-image").transformer
    monkeypatch.setattr(transformer, "_is_cached", True, raising=False)
    with pytest.raises(RuntimeError, match="another library's cache"):
        h2cache.apply(transformer, NEVER)


def test_a_left_teacache_is_none(nunchaku):
    """It leaves the forward that was there on the instance."""
    subject = standin(nunchaku, "v1", flux())
    plain = subject.denoise(steps=3)
    with nunchaku.caching.teacache.TeaCache(subject.transformer, num_steps=4):
        pass
    assert "forward" in vars(subject.transformer)
    with h2cache.apply(subject.transformer, NEVER):
        assert torch.equal(subject.denoise(steps=3), plain)
