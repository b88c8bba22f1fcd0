"""nunchaku's IP-Adapter on the first generation: what it adds is part of the layers, so that a cache keeps it."""
# ruff: noqa: F811 - fixtures

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attachments import assert_same_inside, inside
from methods_under_test import KINDS, never_hitting
from nunchakus import ONE_OF_EACH_SORT, STAGED, Subject, flux, nunchaku, standin  # noqa: F401
from pictures import is_mixed
from thorough import named, product
from torch import Tensor, nn

import h2cache
from h2cache import H2CacheConfig
from h2cache.baselines import BlockCacheConfig, TeaCacheConfig

every_method = pytest.mark.parametrize("config", STAGED)
kinds = pytest.mark.parametrize("config", [method for method in STAGED if method in KINDS])
Change = Callable[[int, dict[str, Any]], None]


@pytest.fixture
def v1(nunchaku) -> Subject:
    return standin(nunchaku, "v1", flux())


@pytest.fixture
def put_on(nunchaku) -> Callable[[Subject], None]:
    """Puts the adapter on a transformer, with an image."""

    def put(subject: Subject, scale: float = 1.0) -> None:
        adapters = nunchaku.models.ip_adapter.diffusers_adapters.flux
        adapters.apply_IPA_on_transformer(subject.transformer, ip_adapter_scale=scale, repo_id="any")
        subject.front.set_ip_hidden_states([picture(0)])

    return put


@pytest.fixture
def prompted(v1, put_on) -> Subject:
    put_on(v1)
    return v1


def picture(seed: int, tokens: int = 4) -> Tensor:
    """The tokens of an image, (1, T, E)."""
    return torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(seed))


def in_arguments(seed: int) -> Change:
    """Gives the image with each call, in a dictionary of the call's own, as pipelines do."""

    def add(step: int, call: dict[str, Any]) -> None:
        call["joint_attention_kwargs"] = {"ip_hidden_states": [picture(seed)]}

    return add


@product(
    "config, before",
    STAGED,
    named({"front": None, "arguments": in_arguments(1)}),
    kept=lambda method, where: where == "arguments" or method in ONE_OF_EACH_SORT,
)
def test_never_hitting_changes_no_bit(config, before, v1, put_on):
    without = v1.denoise()
    put_on(v1)
    untouched = v1.denoise(before_step=before)
    assert not torch.allclose(untouched, without, atol=0.05)
    with h2cache.apply(v1.transformer, never_hitting(config)) as handle:
        assert torch.equal(v1.denoise(before_step=before), untouched)
    assert handle.summary()["computed_fraction"] == 1


@every_method
def test_hits_keep_what_the_adapter_adds(config, v1, put_on):
    """Another image is another picture where steps hit, too, and each is closer to its own uncached one."""
    put_on(v1)
    plain = [v1.denoise(before_step=in_arguments(seed)) for seed in (1, 2)]
    with h2cache.apply(v1.transformer, config) as handle:
        cached = []
        for seed in (1, 2):
            handle.trace.clear()
            cached.append(v1.denoise(before_step=in_arguments(seed)))
            assert is_mixed(handle)
    for own in (0, 1):
        near, far = (((cached[own] - plain[other]).float().norm()) for other in (own, 1 - own))
        assert near < far / 2


def test_a_hit_on_an_input_that_stays_is_what_would_be_computed(prompted):
    """Residuals of the step before are then those of this step: the adapter's part is neither lost nor added twice."""
    outputs, given = [], []

    def repeat(step: int, call: dict[str, Any]) -> None:
        given.append(call["hidden_states"])
        call.update(hidden_states=given[0].clone(), timestep=torch.full((1,), 0.5).bfloat16())

    hook = prompted.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    with h2cache.apply(prompted.transformer, H2CacheConfig(tau1=9, tau2=9)) as handle:
        prompted.denoise(steps=2, before_step=repeat)
    hook.remove()
    assert [row.decision.skips for row in handle.trace] == [False, False, True, True]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.02, atol=0.02)


def core_calls(subject: Subject, config: h2cache.CacheConfig, **options: Any) -> tuple[list[list[str]], Any]:
    """For every step, the double layers ("d") and single layers ("s") that the core runs, with the adapter ("+")."""
    steps: list[list[str]] = []
    names = {"forward_layer_ip_adapter": "d+", "forward_layer": "d", "forward_single_layer": "s", "forward": "all"}
    core = subject.front.m
    for name, short in names.items():
        function = getattr(core, name)
        vars(core)[name] = lambda *args, short=short, function=function: (steps[-1].append(short), function(*args))[1]
    try:
        with h2cache.apply(subject.transformer, config) as handle:
            subject.denoise(before_step=lambda step, call: steps.append([]), **options)
    finally:
        for name in names:
            del vars(core)[name]
    return steps, handle


def plain_layers(calls: list[str]) -> list[str]:
    """The stand-in runs a layer of an adapter by way of the plain one."""
    return [call for index, call in enumerate(calls) if not (call == "d" and index and calls[index - 1] == "d+")]


@pytest.mark.parametrize(
    "config",
    [BlockCacheConfig(threshold=0.3), TeaCacheConfig(threshold=0.4, coefficients=(1.0, 0.0))],
    ids=["block-cache", "teacache"],
)
def test_one_stage_is_computed_layer_by_layer(config, prompted):
    """The core's call for all layers behind the first knows no adapter."""
    steps, handle = core_calls(prompted, config)
    assert is_mixed(handle)
    every, hit = ["d+", "d+", "s", "s", "s"], ["d+"] if isinstance(config, BlockCacheConfig) else []
    assert [plain_layers(step) for step in steps] == [hit if row.decision.skips else every for row in handle.trace]


# --- beside others --------------------------------------------------------------------------------------------------


def test_the_image_is_taken_out_of_the_caller_s_dictionary_as_without_a_cache(prompted):
    given: list[dict[str, Any]] = []

    def add(step: int, call: dict[str, Any]) -> None:
        given.append({"ip_hidden_states": [picture(1)]})
        call["joint_attention_kwargs"] = given[-1]

    with h2cache.apply(prompted.transformer, H2CacheConfig(tau1=9, tau2=9)):
        prompted.denoise(steps=3, before_step=add)
    assert given == [{}, {}, {}]


def with_samples(double: bool, single: bool) -> Change:
    def add(step: int, call: dict[str, Any]) -> None:
        sample = [torch.full((1, 16, 32), 0.1, dtype=torch.bfloat16)]
        call["controlnet_block_samples"] = sample if double else None
        call["controlnet_single_block_samples"] = sample if single else None

    return add


@pytest.mark.parametrize("samples", [(True, True), (True, False), (False, True)])
def test_with_controlnet_it_is_computed_by_nunchaku_itself(samples, prompted):
    """It adds the sample between the layer and the adapter's part, and leaves out those of single layers."""
    options = dict(before_step=with_samples(*samples))
    untouched = prompted.denoise(**options)
    with h2cache.apply(prompted.transformer, H2CacheConfig(tau1=9, tau2=9)) as handle:
        assert torch.equal(prompted.denoise(**options), untouched)
    assert len(handle.trace) == 0


def test_it_ignores_an_identity_as_without_a_cache(prompted):
    def add(step: int, call: dict[str, Any]) -> None:
        call.update(id_embeddings=torch.ones(1, 4, 32, dtype=torch.bfloat16), id_weight=0.7)

    untouched = prompted.denoise(steps=3, before_step=add)
    with h2cache.apply(prompted.transformer, H2CacheConfig(tau1=-1, tau2=-1)) as handle:
        assert torch.equal(prompted.denoise(steps=3, before_step=add), untouched)
    assert len(handle.trace) == 6


@pytest.mark.parametrize("fault", ["batch", "no-image"])
def test_what_nunchaku_refuses_it_refuses_under_a_cache(fault, prompted):
    """A batch, whose queries it reads as one image's, and a call without an image."""
    if fault == "no-image":
        prompted.front.set_ip_hidden_states(None)
    messages = []
    for cache in (nullcontext(), h2cache.apply(prompted.transformer, H2CacheConfig(tau1=9, tau2=9))):
        with cache, pytest.raises((RuntimeError, UnboundLocalError)) as caught:
            prompted.denoise(batch=2 if fault == "batch" else 1)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# --- coming and going -----------------------------------------------------------------------------------------------


@kinds
def test_it_may_be_put_on_and_taken_off_under_the_cache(config, v1, put_on, nunchaku):
    """The next run is that of a cache put on a transformer with the same."""
    other = standin(nunchaku, "v1", flux())
    own_forward, own_blocks = v1.transformer.forward, v1.transformer.transformer_blocks
    with h2cache.apply(v1.transformer, config) as handle:
        without = v1.denoise()
        put_on(v1), put_on(other)
        image = v1.denoise()
        assert is_mixed(handle)
        with h2cache.apply(other.transformer, config):
            assert torch.equal(other.denoise(), image)
        v1.transformer.forward, v1.transformer.transformer_blocks = own_forward, own_blocks
        assert torch.equal(v1.denoise(), without)
    assert not torch.equal(image, without)


def test_removal_leaves_the_model_as_it_was(prompted):
    before = inside(prompted.transformer)
    with h2cache.apply(prompted.transformer, H2CacheConfig()):
        prompted.denoise(steps=3)
    assert_same_inside(prompted.transformer, before)


def test_a_subclass_of_what_is_known_is_refused(prompted):
    """What else it does would be left out. It may be nunchaku's own, and has `m`; or only be called like one."""
    kind = type(prompted.front)
    prompted.front.__class__ = type("Other", (kind,), {"__module__": kind.__module__})
    with pytest.raises(TypeError, match="not nunchaku's own"):
        h2cache.apply(prompted.transformer, H2CacheConfig())
    prompted.transformer.transformer_blocks = nn.ModuleList([type("IPA_TransformerBlocks", (nn.Identity,), {})()])
    with pytest.raises(TypeError, match="not nunchaku's own"):
        h2cache.apply(prompted.transformer, H2CacheConfig())
