"""TeaCache on a model that its polynomial was not fitted for, or without a probe: one sentence, nothing changes."""

from collections.abc import Sequence

import pytest
from families import FAMILIES
from families.base import Family, family_pipe
from nunchakus import flux, nunchaku, standin  # noqa: F401 (a fixture)
from torch import nn

import h2cache
from h2cache import H2CacheConfig
from h2cache.adapters import BUILT_IN, Adapter, adapter_of, transformers_of
from h2cache.adapters.base import BlockList, Role
from h2cache.adapters.flux import FluxAdapter
from h2cache.adapters.nunchaku import NunchakuFluxV1, NunchakuFluxV2
from h2cache.baselines import BlockCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.runtime.interception import interception_of

FITTED = TeaCacheConfig(threshold=0.1, coefficients=(2.0, 0.0))
OF_FLUX = (FluxAdapter, NunchakuFluxV1, NunchakuFluxV2)
OTHERS = [family for family in FAMILIES if family.name != "flux"]
OTHER = OTHERS[0].name

every_other_family = pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)


class Unwatched(FluxAdapter):
    """An adapter that does not say what the timestep modulates."""

    family = "Unwatched"
    modulated = None


def refusal(adapter: Adapter, config: h2cache.CacheConfig = TeaCacheConfig()) -> str:  # noqa: B008 (immutable)
    with pytest.raises(ValueError) as caught:
        adapter.check(config.compose())
    return str(caught.value)


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and ". " not in message and not message.endswith(".")


@every_other_family
def test_the_polynomial_of_flux_is_refused_by_other_families(family: Family):
    pipe = family_pipe(family.name)
    with pytest.raises(ValueError) as caught:
        h2cache.apply(pipe, TeaCacheConfig())
    message = str(caught.value)
    assert is_one_sentence(message)
    assert "`python -m tools.fit_teacache`" in message, "what to do"
    assert "H2CacheConfig or BlockCacheConfig" in message, "what else works"
    assert f"not for {adapter_of(pipe.transformer).family}:" in message
    assert all(interception_of(transformer) is None for transformer in transformers_of(pipe))


@every_other_family
@pytest.mark.parametrize(
    "config", [FITTED, H2CacheConfig(), BlockCacheConfig()], ids=lambda config: type(config).__name__
)
def test_what_the_refusal_names_is_accepted(family: Family, config: h2cache.CacheConfig):
    with h2cache.apply(family_pipe(family.name), config) as handle:
        assert handle.config == config


@pytest.mark.parametrize("adapter", BUILT_IN, ids=lambda adapter: adapter.__name__)
def test_flux_and_what_quantizes_it_take_the_polynomial_of_flux_and_nobody_else(adapter: type[Adapter]):
    if adapter in OF_FLUX:
        adapter().check(TeaCacheConfig().compose())
    else:
        assert "fitted for FLUX.1, not for" in refusal(adapter())


@pytest.mark.parametrize("generation", ["v1", "v2"])
def test_nunchaku_s_flux_takes_the_polynomial_of_flux(nunchaku, generation: str):  # noqa: F811
    with h2cache.apply(standin(nunchaku, generation, flux()).transformer, TeaCacheConfig()) as handle:
        assert handle.config == TeaCacheConfig()


@pytest.mark.parametrize("adapter", BUILT_IN, ids=lambda adapter: adapter.__name__)
def test_every_family_takes_a_polynomial_of_its_own(adapter: type[Adapter]):
    adapter().check(FITTED.compose())


def test_another_threshold_does_not_make_it_another_polynomial(transformer: nn.Module):
    pipe = family_pipe(OTHER)
    with pytest.raises(ValueError, match="fit others with"):
        h2cache.apply(pipe, TeaCacheConfig(threshold=0.9, num_steps=6, batch_decision="mean"))
    h2cache.apply(transformer, TeaCacheConfig(threshold=0.9)).remove()


def test_an_update_to_the_polynomial_of_flux_is_refused_and_changes_nothing():
    with h2cache.apply(family_pipe(OTHER), FITTED) as handle:
        with pytest.raises(ValueError, match="fit others with"):
            handle.update(coefficients=TeaCacheConfig().coefficients)
        assert handle.config == FITTED


@pytest.mark.parametrize("config", [TeaCacheConfig(), FITTED], ids=["default", "fitted"])
def test_without_a_probe_teacache_is_refused_whatever_its_polynomial(config: TeaCacheConfig):
    message = refusal(Unwatched(), config)
    assert is_one_sentence(message)
    assert "the adapter of Unwatched does not say what the timestep modulates" in message
    assert "use H2CacheConfig or BlockCacheConfig" in message, "what else works"
    assert "tools.fit_teacache" not in message, "another polynomial would not help"


def test_without_a_probe_every_other_method_works(transformer: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("h2cache.adapters.Registry.added", (Unwatched,))
    with pytest.raises(ValueError, match="does not say what the timestep modulates"):
        h2cache.apply(transformer, FITTED)
    for config in (H2CacheConfig(), BlockCacheConfig(), TaylorSeerConfig()):
        h2cache.apply(transformer, config).remove()


@pytest.mark.parametrize("base", [NunchakuFluxV1, NunchakuFluxV2])
def test_an_adapter_that_refuses_more_refuses_this_too(base: type[Adapter]):
    """nunchaku's adapters override `check`."""
    other = type("Other", (base,), {"family": "Other", "polynomial_family": None})()
    assert "not for Other" in refusal(other)
    assert 'granularity="stage"' in refusal(other, TaylorSeerConfig())


def test_an_adapter_from_outside_has_no_published_polynomial():
    class Outside(Adapter):
        family = "Outside"
        block_lists: Sequence[BlockList] = (BlockList("blocks", Role.ALL),)

    assert "not for Outside" in refusal(Outside())
    Outside().check(FITTED.compose())
