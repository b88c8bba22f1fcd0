"""Families from outside: `h2cache.register_adapter`, and the worked example of docs/models.md."""

import re
import runpy

import pytest
import torch
from diffusers import AllegroTransformer3DModel, UNet2DConditionModel
from families.base import lively
from repository import REPOSITORY

import h2cache
from h2cache import H2CacheConfig
from h2cache.adapters import Adapter
from h2cache.adapters import Registry as registry
from h2cache.baselines import ClusCaConfig, TaylorSeerConfig, TeaCacheConfig


@pytest.fixture(autouse=True)
def restored_registry(monkeypatch):
    monkeypatch.setattr(registry, "added", ())


@pytest.fixture
def allegro() -> AllegroTransformer3DModel:
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=24,
        caption_channels=16,
        sample_height=8,
        sample_width=8,
        sample_frames=2,
    )
    return lively(transformer)


@pytest.fixture
def example(tmp_path) -> type[Adapter]:
    """The adapter of the page, registered by running the page's own code."""
    page = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    file = tmp_path / "allegro.py"
    file.write_text(code)
    return runpy.run_path(str(file))["AllegroAdapter"]


def denoise(transformer: AllegroTransformer3DModel, batch: int = 1, steps: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 2, 8, 8, generator=generator)[:batch]
    text = torch.randn(3, 5, 16, generator=generator)[:batch]
    for step in torch.linspace(1000, 100, steps):
        with torch.no_grad():
            output = transformer(
                hidden_states=latents,
                encoder_hidden_states=text,
                timestep=step.expand(batch),
                attention_mask=torch.ones(batch, 2, 8, 8),
                encoder_attention_mask=torch.ones(batch, 5),
                return_dict=False,
            )[0]
        latents = latents - output / steps
    return latents


def test_without_the_adapter_the_class_is_refused(allegro):
    with pytest.raises(TypeError, match=r"AllegroTransformer3DModel.*docs/models\.md.*register_adapter"):
        h2cache.apply(allegro, H2CacheConfig())


def test_the_example_never_hits_without_changing_a_bit(allegro, example):
    expected = denoise(allegro)
    with h2cache.apply(allegro, H2CacheConfig(tau1=-1.0, tau2=-1.0)):
        assert torch.equal(denoise(allegro), expected)


@pytest.mark.parametrize(
    "config",
    [
        H2CacheConfig(tau1=2.0, tau2=2.0),
        TeaCacheConfig(threshold=2.0, coefficients=(1.0, 0.0)),
        TaylorSeerConfig(interval=3),
        ClusCaConfig(interval=3, clusters=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_example_serves_every_kind_of_method(allegro, example, config):
    with h2cache.apply(allegro, config) as handle:
        batch = denoise(allegro, batch=3)
        alone = denoise(allegro)
    assert handle.summary()["computed_fraction"] < 1
    assert batch.isfinite().all()
    if not isinstance(config, ClusCaConfig):  # the random tokens follow the order of the calls
        torch.testing.assert_close(batch[:1], alone, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_is_registered_later_comes_first(allegro, example):
    @h2cache.register_adapter
    class Own(example):
        family = "mine"

    assert registry.added == (Own, example)
    assert h2cache.apply(allegro, H2CacheConfig())._engines[0].adapter.family == "mine"


def test_registering_twice_changes_nothing(example):
    assert h2cache.register_adapter(example) is example
    assert registry.added == (example,)


@pytest.mark.parametrize("wrong", [object(), int, Adapter])
def test_what_is_no_adapter_of_a_family_is_refused(wrong):
    with pytest.raises(TypeError, match=r"register_adapter got|names no family"):
        h2cache.register_adapter(wrong)
    assert registry.added == ()


def test_a_u_net_is_told_what_works_for_it():
    u_net = UNet2DConditionModel(
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(TypeError, match=r"U-Net.*UniPCMultistepScheduler"):
        h2cache.apply(u_net, H2CacheConfig())
