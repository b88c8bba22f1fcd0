"""nunchaku's Qwen-Image and Z-Image, which the pages of their families serve: stand-ins on any machine.

In float32, which the kernels would not have: fused projections round otherwise than diffusers' own, in bfloat16 enough
to tip a comparison that is close to its threshold.
"""
# ruff: noqa: F811 - fixtures

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import pytest
import torch
from attachments import assert_same_inside, inside, take_off
from diffusers import DiffusionPipeline
from families import FAMILIES, Family, generate
from nunchakus import nunchaku  # noqa: F401
from pictures import is_mixed
from torch import nn

import h2cache
from h2cache import CacheConfig, H2CacheConfig
from h2cache.adapters import adapter_of
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig

CLASSES = {"qwen-image": "NunchakuQwenImageTransformer2DModel", "z-image": "NunchakuZImageTransformer2DModel"}
NEVER = {
    "h2": H2CacheConfig(tau1=-1.0, tau2=-1.0),
    "block-cache": BlockCacheConfig(threshold=-1.0),
    "teacache": TeaCacheConfig(threshold=-1.0, coefficients=(1.0, 0.0)),
    "taylorseer-stage": TaylorSeerConfig(interval=1, granularity="stage"),
    "taylorseer": TaylorSeerConfig(interval=1, first_enhance=1),
    "hicache": HiCacheConfig(interval=1, sigma="auto", first_enhance=1),
    "clusca": ClusCaConfig(interval=1, clusters=3, first_enhance=1),
}
METHODS = {
    "qwen-image": list(NEVER),
    "z-image": [name for name in NEVER if name != "clusca"],  # its MLP takes image and text together
}
every_method = pytest.mark.parametrize(("name", "method"), [(name, each) for name in CLASSES for each in METHODS[name]])
both = pytest.mark.parametrize("name", CLASSES)


@dataclass
class Pair:
    """A tiny pipeline of diffusers' class, and one of nunchaku's with the same weights."""

    family: Family
    plain: DiffusionPipeline
    quantized: DiffusionPipeline

    @property
    def transformer(self) -> nn.Module:
        return self.quantized.transformer

    def generate(self, **options) -> torch.Tensor:
        return generate(self.family, self.quantized, **options)


@pytest.fixture
def pair(name: str, nunchaku) -> Iterator[Pair]:
    family = next(family for family in FAMILIES if family.name == name)
    plain, quantized = family.build(), family.build()
    quantized.transformer = getattr(nunchaku, CLASSES[name]).standing_for(plain.transformer, torch_dtype=torch.float32)
    if name == "z-image":
        take_less(quantized.transformer)
    yield Pair(family, plain, quantized)
    take_off(quantized.transformer)


def take_less(transformer: nn.Module) -> None:
    """Leave out an argument that diffusers' pipeline gives and nunchaku's class does not know."""
    forward = transformer.forward
    transformer.forward = lambda *args, joint_attention_kwargs=None, **kwargs: forward(*args, **kwargs)


def hitting(pair: Pair, method: str) -> CacheConfig:
    """The method at a setting that hits and misses, measured on diffusers' class."""
    if method not in ("h2", "block-cache", "teacache"):
        return NEVER[method].updated(interval=3)
    with h2cache.apply(pair.plain, NEVER[method]) as handle:
        generate(pair.family, pair.plain)
    threshold = 1.5 * median(row.diff for row in handle.trace if row.diff is not None)
    names = ("tau1", "tau2") if method == "h2" else ("threshold",)
    return NEVER[method].updated(**dict.fromkeys(names, threshold))


def rows(handle: h2cache.Handle) -> list[tuple]:
    return [(r.context, r.step, r.sample, r.stage, r.decision, r.blocks_computed) for r in handle.trace]


def differences(handle: h2cache.Handle) -> list[float]:
    """What the method measured."""
    return [row.diff for row in handle.trace if row.diff is not None]


@every_method
def test_never_hitting_changes_no_bit(method, pair):
    untouched = pair.generate()
    with h2cache.apply(pair.quantized, NEVER[method]) as handle:
        assert torch.equal(pair.generate(), untouched)
    assert handle.summary()["computed_fraction"] == 1
    assert torch.equal(pair.generate(), untouched)


@every_method
def test_decisions_and_images_are_those_of_diffusers(method, pair):
    config = hitting(pair, method)
    with h2cache.apply(pair.plain, config) as handle:
        expected = generate(pair.family, pair.plain)
    decided, measured = rows(handle), differences(handle)
    assert is_mixed(handle)
    with h2cache.apply(pair.quantized, config) as handle:
        image = pair.generate()
    assert rows(handle) == decided
    assert differences(handle) == pytest.approx(measured, rel=1e-3)
    torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(image, pair.generate(), atol=1e-2)


@both
def test_the_page_of_the_family_serves(name, pair):
    """And nunchaku's class is named in what is refused."""
    adapter, plain = adapter_of(pair.transformer), adapter_of(pair.plain.transformer)
    assert isinstance(adapter, type(plain)) and type(adapter) is not type(plain)
    with pytest.raises(ValueError, match=f"not for nunchaku's .*{CLASSES[name]}"):
        h2cache.apply(pair.quantized, TeaCacheConfig())


@both
@pytest.mark.parametrize("method", ["h2", "taylorseer"])
def test_removal_leaves_the_model_as_it_was(method, pair):
    untouched = pair.generate()
    before = inside(pair.transformer)
    with h2cache.apply(pair.quantized, hitting(pair, method)):
        pair.generate()
    if "rope_hook_handles" in vars(pair.transformer):  # of Z-Image, which makes an empty list at every call
        pair.transformer.rope_hook_handles = before["", "rope_hook_handles"]
    assert_same_inside(pair.transformer, before)
    assert torch.equal(pair.generate(), untouched)


@pytest.mark.parametrize("name", ["z-image"])
def test_clusters_are_refused_as_on_diffusers(pair):
    with pytest.raises(ValueError, match=r"nunchaku's Z-Image .* no MLP on image tokens alone"):
        h2cache.apply(pair.quantized, NEVER["clusca"])


# --- Qwen-Image's own -----------------------------------------------------------------------------------------------

qwen_image = pytest.mark.parametrize("name", ["qwen-image"])


@qwen_image
@pytest.mark.parametrize("method", ["h2", "teacache", "taylorseer"])
def test_guidance_on_qwen_image(method, pair):
    untouched = pair.generate(guided=True)
    with h2cache.apply(pair.quantized, NEVER[method]) as handle:
        assert torch.equal(pair.generate(guided=True), untouched)
    assert {row.context for row in handle.trace} == {"cond", "uncond"}


@qwen_image
def test_each_image_of_a_batch_is_decided_as_if_alone(pair):
    config = hitting(pair, "h2")
    with h2cache.apply(pair.quantized, config) as handle:
        batch = pair.generate(seeds=(0, 3, 6))
        together = list(handle.trace)
        for sample, seed in enumerate((0, 3, 6)):
            handle.trace.clear()
            torch.testing.assert_close(batch[sample : sample + 1], pair.generate(seeds=(seed,)), rtol=1e-3, atol=1e-3)
            own = [(row.step, row.stage, row.decision) for row in handle.trace]
            assert own == [(row.step, row.stage, row.decision) for row in together if row.sample == sample]
    assert is_mixed(handle)


@qwen_image
def test_offloaded_blocks_are_refused(pair):
    """They run as copies, which nobody sees."""
    pair.transformer.set_offload(True)
    with pytest.raises(ValueError, match=r"transformer\.set_offload\(False\)"):
        h2cache.apply(pair.quantized, NEVER["h2"])
    pair.transformer.set_offload(False)
    with h2cache.apply(pair.quantized, NEVER["h2"]) as handle:
        pair.generate()
        pair.transformer.set_offload(True)
        with pytest.raises(ValueError, match=r"transformer\.set_offload\(False\)"):
            pair.generate()
    assert len(handle.trace) == 2 * pair.family.steps


# --- batches --------------------------------------------------------------------------------------------------------


@both
def test_a_batch_that_the_kernels_do_not_take_is_refused(name, pair):
    """They end the process, where the stand-in fails; with a cache one sentence says so."""
    batch = {"qwen-image": 9, "z-image": 2}[name]
    with pytest.raises(AssertionError):
        pair.generate(seeds=range(batch))
    with h2cache.apply(pair.quantized, NEVER["h2"]):
        with pytest.raises(ValueError, match=f"take a batch of at most {batch - 1}, not of {batch}: generate fewer"):
            pair.generate(seeds=range(batch))


@pytest.mark.parametrize("name", ["z-image"])
def test_guidance_that_doubles_the_batch_is_refused(pair):
    with pytest.raises(AssertionError):
        pair.generate(guided=True)
    with h2cache.apply(pair.quantized, NEVER["h2"]):
        with pytest.raises(ValueError, match="without guidance where it doubles the batch"):
            pair.generate(guided=True)
