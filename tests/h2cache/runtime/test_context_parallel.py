"""Several processes that share the tokens of one model decide alike, and as one process with all tokens would.

The processes run diffusers' own context parallelism over gloo; tests/support/ranks.py says what is stood in for. A hang
ends after `ranks.LIMIT` seconds, as a failure.
"""

import math

import pytest
import ranks
import torch
from thorough import product

from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig

ULYSSES, RING, ULYSSES_ANY, RING_ANY = (
    dict(ulysses=2),
    dict(ring=2),
    dict(ulysses=2, anything=True),
    dict(ring=2, anything=True),
)
FOUR_IN_A_RING, TWO_BY_TWO, FOUR_ANY = dict(ring=4), dict(ring=2, ulysses=2), dict(ring=4, anything=True)

EVEN = dict(text_tokens=8)  # and 4 x 4 image tokens
ODD = dict(text_tokens=7, height=3, width=5)

POOLED = H2CacheConfig(tau1=0.3, tau2=0.35, pool1=4, pool2=6)
TEACACHE = TeaCacheConfig(threshold=0.4, coefficients=(1.0, 0.0))
LEARNING = HiCacheConfig(interval=3, granularity="stage", sigma="auto")
METHODS = [
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35), id="h2"),
    pytest.param(POOLED, id="h2-pooled"),
    pytest.param(H2CacheConfig(tau1=0.3, tau2=0.35, forecast="taylor", hierarchical=False), id="h2-taylor-flat"),
    pytest.param(BlockCacheConfig(threshold=0.3), id="block-cache"),
    pytest.param(TEACACHE, id="teacache"),
    pytest.param(TaylorSeerConfig(interval=3), id="taylorseer"),
    pytest.param(HiCacheConfig(interval=3, sigma="auto"), id="hicache-auto"),
    pytest.param(LEARNING, id="hicache-auto-stage"),
]


@pytest.fixture(scope="module")
def two():
    started = ranks.Ranks(2)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def four():
    started = ranks.Ranks(4)
    yield started
    started.stop()


def assert_as_one(outcomes: list[ranks.Outcome], alone: ranks.Outcome) -> None:
    """All ranks decided the same on the same numbers, as the process alone did, and made its image."""
    for outcome in outcomes:
        assert outcome.differences == outcomes[0].differences  # bit for bit, so that no threshold tells them apart
        assert outcome.decisions == alone.decisions
        assert outcome.differences == pytest.approx(alone.differences, rel=1e-5)
        torch.testing.assert_close(outcome.latents, alone.latents, rtol=1e-4, atol=1e-5)


TWO_RANKS = [pytest.param(ULYSSES, EVEN, id="ulysses"), pytest.param(RING_ANY, ODD, id="ring-anything")]
FOUR_RANKS = [
    pytest.param(FOUR_IN_A_RING, EVEN, id="ring"),
    pytest.param(TWO_BY_TWO, EVEN, id="two-by-two"),
    pytest.param(FOUR_ANY, ODD, id="anything"),
]
SOME_METHODS = [method for method in METHODS if method.id in ("h2-pooled", "teacache", "hicache-auto-stage")]
MODELS = [
    pytest.param("wan", ULYSSES, id="wan"),
    pytest.param("wan-ti2v", RING, id="wan-ti2v"),
    pytest.param("qwen-image", RING_ANY, id="qwen-image"),
    pytest.param("flux2", ULYSSES_ANY, id="flux2"),
]


@product("config, shared, tokens", METHODS, TWO_RANKS, kept=lambda method, ranks: ranks == "ring-anything")
def test_two_ranks_decide_as_one_process(config, shared, tokens, two):
    alone = ranks.flux(config, **tokens)
    assert 0 < alone.hits < len(alone.decisions)
    assert_as_one(two(ranks.flux, config, shared, **tokens), alone)


@product(
    "config, shared, tokens",
    SOME_METHODS,
    FOUR_RANKS,
    kept=lambda *ids: ids in (("h2-pooled", "anything"), ("teacache", "two-by-two"), ("hicache-auto-stage", "ring")),
)
def test_four_ranks_decide_as_one_process(config, shared, tokens, four):
    assert_as_one(four(ranks.flux, config, shared, **tokens), ranks.flux(config, **tokens))


@product("config, name, shared", SOME_METHODS, MODELS, kept=lambda method, name: method == "h2-pooled" or name == "wan")
def test_models_that_split_their_tokens_elsewhere(name, shared, config, two):
    """Wan and Qwen-Image split at the first block, FLUX.2 joins the text of a rank to its image."""
    alone = ranks.family(name, config, guided=name == "wan")
    assert 0 < alone.hits < len(alone.decisions)
    assert_as_one(two(ranks.family, name, config, shared, guided=name == "wan"), alone)


def test_each_image_of_a_batch_has_its_own_decisions(two):
    alone = ranks.flux(POOLED, batch=3, **EVEN)
    of_images = [[row[:2] + row[3:] for row in alone.decisions if row[2] == image] for image in range(3)]
    assert of_images[0] != of_images[1]
    assert_as_one(two(ranks.flux, POOLED, ULYSSES, batch=3, **EVEN), alone)


def test_parallelism_may_come_after_the_cache(two):
    assert_as_one(two(ranks.flux, POOLED, RING, late=True, **EVEN), ranks.flux(POOLED, **EVEN))


def test_ranks_at_a_threshold_go_the_same_way(two):
    """A threshold at the very number that they measured, and one that is the next larger float."""
    (never, _) = two(ranks.flux, BlockCacheConfig(threshold=-1), ULYSSES_ANY, **ODD)
    step, edge = min(never.differences.items(), key=lambda item: item[1])
    for threshold, expected in ((edge, "compute"), (math.nextafter(edge, math.inf), "hit")):
        first, second = two(ranks.flux, BlockCacheConfig(threshold=threshold), ULYSSES_ANY, **ODD)
        assert first.decisions == second.decisions
        assert first.decisions[step][-1] == expected


@pytest.mark.parametrize("call", [0, 5], ids=["unmeasured", "measured"])
def test_nan_on_one_rank_computes_on_all(call, two):
    """TeaCache's probe is the first norm: its call 0 is never compared; call 5 is that of step 3 or 4, which is."""
    alone = ranks.flux(TEACACHE, poisoned=call, **EVEN)
    assert alone.decisions != ranks.flux(TEACACHE, **EVEN).decisions
    first, second = two(ranks.flux, TEACACHE, ULYSSES, poisoned=call, **EVEN)
    assert first.decisions == second.decisions == alone.decisions


@pytest.mark.parametrize("target", [None, 2, 3, 5, 11], ids="pool-{}".format)
@pytest.mark.parametrize("lengths", [(12,), (8, 24), (7, 15), (5, 13)], ids=str)
def test_pooled_windows_are_those_of_the_whole_sequence(lengths, target, two, four):
    channels = 3 if len(lengths) == 1 else 32  # fewer than the tokens of a window, or more
    alone = ranks.observed(lengths, channels, target, shared=False)
    for sharing in (two, four):
        shared = sharing(ranks.observed, lengths, channels, target, shared=True)
        assert shared == [shared[0]] * len(shared)
        assert shared[0] == pytest.approx(alone, rel=1e-5)


def test_what_needs_no_measurement_needs_no_collective(two):
    assert two(ranks.communication, TaylorSeerConfig(interval=3), ULYSSES) == [[], []]


def test_a_measurement_takes_one_collective_of_few_numbers(two):
    numbers, _ = two(ranks.communication, BlockCacheConfig(threshold=-1), ULYSSES)
    assert len(numbers) == 7  # eight steps, of which the first compares nothing
    assert max(numbers) <= 3  # whether a probe was finite, and the two sums


def test_clusters_are_refused_on_every_rank(two):
    with pytest.raises(RuntimeError, match=r"ClusCa .* use TaylorSeerConfig or HiCacheConfig"):
        two(ranks.flux, ClusCaConfig(interval=3, clusters=3), ULYSSES, **EVEN)
