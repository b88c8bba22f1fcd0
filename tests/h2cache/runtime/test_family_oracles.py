"""Decisions and images on other families than Flux, against code that shares nothing with the engine.

Block Cache against diffusers' own first-block cache, wherever that works; H2-Cache against a plain loop over the
blocks, on a video model with one block list (Wan) and on one with two (HunyuanVideo).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from families import family_named, family_pipe, generate
from torch import Tensor, nn

import h2cache
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig

WITH_FIRST_BLOCK_CACHE = ("flux", "qwen-image", "hunyuan-video", "cogvideox", "cogvideox-2b", "wan", "wan-i2v", "ltx")


def block_lists(transformer: nn.Module) -> list[nn.Module]:
    names = ("transformer_blocks", "single_transformer_blocks", "blocks")
    return [block for name in names for block in getattr(transformer, name, ())]


@contextmanager
def computed_blocks(transformer: nn.Module) -> Iterator[list[int]]:
    """For each call of the model, how many of its blocks really run: a linear layer inside each is watched."""
    calls: list[int] = []

    def begin(module: nn.Module, args: tuple) -> None:
        calls.append(0)

    def run(module: nn.Module, args: tuple, output: Tensor) -> None:
        calls[-1] += 1

    blocks = block_lists(transformer)
    hooks = [transformer.register_forward_pre_hook(begin)]
    for block in blocks:
        linear = next(part for name, part in block.named_modules() if name.endswith(("to_q", "to_q.base_layer")))
        hooks.append(linear.register_forward_hook(run))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def halfway(differences: list[float]) -> float:
    """A threshold that half of the measured differences are below, and none near."""
    ordered = sorted(differences)
    middle = len(ordered) // 2
    return (ordered[middle - 1] + ordered[middle]) / 2


def measured(name: str, config: h2cache.CacheConfig, stage: str) -> list[float]:
    with h2cache.apply(family_pipe(name), config) as handle:
        generate(family_named(name), family_pipe(name))
    return [row.diff for row in handle.trace if row.diff is not None and row.stage == stage]


@pytest.mark.parametrize("name", WITH_FIRST_BLOCK_CACHE)
@pytest.mark.parametrize("method", ["block-cache"])
def test_block_cache_does_what_diffusers_first_block_cache_does(name, method):
    family, pipe = family_named(name), family_pipe(name)
    threshold = halfway(measured(name, BlockCacheConfig(threshold=-1.0), "network"))
    with h2cache.apply(pipe, BlockCacheConfig(threshold=threshold)), computed_blocks(pipe.transformer) as ours:
        image = generate(family, pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        with computed_blocks(pipe.transformer) as theirs:
            expected = generate(family, pipe)
    finally:
        pipe.transformer.disable_cache()
    assert ours == theirs
    assert len(set(ours)) == 2  # some steps hit, and some miss
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)


def pooled(change: Tensor, target: int) -> Tensor:
    stride = max(1, change.shape[1] // target)
    return F.avg_pool2d(change.float().unsqueeze(1), stride)


def rel_l1(reference: Tensor, now: Tensor) -> float:
    return ((reference - now).abs().mean() / reference.abs().mean()).item()


class PlainH2:
    """H2-Cache as the paper writes it, for one sample: replaces the forward of each block by steps of a plain loop.

    Every block of the model is called through `block(index, args)`; streams are lists, image tokens first.
    """

    def __init__(self, blocks: list[nn.Module], structure: int, tau1: float, tau2: float, pool1: int, pool2: int):
        self.forwards = [block.forward for block in blocks]
        self.first = (0, structure)  # the first block of each stage
        self.last = (structure - 1, len(blocks) - 1)
        self.taus, self.pools = (tau1, tau2), (pool1, pool2)
        self.reference: list = [None, None]
        self.residual: list = [None, None]
        self.hit = [False, False]
        self.start: list = [None, None]
        self.decisions: list[tuple[bool, bool]] = []

    def run(self, index: int, args: tuple, kwargs: dict, read, write):
        stage = 0 if index <= self.last[0] else 1
        if index != self.first[stage]:
            output = write(read(args, kwargs)) if self.hit[stage] else self.forwards[index](*args, **kwargs)
        else:
            before = read(args, kwargs)
            output = self.forwards[index](*args, **kwargs)
            after = [each.clone() for each in self.parse(output)]
            changes = [a - b for a, b in zip(after, before, strict=True)]
            change = changes[0] if stage == 0 else torch.cat(changes[::-1], dim=1)
            probe = pooled(change, self.pools[stage])
            known = self.reference[stage] is not None
            hit = known and rel_l1(self.reference[stage], probe) < self.taus[stage]
            if stage == 1 and self.hit[0]:
                hit = True
            if not hit:
                self.reference[stage] = probe
            self.hit[stage], self.start[stage] = hit, after
            if stage == 1:
                self.decisions.append((self.hit[0], self.hit[1]))
        if index == self.last[stage]:
            if self.hit[stage]:
                pairs = zip(self.start[stage], self.residual[stage], strict=True)
                return write([start + residual for start, residual in pairs])
            pairs = zip(self.parse(output), self.start[stage], strict=True)
            self.residual[stage] = [end - start for end, start in pairs]
        return output

    def parse(self, output) -> list[Tensor]:
        return [output] if isinstance(output, Tensor) else list(output)


@contextmanager
def plain_h2(transformer: nn.Module, structure: int, **settings) -> Iterator[PlainH2]:
    blocks = block_lists(transformer)
    plain = PlainH2(blocks, structure, **settings)
    two = hasattr(transformer, "single_transformer_blocks")

    def read(args: tuple, kwargs: dict) -> list[Tensor]:
        return list(args[: 2 if two else 1])

    def write(streams: list[Tensor]):
        return tuple(streams) if two else streams[0]

    for index, block in enumerate(blocks):
        block.forward = lambda *args, _index=index, **kwargs: plain.run(_index, args, kwargs, read, write)
    try:
        yield plain
    finally:
        for block in blocks:
            del block.forward


@pytest.mark.parametrize(("name", "structure"), [("wan", 1), ("hunyuan-video", 2)])
@pytest.mark.parametrize("pool", [(2048, 384), (8, 5)], ids=["not-pooled", "pooled"])
@pytest.mark.parametrize("method", ["h2"])
def test_h2_cache_does_what_a_plain_loop_does(name, structure, pool, method):
    family, pipe = family_named(name), family_pipe(name)
    pools = dict(pool1=pool[0], pool2=pool[1])
    never = H2CacheConfig(tau1=-1.0, tau2=-1.0, **pools)
    taus = dict(
        tau1=halfway(measured(name, never, "structure")),
        tau2=halfway(measured(name, H2CacheConfig(tau1=-1.0, tau2=-1.0, **pools), "detail")),
    )
    with h2cache.apply(pipe, H2CacheConfig(**taus, **pools)) as handle:
        image = generate(family, pipe)
    skipped = {(row.step, row.stage): row.decision.skips for row in handle.trace}
    steps = sorted({step for step, _ in skipped})
    ours = [(skipped[step, "structure"], skipped[step, "detail"]) for step in steps]
    with plain_h2(pipe.transformer, structure, **taus, **pools) as plain:
        expected = generate(family, pipe)
    assert ours == plain.decisions
    assert len(set(ours)) > 1
    torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)
