"""At FLUX.1-dev's shapes, without its data: what methods hold there, and how often a forecast reads it."""

from collections import Counter

import pytest
import torch
from diffusers import FluxTransformer2DModel
from loops import denoising
from methods_under_test import METHODS
from tiny import tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import h2cache
from benchmarks.memory import IMAGE_TOKENS, TEXT_TOKENS, calls, flux1_dev, held_bytes
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig

FOLLOWED = [
    method
    for method in METHODS
    if not any(stage.probe and stage.forecast.order for stage in method.values[0].compose())
    and not any(stage.learns for stage in method.values[0].compose())
]


@pytest.mark.parametrize("config", FOLLOWED)
def test_what_is_held_without_data_is_what_is_held_with_it(config, transformer):
    most = 0
    with h2cache.apply(transformer, config) as handle:
        for _ in denoising(transformer, steps=16, height=6, width=5, text_tokens=7):
            most = max(most, handle.held_bytes())
    assert held_bytes(tiny_transformer().to("meta"), config, image=30, text=7) == most


@pytest.fixture(scope="module")
def full_size():
    return flux1_dev()


@pytest.mark.parametrize(
    ("config", "megabytes"),
    [
        (H2CacheConfig(), 57 + 13),
        (BlockCacheConfig(), 28 + 50),
        (TeaCacheConfig(), 28 + 50),
        (TaylorSeerConfig(granularity="stage"), 113),
        pytest.param(TaylorSeerConfig(first_enhance=2), 4303, marks=pytest.mark.thorough),
        pytest.param(ClusCaConfig(first_enhance=2, interval=1, iterations=1), 4304, marks=pytest.mark.thorough),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_megabytes_that_the_docstrings_name(full_size, config, megabytes):
    """And 5 MB for the sines and cosines of the positions, which `Handle.held_bytes` names."""
    assert held_bytes(full_size, config, IMAGE_TOKENS, TEXT_TOKENS) / 1e6 == pytest.approx(megabytes + 4.7, abs=1.0)


def test_a_method_that_cannot_be_followed_is_refused(full_size):
    with pytest.raises(ValueError, match="cannot be followed without data"):
        held_bytes(full_size, H2CacheConfig(forecast="taylor"), 16, 16)


class Reads(TorchDispatchMode):
    """Counts, for given tensors, the operations that take them as an input."""

    def __init__(self, tensors: list[torch.Tensor]):
        super().__init__()
        self.watched = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor):
                self.counts.update(key for key in self.watched if self.watched[key] is leaf.untyped_storage())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("method", [TaylorSeerConfig, HiCacheConfig])
def test_a_forecast_reads_each_cached_tensor_once(method, order):
    """One pass over what is held, whatever the order: one multi-tensor operation for each term of each stage."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    steps = calls(transformer.to(torch.bfloat16), IMAGE_TOKENS, TEXT_TOKENS)
    with h2cache.apply(transformer, method(interval=2, order=order, granularity="stage")) as handle:
        for _ in range(5):  # 0, 1, 2 and 4 are computed
            next(steps)
        (run,) = handle._engines[0].runs._by_name.values()
        held = [tensor for memory in run.contexts[0].memories() for tensor in memory.tensors()]
        assert len(held) == 2 * 2 * (order + 1)
        with Reads(held) as reads:
            next(steps)
    assert sorted(reads.counts.values()) == [1] * len(held)
