"""Block Cache is diffusers' First-Block Cache: the same decisions and the same images, and its own rule in numbers."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline
from loops import denoise, executions, halfway

import h2cache
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig

LATENTS = dict(output_type="latent")


def call(pipe: FluxPipeline, **changes):
    """Latents of one pipeline call, seeded."""
    arguments = dict(prompt="a stop sign", height=64, width=64, num_inference_steps=20, max_sequence_length=24)
    return pipe(**arguments | changes, generator=torch.Generator().manual_seed(0), **LATENTS).images


def with_diffusers(pipe: FluxPipeline, threshold: float, **changes):
    """Latents and block executions with diffusers' own hook, on a copy: it leaves attributes behind when disabled."""
    oracle = copy.copy(pipe)
    oracle.transformer = copy.deepcopy(pipe.transformer)
    oracle.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    with executions(oracle.transformer) as calls:
        return call(oracle, **changes), calls


def with_h2cache(pipe: FluxPipeline, threshold: float, **changes):
    with h2cache.apply(pipe, BlockCacheConfig(threshold=threshold)), executions(pipe.transformer) as calls:
        return call(pipe, **changes), calls


def hits(calls: list[list[int]]) -> list[bool]:
    """Per call of the model, whether everything behind the first block was skipped."""
    for blocks in calls:
        assert blocks[0] == 1
        assert set(blocks[1:]) in ({0}, {1}), "either all of the others or none"
    return [blocks[1] == 0 for blocks in calls]


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.3, 0.5, 1.0])
def test_decides_and_draws_as_diffusers_does(tiny_pipe, threshold):
    expected, oracle = with_diffusers(tiny_pipe, threshold)
    latents, ours = with_h2cache(tiny_pipe, threshold)
    assert hits(ours) == hits(oracle)
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)


def test_the_thresholds_above_mix_hits_and_misses(tiny_pipe):
    """Agreement at a threshold that never or always hits would show little."""
    patterns = [hits(with_diffusers(tiny_pipe, threshold)[1]) for threshold in (0.1, 0.2, 0.3, 0.5, 1.0)]
    assert len({tuple(pattern) for pattern in patterns}) == len(patterns)
    assert all(not pattern[0] for pattern in patterns)
    assert sum(any(pattern) and not all(pattern[1:]) for pattern in patterns) >= 3


def test_decides_and_draws_as_diffusers_does_on_flux_mini(flux_mini):
    run = dict(height=128, width=128, num_inference_steps=16, max_sequence_length=32)
    with h2cache.apply(flux_mini, BlockCacheConfig(threshold=-1)) as handle:
        call(flux_mini, **run)
    threshold = halfway(row.diff for row in handle.trace)
    expected, oracle = with_diffusers(flux_mini, threshold, **run)
    latents, ours = with_h2cache(flux_mini, threshold, **run)
    assert hits(ours) == hits(oracle)
    assert 0 < sum(hits(ours)) < 15
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_a_second_image_begins_afresh_as_with_diffusers(tiny_pipe):
    with h2cache.apply(tiny_pipe, BlockCacheConfig(threshold=0.3)) as handle:
        first = call(tiny_pipe)
        second = call(tiny_pipe)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    by_run = [[(row.step, row.decision) for row in handle.trace if row.run == run] for run in (0, 1)]
    assert by_run[0] == by_run[1]


def test_below_the_threshold_is_strictly_below(transformer):
    """A threshold equal to the measured difference does not hit; the next larger number does. (diffusers hits on
    equality, too: the one difference between the two, and it needs a float to be met exactly.)"""

    def second_step(threshold):
        with h2cache.apply(transformer, BlockCacheConfig(threshold=threshold)) as handle:
            denoise(transformer, steps=2)
        return list(handle.trace)[1]

    measured = second_step(-1.0).diff
    assert second_step(measured).decision == "compute"
    assert second_step(measured * (1 + 1e-12)).decision == "hit"


def test_a_hit_gives_both_streams_the_residual_of_everything_after_the_first_block(transformer):
    """Seen from inside: what enters norm_out on a hit is the first block's output plus the last computed residual."""
    seen = {"first": [], "head": []}
    first = transformer.transformer_blocks[0]
    watch = [
        first.register_forward_hook(lambda module, args, output: seen["first"].append(output[1])),
        transformer.norm_out.register_forward_pre_hook(lambda module, args: seen["head"].append(args[0])),
    ]
    with h2cache.apply(transformer, BlockCacheConfig(threshold=float("inf"))):
        denoise(transformer, steps=3)
    for hook in watch:
        hook.remove()
    residual = seen["head"][0] - seen["first"][0]
    for step in (1, 2):
        torch.testing.assert_close(seen["head"][step], seen["first"][step] + residual, rtol=1e-6, atol=1e-6)


def test_the_probe_is_not_pooled(transformer):
    """It equals the metric of an H2-Cache structure stage without pooling, and differs from one with it."""

    def second_diff(config):
        with h2cache.apply(transformer, config) as handle:
            denoise(transformer, steps=2)
        return next(row.diff for row in handle.trace if row.step == 1 and row.stage in ("network", "structure"))

    plain = second_diff(BlockCacheConfig(threshold=-1))
    assert plain == second_diff(H2CacheConfig(tau1=-1, pool1=None))
    assert plain != pytest.approx(second_diff(H2CacheConfig(tau1=-1, pool1=4)), rel=1e-3)


def test_one_stage_spans_both_kinds_of_blocks(transformer):
    with h2cache.apply(transformer, BlockCacheConfig(threshold=float("inf"))) as handle:
        with executions(transformer) as calls:
            denoise(transformer, steps=2)
    assert calls == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert [(row.stage, row.blocks_computed) for row in handle.trace] == [("network", 5), ("network", 1)]
