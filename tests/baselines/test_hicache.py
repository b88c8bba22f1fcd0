"""HiCache against code that nobody here wrote: hicache-pp, step by step through the engine, and SciPy's polynomials."""

import math
from dataclasses import dataclass

import pytest
import torch
from hicache_pp import hermite as peer
from loops import denoising
from scipy.special import eval_hermite

import h2cache
from h2cache import CacheConfig
from h2cache.baselines import HiCacheConfig, TaylorSeerConfig
from h2cache.policy.forecasts import BackcastHermite, Hermite, inner_products
from h2cache.policy.rules import Interval
from h2cache.policy.stages import NETWORK, BlockStage

SIGMAS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("x", [1, 2, 5, 9])
def test_the_basis_is_scipy_s_and_hicache_pp_s(sigma, order, x):
    ours = Hermite(order, sigma).coefficients(x)[order] * math.factorial(order)
    assert ours == pytest.approx(sigma**order * eval_hermite(order, sigma * x), rel=1e-9)
    theirs = peer.scaled_hermite(order, torch.tensor(float(x), dtype=torch.float64), sigma).item()
    assert ours == pytest.approx(theirs, rel=1e-9)


@dataclass(frozen=True)
class WholeNetwork(CacheConfig):
    """HiCache on one residual, that of the whole network, which can be seen from outside."""

    interval: int
    order: int
    sigma: float

    def compose(self) -> tuple[BlockStage, ...]:
        return (BlockStage("network", NETWORK, Interval(self.interval, 1), Hermite(self.order, self.sigma)),)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(("interval", "order"), [(3, 1), (5, 1), (4, 2), (3, 3)])
def test_forecasts_as_hicache_pp_does_step_by_step(transformer, interval, order, sigma):
    """What the blocks add at each step: computed, and fed to the peer; or forecast, as the peer forecasts it."""
    steps, seen = 16, {}
    hooks = [
        transformer.x_embedder.register_forward_hook(lambda module, args, output: seen.update(entered=output)),
        transformer.norm_out.register_forward_pre_hook(lambda module, args: seen.update(left=args[0])),
    ]
    state = peer.hicache_init(steps, interval=interval, max_order=order, first_enhance=1, sigma=sigma)
    forecasts = 0
    with h2cache.apply(transformer, WholeNetwork(interval=interval, order=order, sigma=sigma)) as handle:
        for step, _ in enumerate(denoising(transformer, steps=steps)):
            state["step"] = step
            added = seen["left"] - seen["entered"]
            skipped = next(row.decision.skips for row in handle.trace if row.step == step)
            assert (peer.hicache_decide(state) == "forecast") == skipped
            if skipped:
                forecasts += 1
                torch.testing.assert_close(added, peer.hicache_forecast(state), rtol=1e-4, atol=1e-4)
            else:
                peer.hicache_update_derivatives(state, added)
    for hook in hooks:
        hook.remove()
    assert forecasts >= steps // 2


def test_the_sign_of_the_basis():
    """At sigma = sqrt(1/2) and order 1 a line is forecast exactly; at -x it would be mirrored."""
    assert Hermite(1, math.sqrt(0.5)).coefficients(3) == pytest.approx([1.0, 3.0])


def test_taylor_is_the_scaled_basis_at_scale_one():
    scaled, *_ = HiCacheConfig(sigma=0.6, basis="taylor", order=3).compose()
    plain, *_ = TaylorSeerConfig(order=3).compose()
    for k, (a, b) in enumerate(zip(scaled.forecast.coefficients(4), plain.forecast.coefficients(4), strict=True)):
        assert a == pytest.approx(b * 0.6 ** (2 * k))


def features(value: float) -> tuple[torch.Tensor, ...]:
    return torch.full((1, 3, 2), value), torch.full((1, 2, 2), 2 * value)


def test_inner_products_take_each_list_as_one_vector():
    products = inner_products([features(1.0), features(-3.0)]).tolist()
    length = 6 * 1 + 4 * 4
    assert products == [[length, -3 * length], [-3 * length, 9 * length]]


@pytest.mark.parametrize("sigma", [0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("order", [1, 2])
def test_backcasting_finds_the_sigma_that_made_the_features(sigma, order):
    """Features that follow the Hermite forecast of some sigma: the rule finds it back, and goes half of the way from it
    to sqrt(1/2), geometrically."""
    generator = torch.Generator().manual_seed(0)
    terms = [tuple(torch.randn(1, 4, 3, generator=generator) for _ in range(2)) for _ in range(order + 1)]
    weights = Hermite(order, sigma).coefficients(4)
    computed = tuple(sum(w * term[i] for w, term in zip(weights, terms, strict=True)) for i in range(2))
    products = inner_products([computed, *terms]).tolist()
    used = BackcastHermite(order).fitted(products, 4).sigma
    assert used**2 / math.sqrt(0.5) == pytest.approx(sigma, abs=0.011)


def test_backcasting_keeps_its_start_when_nothing_is_finite():
    basis = BackcastHermite(1, 0.5)
    assert basis.fitted([[math.nan] * 3] * 3, 4) is basis


@pytest.mark.parametrize("granularity", ["stage", "module"])
def test_the_trace_names_the_sigma_of_each_forecast(transformer, granularity):
    """`auto` begins with 0.5 and goes on with what each computed step says; a fixed sigma stays; reuse has none."""
    with h2cache.apply(transformer, HiCacheConfig(interval=3, sigma="auto", granularity=granularity)) as handle:
        list(denoising(transformer, steps=12))
        trace = handle.trace.to_pandas()
        skipped = trace["decision"] == "hit"
        assert trace["sigma"].notna().equals(skipped)
        assert {0.5} < set(trace.loc[skipped, "sigma"])
        for stage, rows in trace[skipped].groupby("stage"):
            assert handle.summary()["sigma"][stage] == (rows["sigma"].min(), rows["sigma"].max())
        handle.trace.clear()
        handle.update(sigma=0.3)
        list(denoising(transformer, steps=12))
        assert set(handle.summary()["sigma"].values()) == {(0.3, 0.3)}
    with h2cache.apply(transformer, TaylorSeerConfig(interval=3, granularity=granularity)) as handle:
        list(denoising(transformer, steps=12))
        assert handle.trace.to_pandas()["sigma"].isna().all() and "sigma" not in handle.summary()


@pytest.mark.parametrize("granularity", ["stage", "module"])
def test_auto_fits_each_image_its_own_sigma(transformer, granularity):
    """A batch draws what its images draw alone, also where their sigmas differ."""
    config = HiCacheConfig(interval=3, sigma="auto", granularity=granularity)
    runs = []
    for images in ([0], [1], [0, 1]):
        with h2cache.apply(transformer, config):
            *_, latents = denoising(transformer, steps=12, batch=len(images), seed=images[0])
        runs.append(latents)
    torch.testing.assert_close(torch.cat(runs[:2]), runs[2], rtol=1e-4, atol=1e-4)
    with h2cache.apply(transformer, HiCacheConfig(interval=3, granularity=granularity)):
        *_, fixed = denoising(transformer, steps=12)
    assert not torch.equal(fixed, runs[0]), "a sigma of 0.5 throughout would have drawn this"
