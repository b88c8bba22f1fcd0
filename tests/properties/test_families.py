"""What must hold for every method on every family of transformers.

The pipelines are tiny and random, of the real classes (tests/families). Thresholds are measured for each family, so
that about half of the steps hit.
"""

from contextlib import contextmanager
from functools import cache
from statistics import median

import pytest
import torch
from families import FAMILIES, family_named, family_pipe, generate

import h2cache
from h2cache import CacheConfig, H2CacheConfig
from h2cache.adapters import transformers_of
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig

NEVER = {
    "h2": H2CacheConfig(tau1=-1.0, tau2=-1.0),
    "block-cache": BlockCacheConfig(threshold=-1.0),
    "teacache": TeaCacheConfig(threshold=-1.0, coefficients=(1.0, 0.0)),
    "taylorseer-stage": TaylorSeerConfig(interval=1, granularity="stage"),
    "taylorseer": TaylorSeerConfig(interval=1, first_enhance=1),
    "hicache": HiCacheConfig(interval=1, sigma="auto", first_enhance=1),
    "clusca": ClusCaConfig(interval=1, clusters=3, first_enhance=1),
}
NO_IMAGE_MLP = ("z-image", "sana", "cogvideox", "cogvideox-2b")  # ClusCa is refused there


@cache
def uncached(name: str, guided: bool = False, steps: int | None = None) -> torch.Tensor:
    return generate(family_named(name), family_pipe(name), guided=guided, steps=steps)


@cache
def without_hits(name: str, method: str) -> tuple[torch.Tensor, h2cache.Handle]:
    """The image of a run in which the method never hits, and the handle that recorded it."""
    with h2cache.apply(family_pipe(name), NEVER[method]) as handle:
        return generate(family_named(name), family_pipe(name)), handle


def typical_difference(name: str, method: str) -> float:
    """The median of what the method measures between neighbouring steps, where nothing hits."""
    return median(row.diff for row in without_hits(name, method)[1].trace if row.diff is not None)


def hitting(name: str, method: str) -> CacheConfig:
    """The method at a setting that hits and misses on this family."""
    if method == "h2":
        tau = 1.5 * typical_difference(name, method)
        return H2CacheConfig(tau1=tau, tau2=tau)
    if method == "block-cache":
        return BlockCacheConfig(threshold=1.5 * typical_difference(name, method))
    if method == "teacache":  # its differences are sums since the last computed step, of one term where nothing hits
        return TeaCacheConfig(threshold=1.5 * typical_difference(name, method), coefficients=(1.0, 0.0))
    return NEVER[method].updated(interval=3)


@contextmanager
def cached(name: str, config: CacheConfig):
    """The family's pipeline with a cache, and the cache's handle."""
    with h2cache.apply(family_pipe(name), config) as handle:
        yield family_pipe(name), handle


def skips(handle: h2cache.Handle) -> int:
    return sum(row.decision.skips for row in handle.trace)


def decisions(handle: h2cache.Handle, run: int) -> list[tuple]:
    return [(row.context, row.step, row.sample, row.stage, row.decision) for row in handle.trace if row.run == run]


every_family = pytest.mark.parametrize("name", [family.name for family in FAMILIES])
guided_families = pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.guided_calls])
every_method = pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(family.name, method, id=f"{family.name}-{method}")
        for family in FAMILIES
        for method in NEVER
        if not (method == "clusca" and family.name in NO_IMAGE_MLP)
    ],
)
with_h2 = pytest.mark.parametrize("method", ["h2"])
with_clusters = pytest.mark.parametrize("method", ["clusca"])
some_methods = pytest.mark.parametrize("method", ["h2", "teacache", "taylorseer"])


@every_method
def test_what_never_hits_gives_the_same_bits(name, method):
    image, handle = without_hits(name, method)
    assert torch.equal(image, uncached(name))
    assert not skips(handle)
    assert handle.summary()["computed_fraction"] == 1


@every_method
def test_what_hits_computes_less_and_differs(name, method):
    """And when it is removed it leaves no memory, no attribute and no other image behind."""
    family, config, inputs = family_named(name), hitting(name, method), family_named(name).inputs([0], False)
    plain, before = uncached(name), attributes(name)  # in this order: a model's first run may note something on it
    with cached(name, config) as (pipe, handle):
        image = generate(family, pipe, inputs=inputs)
        del inputs
        assert handle.held_bytes() == 0
    assert 0 < skips(handle) < len(handle.trace)
    assert image.isfinite().all()
    assert not torch.equal(image, plain)
    assert attributes(name) == before
    assert torch.equal(generate(family, family_pipe(name), steps=3), uncached(name, steps=3))


def attributes(name: str) -> list[list[str]]:
    """The names of what each module of the family's transformers has."""
    return [list(vars(module)) for part in transformers_of(family_pipe(name)) for module in part.modules()]


@pytest.mark.parametrize("name", NO_IMAGE_MLP)
@with_clusters
def test_clusters_are_refused_where_no_mlp_is_the_image_s_alone(name, method):
    with pytest.raises(ValueError, match=r"ClusCa.*use TaylorSeerConfig or HiCacheConfig"):
        h2cache.apply(family_pipe(name), NEVER[method])


@every_family
@with_h2
def test_images_of_a_batch_are_decided_as_if_alone(name, method):
    family = family_named(name)
    with cached(name, hitting(name, method)) as (pipe, handle):
        batch = generate(family, pipe, seeds=(0, 1, 2))
        together = list(handle.trace)
        for sample in range(3):
            handle.trace.clear()
            alone = generate(family, pipe, seeds=(sample,))
            own = [(r.step, r.stage, r.decision) for r in handle.trace if r.sample == 0]
            assert own == [(r.step, r.stage, r.decision) for r in together if r.sample == sample]
            torch.testing.assert_close(batch[sample : sample + 1], alone, rtol=1e-3, atol=1e-3)


@guided_families
@with_h2
def test_guidance_without_hits_gives_the_same_bits(name, method):
    with cached(name, NEVER[method]) as (pipe, handle):
        assert torch.equal(generate(family_named(name), pipe, guided=True), uncached(name, guided=True))
    contexts = {row.context for row in handle.trace}
    samples = {row.sample for row in handle.trace}
    assert len(contexts) * len(samples) == 2


@guided_families
@some_methods
def test_a_guided_image_is_the_same_after_another_one(name, method):
    family = family_named(name)
    with cached(name, hitting(name, method)) as (pipe, handle):
        alone = generate(family, pipe, guided=True)
        generate(family, pipe, seeds=(5,))
        assert torch.equal(generate(family, pipe, guided=True), alone)
    assert skips(handle)


class Stop(Exception):
    """An error in the middle of a step."""


@contextmanager
def linear_calls(pipe, stop_at: int | None = None):
    """Counts the calls of linear layers in a list; raises Stop at call number `stop_at`."""
    calls = []

    def count(module, args, output):
        calls.append(None)
        if len(calls) == stop_at:
            raise Stop

    linears = [part for each in transformers_of(pipe) for part in each.modules() if isinstance(part, torch.nn.Linear)]
    hooks = [linear.register_forward_hook(count) for linear in linears]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@every_family
@some_methods
def test_an_interrupted_run_leaves_nothing_behind(name, method):
    """The very same embeddings make the same image again, by the same decisions, also after a run that failed."""
    family = family_named(name)
    inputs = family.inputs([0], False)
    with cached(name, hitting(name, method)) as (pipe, handle):
        with linear_calls(pipe) as calls:
            first = generate(family, pipe, inputs=inputs)
        assert torch.equal(generate(family, pipe, inputs=inputs), first)
        each = len(transformers_of(pipe))  # each transformer of a pipeline has runs of its own
        assert handle.summary()["runs"] == 2 * each
        assert all(decisions(handle, run) == decisions(handle, run + each) for run in range(each))
        with linear_calls(pipe, stop_at=int(0.6 * len(calls))), pytest.raises(Stop):
            generate(family, pipe, inputs=inputs)
        assert torch.equal(generate(family, pipe, inputs=inputs), first)
