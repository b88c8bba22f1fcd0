"""Rule 5: what a model adds between its blocks (ControlNet) counts once, hit or miss, in every calling convention."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from loops import denoise
from methods_under_test import every_method, every_method_once, measures
from pictures import is_mixed, partial_steps
from tiny import tiny_transformer
from torch import Tensor, nn

import h2cache
from h2cache import CacheConfig, H2CacheConfig
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.policy.clusters import ClusterMemory, Clusters
from h2cache.policy.forecasts import BackcastHermite

STEPS = 14


# --- the reference: every method by hand, for one image -------------------------------------------------------------


class ByHand:
    """A call of the transformer under `config`, written down plainly. `hits` and `misses` count what it decided."""

    def __init__(self, model: FluxTransformer2DModel, config: CacheConfig, steps: int = STEPS):
        self.model, self.config, self.steps = model, config, steps
        self.step = self.hits = self.misses = self.in_a_row = 0
        self.references: dict[Any, Tensor] = {}
        self.terms: dict[Any, list[tuple[Tensor, ...]]] = {}
        self.computed: dict[Any, int] = {}
        self.sigmas: dict[Any, float] = {}
        self.changed = 0.0
        self.clusters: ClusterMemory | None = None

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
        model, c = self.model, self.config
        temb = model.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        rotary = model.pos_embed(torch.cat([txt_ids, img_ids]))
        h, e = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)
        double, single = list(model.transformer_blocks), list(model.single_transformer_blocks)
        added = spread(controlnet_block_samples, len(double), controlnet_blocks_repeat)
        added_single = spread(controlnet_single_block_samples, len(single), False)

        def behind_first_block(
            name: str, blocks: list, additions: list, tau: float, pool: Any, text: bool, forced: bool
        ) -> bool:
            """The first block, and the others unless it changed too little; whether they were skipped."""
            nonlocal h, e
            before = (h, e)
            e, h = blocks[0](h, e, temb, rotary)
            probe = summary(torch.cat([e - before[1], h - before[0]], dim=1) if text else h - before[0], pool)
            hit = self.step >= getattr(c, "warmup_steps", 1) and (forced or self.change(name, probe) < tau)
            whole(name, blocks[1:], additions, additions[:-1], hit)
            if not hit:
                self.references[name] = probe
            return hit

        def whole(name: str, blocks: list, additions: list, additions_before: list, hit: bool) -> None:
            """`blocks` with what is added before each of them and behind the last; or what they added when computed."""
            nonlocal h, e
            entered, between = (h, e), sum(additions_before)
            if hit:
                h, e = (now + left for now, left in zip((h + between, e), self.forecast(name), strict=True))
            else:
                for block, addition in zip(blocks, additions_before, strict=True):
                    e, h = block(h + addition, e, temb, rotary)
                self.learn(name, (h - entered[0] - between, e - entered[1]))
            self.count(hit)
            h = h + additions[-1]

        if isinstance(c, H2CacheConfig):
            skipped = behind_first_block("structure", double, added, c.tau1, c.pool1, False, False)
            skipped = skipped and c.hierarchical
            behind_first_block("detail", single, added_single, c.tau2, c.pool2, True, skipped)
        elif isinstance(c, BlockCacheConfig):
            behind_first_block("network", double + single, added + added_single, c.threshold, None, False, False)
        elif isinstance(c, TeaCacheConfig):
            modulated = double[0].norm1(h, emb=temb)[0].float()
            hit = 0 < self.step < self.steps - 1 and self.sum_of_changes(modulated) < c.threshold
            self.references["network"] = modulated
            self.changed = self.changed if hit else 0.0
            additions = added + added_single
            whole("network", double + single, additions, [0.0, *additions[:-1]], hit)
        elif c.granularity == "stage":
            hit = self.is_skipped_on_schedule()
            whole("structure", double, added, [0.0, *added[:-1]], hit)
            whole("detail", single, added_single, [0.0, *added_single[:-1]], hit)
        else:
            hit = self.is_skipped_on_schedule()
            for block, addition in zip(double, added, strict=True):
                h, e = self.double_block(block, h, e, temb, rotary, hit)
                if block is double[-1] and isinstance(c, ClusCaConfig) and not hit:
                    self.recluster(h, e)
                h = h + addition
            for block, addition in zip(single, added_single, strict=True):
                h, e = self.single_block(block, h, e, temb, rotary, hit)
                h = h + addition
            self.count(hit)
        self.step += 1
        return (model.proj_out(model.norm_out(h, temb)),)

    def double_block(self, block: nn.Module, h: Tensor, e: Tensor, temb: Tensor, rotary: Any, hit: bool) -> tuple:
        """With its attention and its two MLPs, before their gates, computed or forecast."""
        nh, gate_h, shift_h, scale_h, gate_mlp_h = (x if x.ndim == 3 else x[:, None] for x in block.norm1(h, emb=temb))
        ne, gate_e, shift_e, scale_e, gate_mlp_e = (
            x if x.ndim == 3 else x[:, None] for x in block.norm1_context(e, emb=temb)
        )
        attention_h, attention_e = self.module(
            (block, "attention"), hit, lambda: block.attn(nh, encoder_hidden_states=ne, image_rotary_emb=rotary)
        )
        h, e = h + gate_h * attention_h, e + gate_e * attention_e
        nh, ne = block.norm2(h) * (1 + scale_h) + shift_h, block.norm2_context(e) * (1 + scale_e) + shift_e
        (mlp_h,) = self.module((block, "image"), hit, lambda: (block.ff(nh),), block.ff, nh)
        (mlp_e,) = self.module((block, "text"), hit, lambda: (block.ff_context(ne),), block.ff_context, ne)
        return h + gate_mlp_h * mlp_h, e + gate_mlp_e * mlp_e

    def single_block(self, block: nn.Module, h: Tensor, e: Tensor, temb: Tensor, rotary: Any, hit: bool) -> tuple:
        """With its attention and MLP together, before their gate, computed or forecast."""
        text, z = e.shape[1], torch.cat([e, h], dim=1)
        n, gate = block.norm(z, emb=temb)

        def both() -> tuple[Tensor]:
            attention = block.attn(n, image_rotary_emb=rotary)
            return (block.proj_out(torch.cat([attention, F.gelu(block.proj_mlp(n), approximate="tanh")], dim=2)),)

        z = z + gate[:, None] * self.module((block, "both"), hit, both)[0]
        return z[:, text:], z[:, :text]

    def module(
        self, key: tuple, hit: bool, compute: Callable, mlp: nn.Module | None = None, mlp_input: Tensor | None = None
    ) -> Any:
        if not hit:
            outputs = compute()
            self.learn(key, outputs)
            return outputs
        if self.clusters is not None and mlp is not None:  # beside plain loops in test_clusters.py
            self.clusters.refresh(self.terms[key][0][0], key[1] == "text", mlp, mlp_input)
        return self.forecast(key)

    def recluster(self, h: Tensor, e: Tensor) -> None:
        c = self.config
        self.clusters = self.clusters or ClusterMemory(Clusters(c.clusters, c.iterations, c.propagation, c.seed))
        self.clusters.recluster((h, e))

    def count(self, hit: bool) -> None:
        self.hits, self.misses = self.hits + hit, self.misses + (not hit and self.step > 0)

    def change(self, name: str, probe: Tensor) -> float:
        reference = self.references[name]
        return ((reference - probe).abs().mean() / reference.abs().mean()).item()

    def sum_of_changes(self, modulated: Tensor) -> float:
        assert self.config.coefficients == (1.0, 0.0)
        self.changed += self.change("network", modulated)
        return self.changed

    def is_skipped_on_schedule(self) -> bool:
        hit = self.step >= self.config.first_enhance and self.in_a_row < self.config.interval - 1
        self.in_a_row = self.in_a_row + 1 if hit else 0
        return hit

    @property
    def basis(self) -> str:
        if isinstance(self.config, HiCacheConfig):
            return "hermite"
        return getattr(self.config, "forecast", "taylor" if isinstance(self.config, TaylorSeerConfig) else "reuse")

    def learn(self, name: Any, features: tuple[Tensor, ...]) -> None:
        fresh, known = [tuple(features)], self.terms.get(name, [])
        takes_differences = self.step >= getattr(self.config, "first_enhance", 1) - 1
        order = self.config.order if self.basis != "reuse" and takes_differences else 0
        if getattr(self.config, "sigma", None) == "auto" and len(known) == self.config.order + 1:
            best = min((k / 100 for k in range(1, 100)), key=lambda s: self.miss(name, features, s))
            self.sigmas[name] = math.sqrt(best * math.sqrt(0.5))
        for old in known[:order]:
            distance = self.step - self.computed[name]
            fresh.append(tuple((new - last) / distance for new, last in zip(fresh[-1], old, strict=True)))
        self.terms[name], self.computed[name] = fresh, self.step

    def miss(self, name: Any, features: tuple[Tensor, ...], sigma: float) -> float:
        """How far off the forecast of this step would have been."""
        forecast = self.forecast(name, sigma)
        return sum((a - b).square().sum().item() for a, b in zip(features, forecast, strict=True))

    def forecast(self, name: Any, sigma: float | None = None) -> list[Tensor]:
        x = self.step - self.computed[name]
        if self.basis == "hermite":
            start = BackcastHermite.sigma if self.config.sigma == "auto" else self.config.sigma
            s = sigma or self.sigmas.get(name, start)
            basis = {0: 1.0, 1: s * 2 * (s * x), 2: s**2 * (4 * (s * x) ** 2 - 2)}
        else:
            basis = {0: 1.0, 1: x, 2: x**2}
        terms = self.terms[name]
        return [
            sum(basis[n] / math.factorial(n) * term[part] for n, term in enumerate(terms))
            for part in range(len(terms[0]))
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


@every_method_once("kind", SAMPLES, most="both-new-at-every-step")
def test_samples_count_once(config, kind, deep):
    options = dict(dtype=torch.float64, steps=STEPS, before_step=controlled(kind))
    by_hand = ByHand(deep, config)
    expected = denoise(Standing(by_hand), **options)
    with h2cache.apply(deep, config) as handle:
        cached = denoise(deep, **options)
    assert by_hand.hits > 0 and by_hand.misses > 0
    assert sum(row.decision.skips for row in handle.trace) == by_hand.hits
    torch.testing.assert_close(cached, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(cached, denoise(deep, **options), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", SAMPLES.values(), ids=SAMPLES)
def test_the_samples_above_show(kind, deep):
    options = dict(dtype=torch.float64, steps=STEPS)
    plain, guided = denoise(deep, **options), denoise(deep, before_step=controlled(kind), **options)
    assert not torch.allclose(plain, guided, rtol=1e-2, atol=1e-2)


@every_method
def test_the_reference_without_samples(config, deep):
    by_hand = ByHand(deep, config)
    expected = denoise(Standing(by_hand), dtype=torch.float64, steps=STEPS)
    with h2cache.apply(deep, config):
        torch.testing.assert_close(denoise(deep, dtype=torch.float64, steps=STEPS), expected, rtol=1e-9, atol=1e-9)


@every_method
def test_samples_that_come_and_go(config, deep):
    """A ControlNet that guides only part of the run (control_guidance_start and _end)."""
    give = controlled(SAMPLES["both"])

    def sometimes(step: int, call: dict[str, Any]) -> None:
        if 3 <= step < 9:
            give(step, call)

    options = dict(dtype=torch.float64, steps=STEPS, before_step=sometimes)
    expected = denoise(Standing(ByHand(deep, config)), **options)
    with h2cache.apply(deep, config):
        torch.testing.assert_close(denoise(deep, **options), expected, rtol=1e-9, atol=1e-9)


@every_method_once("kind", {kind: SAMPLES[kind] for kind in ("both", "both-new-at-every-step")}, most="both")
def test_samples_of_a_batch(config, kind, deep):
    """Each image keeps its own samples, also where only some of the batch are computed."""
    options = dict(dtype=torch.float64, steps=STEPS)
    with h2cache.apply(deep, config) as handle:
        together = denoise(deep, batch=3, before_step=controlled(kind), **options)
        assert is_mixed(handle) and (partial_steps(handle.trace) > 0) == measures(config)
        for sample in range(3):
            give = controlled(kind)
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
            if not torch.is_tensor(addition):
                continue  # as diffusers: without samples nothing is written
            if self.in_place:
                z[:, text:, ...] = z[:, text:, ...] + addition
            else:
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


BOTH = {"none": None} | {kind: SAMPLES[kind] for kind in ("both", "both-new-at-every-step")}


@every_method_once("kind", BOTH, most="both")
def test_both_conventions_give_the_same_images(config, kind, deep, concatenating):
    options = dict(batch=3, dtype=torch.float64, steps=12)
    if kind is not None:
        options["before_step"] = controlled(kind)
    with h2cache.apply(deep, config) as first:
        expected = denoise(deep, **options)
    with h2cache.apply(concatenating, config) as second:
        images = denoise(concatenating, **options)
    assert is_mixed(second)
    assert [row.decision for row in second.trace] == [row.decision for row in first.trace]
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-9)
