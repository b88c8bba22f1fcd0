"""Rule 5: what a model adds between its blocks (ControlNet) counts once, hit or miss, in every calling convention."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from loops import denoise
from pictures import is_mixed
from tiny import tiny_transformer
from torch import Tensor, nn

import h2cache
from h2cache import CacheConfig, H2CacheConfig

every_method = pytest.mark.parametrize("config", METHODS)


# --- the reference: every method by hand, for one image -------------------------------------------------------------


class ByHand:
    """A call of the transformer under `config`, written down plainly. `hits` and `misses` count what it decided."""

    def __init__(self, model: FluxTransformer2DModel, config: CacheConfig):
        self.model, self.config = model, config
        self.step = self.hits = self.misses = 0
        self.references: dict[str, Tensor] = {}
        self.terms: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.computed: dict[str, int] = {}

    @torch.no_grad()
    def __call__(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        controlnet_blocks_repeat: bool = False,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        model = self.model
        temb = model.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        rotary = model.pos_embed(torch.cat([txt_ids, img_ids]))
        h, e = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)
        double, single = list(model.transformer_blocks), list(model.single_transformer_blocks)
        added = spread(controlnet_block_samples, len(double), controlnet_blocks_repeat)
        added_single = spread(controlnet_single_block_samples, len(single), False)

        def stage(name: str, blocks: list, additions: list, tau: float, pool: Any, text: bool, forced: bool) -> bool:
            nonlocal h, e
            before = (h, e)
            e, h = blocks[0](h, e, temb, rotary)
            anchor = (h, e)
            residual = torch.cat([e - before[1], h - before[0]], dim=1) if text else h - before[0]
            hit = self.step >= getattr(self.config, "warmup_steps", 1) and (
                forced or self.is_close(name, summary(residual, pool), tau)
            )
            if hit:
                h = h + sum(additions[:-1])
                h, e = (now + left for now, left in zip((h, e), self.forecast(name), strict=True))
            else:
                for block, addition in zip(blocks[1:], additions[:-1], strict=True):
                    h = h + addition
                    e, h = block(h, e, temb, rotary)
                self.learn(name, (h - anchor[0] - sum(additions[:-1]), e - anchor[1]))
                self.references[name] = summary(residual, pool)
            self.hits, self.misses = self.hits + hit, self.misses + (not hit and self.step > 0)
            h = h + additions[-1]
            return hit

        c = self.config
        if isinstance(c, H2CacheConfig):
            skipped = stage("structure", double, added, c.tau1, c.pool1, False, False)
            stage("detail", single, added_single, c.tau2, c.pool2, True, skipped and c.hierarchical)
        else:
            stage("network", double + single, added + added_single, c.threshold, None, False, False)
        self.step += 1
        return (model.proj_out(model.norm_out(h, temb)),)

    def is_close(self, name: str, probe: Tensor, tau: float) -> bool:
        reference = self.references[name]
        return bool((reference - probe).abs().mean() / reference.abs().mean() < tau)

    def learn(self, name: str, residual: tuple[Tensor, Tensor]) -> None:
        fresh = [residual]
        order = 0 if getattr(self.config, "forecast", "reuse") == "reuse" else self.config.order
        for old in self.terms.get(name, [])[:order]:
            distance = self.step - self.computed[name]
            fresh.append(tuple((new - last) / distance for new, last in zip(fresh[-1], old, strict=True)))
        self.terms[name], self.computed[name] = fresh, self.step

    def forecast(self, name: str) -> list[Tensor]:
        x = self.step - self.computed[name]
        hermite = {0: 1.0}
        if getattr(self.config, "forecast", "reuse") == "hermite":
            s = self.config.sigma
            hermite |= {1: s * 2 * (s * x), 2: s**2 * (4 * (s * x) ** 2 - 2)}
        else:
            hermite |= {1: x, 2: x**2}
        terms = self.terms[name]
        return [
            sum(hermite[n] / math.factorial(n) * term[stream] for n, term in enumerate(terms)) for stream in range(2)
        ]


def summary(residual: Tensor, target: int | None) -> Tensor:
    stride = 1 if target is None else max(1, residual.shape[1] // target)
    return F.avg_pool2d(residual.float().unsqueeze(1), stride, stride)


def spread(samples: list[Tensor] | None, blocks: int, repeat: bool) -> list[Tensor | float]:
    """What is added after each block: samples go to blocks in turn, or each to an interval of them."""
    if samples is None:
        return [0.0] * blocks
    interval = math.ceil(blocks / len(samples))
    return [samples[block % len(samples) if repeat else block // interval] for block in range(blocks)]


# --- ControlNet -----------------------------------------------------------------------------------------------------

DOUBLE, SINGLE = 4, 5


@pytest.fixture
def deep() -> FluxTransformer2DModel:
    """Deep enough for intervals and repeats to differ; float64, so that two ways to the same sum agree."""
    return tiny_transformer(double=DOUBLE, single=SINGLE, seed=1).double()


SAMPLES = {
    "double": dict(double=DOUBLE),
    "double-by-interval": dict(double=2),
    "one-for-all": dict(double=1),
    "double-repeated": dict(double=3, repeat=True),
    "single": dict(single=SINGLE),
    "single-by-interval": dict(single=2),
    "both": dict(double=2, single=3),
    "both-new-at-every-step": dict(double=DOUBLE, single=SINGLE, fresh=True),
    "repeated-new-at-every-step": dict(double=2, single=2, repeat=True, fresh=True),
}
every_kind_of_sample = pytest.mark.parametrize("kind", SAMPLES.values(), ids=SAMPLES)


def controlled(kind: dict[str, Any]) -> Callable[[int, dict[str, Any]], None]:
    """What hands a ControlNet's samples to each call: image k of a batch gets those of `seed = k`."""

    def give(step: int, call: dict[str, Any]) -> None:
        batch, tokens, _ = call["hidden_states"].shape
        first = give.first
        generators = [
            torch.Generator().manual_seed(1000 * image + (step if kind.get("fresh") else 0))
            for image in range(first, first + batch)
        ]

        def draw(number: int) -> list[Tensor] | None:
            samples = [
                torch.cat([torch.randn(1, tokens, 32, generator=generator) for generator in generators])
                for _ in range(number)
            ]
            return [0.7 * sample.to(call["hidden_states"].dtype) for sample in samples] or None

        call["controlnet_block_samples"] = draw(kind.get("double", 0))
        call["controlnet_single_block_samples"] = draw(kind.get("single", 0))
        call["controlnet_blocks_repeat"] = kind.get("repeat", False)

    give.first = 0
    return give


class Standing(nn.Module):
    """A reference that can take the transformer's place in a denoising loop."""

    def __init__(self, by_hand: ByHand):
        super().__init__()
        self.config, self.device, self.call = by_hand.model.config, torch.device("cpu"), by_hand

    def forward(self, **call: Any) -> tuple[Tensor]:
        return self.call(**call)


@every_kind_of_sample
@every_method
def test_samples_count_once(config, kind, deep):
    options = dict(dtype=torch.float64, steps=14, before_step=controlled(kind))
    by_hand = ByHand(deep, config)
    expected = denoise(Standing(by_hand), **options)
    plain = denoise(deep, **options)
    with h2cache.apply(deep, config) as handle:
        cached = denoise(deep, **options)
    assert by_hand.hits > 0 and by_hand.misses > 0
    assert sum(row.decision.skips for row in handle.trace) == by_hand.hits
    torch.testing.assert_close(cached, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(cached, plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, denoise(deep, dtype=torch.float64, steps=14), rtol=1e-2, atol=1e-2)


@every_method
def test_the_reference_without_samples(config, deep):
    by_hand = ByHand(deep, config)
    expected = denoise(Standing(by_hand), dtype=torch.float64, steps=14)
    with h2cache.apply(deep, config):
        torch.testing.assert_close(denoise(deep, dtype=torch.float64, steps=14), expected, rtol=1e-9, atol=1e-9)


@every_method
def test_samples_that_come_and_go(config, deep):
    """A ControlNet that guides only part of the run (control_guidance_start and _end)."""
    give = controlled(SAMPLES["both"])

    def sometimes(step: int, call: dict[str, Any]) -> None:
        if 3 <= step < 9:
            give(step, call)

    options = dict(dtype=torch.float64, steps=14, before_step=sometimes)
    expected = denoise(Standing(ByHand(deep, config)), **options)
    with h2cache.apply(deep, config):
        torch.testing.assert_close(denoise(deep, **options), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["both", "both-new-at-every-step"])
@every_method
def test_samples_of_a_batch(config, kind, deep):
    """Each image keeps its own samples, also where only some of the batch are computed."""
    options = dict(dtype=torch.float64, steps=14)
    with h2cache.apply(deep, config) as handle:
        together = denoise(deep, batch=3, before_step=controlled(SAMPLES[kind]), **options)
        visits: dict[tuple, set[bool]] = {}
        for row in handle.trace:
            visits.setdefault((row.step, row.stage), set()).add(row.decision.skips)
        assert any(len(kinds) == 2 for kinds in visits.values())
        for sample in range(3):
            give = controlled(SAMPLES[kind])
            give.first = sample
            single = denoise(deep, seed=sample, before_step=give, **options)
            torch.testing.assert_close(together[sample], single[0], rtol=1e-9, atol=1e-9)


# --- single blocks on one concatenated tensor -----------------------------------------------------------------------


class ConcatenatedBlock(FluxSingleTransformerBlock):
    """The convention of diffusers before 0.35 and of nunchaku: [text; image] in one tensor."""

    def forward(self, hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        no_text = hidden_states[:, :0]
        return super().forward(hidden_states, no_text, temb, image_rotary_emb, joint_attention_kwargs)[1]


class ConcatenatingFlux(FluxTransformer2DModel):
    """The model around it, as it was: it adds ControlNet's samples to a slice of the tensor, in place."""

    in_place = True

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        guidance=None,
        joint_attention_kwargs=None,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
        return_dict=True,
        controlnet_blocks_repeat=False,
    ):
        h, e = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        text = e.shape[1]
        temb = self.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        common = dict(temb=temb, image_rotary_emb=self.pos_embed(torch.cat([txt_ids, img_ids])))
        common["joint_attention_kwargs"] = joint_attention_kwargs
        added = spread(controlnet_block_samples, len(self.transformer_blocks), controlnet_blocks_repeat)
        for block, addition in zip(self.transformer_blocks, added, strict=True):
            e, h = block(hidden_states=h, encoder_hidden_states=e, **common)
            h = h + addition
        z = torch.cat([e, h], dim=1)
        added = spread(controlnet_single_block_samples, len(self.single_transformer_blocks), False)
        for block, addition in zip(self.single_transformer_blocks, added, strict=True):
            z = block(hidden_states=z, **common)
            if self.in_place:
                z[:, text:, ...] = z[:, text:, ...] + addition
            elif torch.is_tensor(addition):
                z = torch.cat([z[:, :text], z[:, text:] + addition], dim=1)
        return (self.proj_out(self.norm_out(z[:, text:], temb)),)


@pytest.fixture(params=[False, True], ids=["out-of-place", "in-place"])
def concatenating(request, deep) -> FluxTransformer2DModel:
    """The same weights as `deep`, in the other convention."""
    model = tiny_transformer(double=DOUBLE, single=SINGLE, seed=1).double()
    model.__class__ = ConcatenatingFlux
    model.in_place = request.param
    for block in model.single_transformer_blocks:
        block.__class__ = ConcatenatedBlock
    assert torch.equal(denoise(model, steps=2, dtype=torch.float64), denoise(deep, steps=2, dtype=torch.float64))
    return model


@pytest.mark.parametrize("kind", [None, "double-by-interval", "both", "both-new-at-every-step"])
@every_method
def test_both_conventions_give_the_same_images(config, kind, deep, concatenating):
    options = dict(batch=3, dtype=torch.float64, steps=12)
    if kind is not None:
        options["before_step"] = controlled(SAMPLES[kind])
    with h2cache.apply(deep, config) as first:
        expected = denoise(deep, **options)
    with h2cache.apply(concatenating, config) as second:
        images = denoise(concatenating, **options)
    assert is_mixed(second)
    assert [row.decision for row in second.trace] == [row.decision for row in first.trace]
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
