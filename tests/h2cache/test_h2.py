"""H2-Cache is the paper's algorithm: `PaperH2Cache` below writes it out once more, block by block.

The reference shares nothing with the engine: it walks the model's blocks itself, keeps whole features, pools them by
hand in float64 and knows one image. The engine must decide the same from the same numbers, and give the same images.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from loops import denoise, executions, halfway
from torch import Tensor, nn

import h2cache
from h2cache import H2CacheConfig


def thumbnail(features: Tensor, target: int | None) -> np.ndarray:
    """Average of every full square of s x s numbers of the (tokens, channels) table, s = max(1, tokens // target)."""
    table = features[0].double().numpy()
    if target is None:
        return table
    s = max(1, table.shape[0] // target)
    rows, columns = table.shape[0] // s, table.shape[1] // s
    return table[: rows * s, : columns * s].reshape(rows, s, columns, s).mean(axis=(1, 3))


def relative_l1(cached: np.ndarray, current: np.ndarray) -> float:
    return float(np.abs(cached - current).mean() / np.abs(cached).mean())


@dataclass
class PaperH2Cache:
    """One run of one image by the paper: call it as the transformer is called."""

    model: FluxTransformer2DModel
    tau1: float
    tau2: float
    pool1: int | None
    pool2: int | None
    hierarchical: bool
    structure: bool = True
    detail: bool = True
    decisions: list[tuple[str, str]] = field(default_factory=list)
    differences: list[tuple[float, float]] = field(default_factory=list)
    r1: Tensor | None = None
    r2: Tensor | None = None

    def __call__(self, hidden_states, encoder_hidden_states, timestep, guidance, pooled_projections, **ids):
        model = self.model
        temb = model.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        rotary = model.pos_embed(torch.cat([ids["txt_ids"], ids["img_ids"]]))
        run = SimpleNamespace(temb=temb, image_rotary_emb=rotary, joint_attention_kwargs=None)
        h, e = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)

        e1, h1 = model.transformer_blocks[0](h, e, **vars(run))
        r1 = h1 - h
        difference1, decision1 = self.judge(self.r1, r1, self.pool1, self.tau1 if self.structure else -1.0)
        if decision1 == "hit":
            h2, e2 = h1 + self.R1h, e1 + self.R1e
        else:
            h2, e2 = h1, e1
            for block in model.transformer_blocks[1:]:
                e2, h2 = block(h2, e2, **vars(run))
            self.R1h, self.R1e, self.r1 = h2 - h1, e2 - e1, r1

        z = torch.cat([e2, h2], dim=1)
        z1 = torch.cat(model.single_transformer_blocks[0](h2, e2, **vars(run)), dim=1)
        r2 = z1 - z
        if decision1 == "hit" and self.hierarchical and self.detail:
            difference2, decision2 = float("nan"), "forced"
        else:
            difference2, decision2 = self.judge(self.r2, r2, self.pool2, self.tau2 if self.detail else -1.0)
        if decision2 in ("hit", "forced"):
            z2 = z1 + self.R2
        else:
            text = e2.shape[1]
            z2 = z1
            for block in model.single_transformer_blocks[1:]:
                z2 = torch.cat(block(z2[:, text:], z2[:, :text], **vars(run)), dim=1)
            self.R2, self.r2 = z2 - z1, r2

        self.decisions.append((decision1, decision2))
        self.differences.append((difference1, difference2))
        image = z2[:, e2.shape[1] :]
        return (model.proj_out(model.norm_out(image, temb)),)

    @staticmethod
    def judge(cached: Tensor | None, current: Tensor, pool: int | None, tau: float) -> tuple[float, str]:
        if cached is None:
            return float("nan"), "warmup"
        difference = relative_l1(thumbnail(cached, pool), thumbnail(current, pool))
        assert abs(difference - tau) > 1e-5, "too close to the threshold to be decided in float32: choose another tau"
        return difference, "hit" if difference < tau else "compute"

    # The loop asks a transformer for these.
    @property
    def config(self):
        return self.model.config

    @property
    def device(self):
        return self.model.device


def columns(handle: h2cache.Handle, column: str) -> list[tuple]:
    """(structure, detail) of each step, None for a stage that is not cached."""
    steps: dict[int, dict[str, object]] = {}
    for row in handle.trace:
        steps.setdefault(row.step, {})[row.stage] = getattr(row, column)
    return [(step.get("structure"), step.get("detail")) for step in steps.values()]


CASES = {
    "published thresholds": dict(tau1=0.15, tau2=0.22),
    "both stages decide": dict(tau1=0.28, tau2=0.4),
    "structure leads": dict(tau1=0.45, tau2=0.05),
    "detail leads": dict(tau1=0.05, tau2=0.6),
    "no pooling": dict(tau1=0.28, tau2=0.4, pool1=None, pool2=None),
    "strides 4 and 3, remainders cut off": dict(tau1=0.3, tau2=0.35, pool1=4, pool2=6),
    "strides 2 and 1": dict(tau1=0.25, tau2=0.4, pool1=8, pool2=20),
    "one pooled row": dict(tau1=0.3, tau2=0.5, pool1=1, pool2=1),
    "no hierarchy": dict(tau1=0.28, tau2=0.4, hierarchical=False),
    "no hierarchy, pooled": dict(tau1=0.3, tau2=0.35, pool1=4, pool2=6, hierarchical=False),
    "structure only": dict(tau1=0.28, tau2=0.4, stages="structure"),
    "detail only": dict(tau1=0.28, tau2=0.4, stages="detail"),
    "never": dict(tau1=-1.0, tau2=-1.0),
    "always": dict(tau1=float("inf"), tau2=float("inf")),
}


def reference_for(model: FluxTransformer2DModel, config: H2CacheConfig) -> PaperH2Cache:
    return PaperH2Cache(
        model,
        config.tau1,
        config.tau2,
        config.pool1,
        config.pool2,
        config.hierarchical,
        structure=config.stages != "detail",
        detail=config.stages != "structure",
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_decides_and_draws_as_the_paper_says(transformer, fields, seed):
    config = H2CacheConfig(**fields)
    reference = reference_for(transformer, config)
    expected = denoise(reference, seed=seed)
    with h2cache.apply(transformer, config) as handle:
        image = denoise(transformer, seed=seed)

    for stage, cached in enumerate((reference.structure, reference.detail)):
        for step in range(len(reference.decisions)):
            decision = columns(handle, "decision")[step][stage]
            difference = columns(handle, "diff")[step][stage]
            paper = reference.differences[step][stage]
            assert decision == (reference.decisions[step][stage] if cached else None)
            assert (difference is None) == (not cached or np.isnan(paper))
            assert difference is None or difference == pytest.approx(paper, rel=1e-5, abs=5e-6)
    torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)


def test_the_cases_above_exercise_every_decision(transformer):
    """A reference that only ever computes would agree with an engine that does nothing."""
    seen = set()
    for fields in CASES.values():
        reference = reference_for(transformer, H2CacheConfig(**fields))
        denoise(reference)
        seen |= set(reference.decisions)
    ways = {("compute", "compute"), ("compute", "hit"), ("hit", "forced"), ("hit", "compute"), ("hit", "hit")}
    assert {("warmup", "warmup"), *ways} <= seen


def test_decides_and_draws_as_the_paper_says_on_flux_mini(flux_mini):
    """On the trained model at its own size, 64 image tokens and 32 of text: pooled with strides 4 and 2."""
    run = dict(steps=20, height=8, width=8, text_tokens=32)
    config = H2CacheConfig(tau1=-1, tau2=-1, pool1=16, pool2=40)
    with h2cache.apply(flux_mini, config) as handle:
        denoise(flux_mini.transformer, **run)
    structure, detail = zip(*columns(handle, "diff"), strict=True)
    config = config.updated(tau1=halfway(structure), tau2=halfway(detail))
    reference = reference_for(flux_mini.transformer, config)
    expected = denoise(reference, **run)
    with h2cache.apply(flux_mini, config) as handle:
        image = denoise(flux_mini.transformer, **run)
    assert columns(handle, "decision") == reference.decisions
    assert {"hit", "compute"} <= {structure for structure, _ in reference.decisions}
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)


def test_the_structure_stage_looks_at_image_tokens_only(transformer):
    """Text tokens that go wild in the first double block change no decision of the structure stage; in the first single
    block they do change the detail stage's, which looks at all tokens."""
    noise = torch.Generator().manual_seed(0)

    def disturb(module, args, output):
        return output + torch.randn(output.shape, generator=noise)

    def structure_and_detail(block):
        hook = block.register_forward_hook(disturb)
        try:
            with h2cache.apply(transformer, H2CacheConfig(tau1=-1, tau2=-1)) as handle:
                frozen(transformer, calls=4)
        finally:
            hook.remove()
        return [tuple(pair) for pair in columns(handle, "diff")][1:]

    text_only = transformer.transformer_blocks[0].ff_context  # its output goes to the text stream alone
    for structure, detail in structure_and_detail(text_only):
        assert structure < 1e-5
        assert detail > 0.01


def frozen(transformer: nn.Module, calls: int) -> list[Tensor]:
    """The outputs of `calls` calls of one run that differ in nothing but a timestep that moves by a hair."""
    still: dict[str, Tensor] = {}

    def hold(step, call):
        still.setdefault("hidden_states", call["hidden_states"])
        call["hidden_states"] = still["hidden_states"]
        call["timestep"] = torch.tensor([1 - 1e-7 * step])

    outputs = []
    hook = transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        denoise(transformer, steps=calls, before_step=hold)
    finally:
        hook.remove()
    return outputs


# Toy blocks: numbers instead of tensors. A block adds its script's value of this step to every image and text number,
# so that relL1 between two steps is |a - b| / |a| of two scripted numbers.


class ScriptedBlock(nn.Module):
    """Adds `script[step]` to both streams, called as Flux's blocks are, and counts its calls."""

    def __init__(self, script: list[float]):
        super().__init__()
        self.script, self.step, self.executed = script, 0, 0

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        self.executed += 1
        value = self.script[min(self.step, len(self.script) - 1)]
        return encoder_hidden_states + value, hidden_states + value


def toy_run(config: H2CacheConfig, doubles: list[list[float]], singles: list[list[float]], steps: int):
    """What all blocks together added to the image tokens in each step, how often each block ran, and the handle.

    The model is a real Flux transformer whose blocks follow scripts, on image tokens that enter them as zeros.
    """
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=2,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=4,
        num_attention_heads=1,
        joint_attention_dim=2,
        pooled_projection_dim=2,
        guidance_embeds=True,
        axes_dims_rope=(0, 2, 2),
    )
    model.transformer_blocks = nn.ModuleList(ScriptedBlock(script) for script in doubles)
    model.single_transformer_blocks = nn.ModuleList(ScriptedBlock(script) for script in singles)
    nn.init.zeros_(model.x_embedder.weight), nn.init.zeros_(model.x_embedder.bias)
    added = []

    def begin(step, call):
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            block.step = step

    model.norm_out.register_forward_pre_hook(lambda module, args: added.append(args[0].flatten()[0].item()))
    with h2cache.apply(model, config) as handle:
        denoise(model, steps=steps, before_step=begin)
    executed = [block.executed for block in [*model.transformer_blocks, *model.single_transformer_blocks]]
    return added, executed, handle


def test_a_hit_adds_the_residuals_of_the_last_computed_step():
    """Doubles add 1, then 10; singles 100, then 1000. At step 1 the first blocks add 1.1 and 110: relL1 is 0.1 in both
    stages, below tau, so the others are replaced by what they added at step 0: 1.1 + 10 + 110 + 1000."""
    added, executed, handle = toy_run(
        H2CacheConfig(tau1=0.15, tau2=0.22),
        doubles=[[1.0, 1.1], [10.0, 77.0]],
        singles=[[100.0, 110.0], [1000.0, 7777.0]],
        steps=2,
    )
    assert added == pytest.approx([1111.0, 1121.1])
    assert executed == [2, 1, 2, 1]
    assert columns(handle, "decision") == [("warmup", "warmup"), ("hit", "forced")]
    assert columns(handle, "diff")[1] == (pytest.approx(0.1, rel=1e-5), None)


def test_the_comparison_is_with_the_last_computed_step_not_with_the_previous_one():
    """1, 1.1, 1.2: each step is within 0.15 of the one before it; the third is 0.2 away from the computed one."""
    _, executed, handle = toy_run(
        H2CacheConfig(tau1=0.15, tau2=-1), doubles=[[1.0, 1.1, 1.2, 1.3], [10.0]], singles=[[1.0], [1.0]], steps=4
    )
    structure = [pair[0] for pair in columns(handle, "decision")]
    assert structure == ["warmup", "hit", "compute", "hit"]  # 1.3 is 0.083 away from 1.2
    assert [pair[0] for pair in columns(handle, "diff")][1:] == pytest.approx([0.1, 0.2, 1 / 12], rel=1e-5)
    assert executed[1] == 2


@pytest.mark.parametrize(("tau", "decision"), [(0.5, "compute"), (0.5000001, "hit")])
def test_below_the_threshold_is_strictly_below(tau, decision):
    """1.0 after 2.0: relL1 is exactly 0.5."""
    _, _, handle = toy_run(
        H2CacheConfig(tau1=tau, tau2=-1), doubles=[[2.0, 1.0], [10.0]], singles=[[1.0], [1.0]], steps=2
    )
    assert columns(handle, "decision")[1][0] == decision


def test_relative_means_relative_to_the_cached_feature():
    """1 after 2 is 0.5 away; 2 after 1 is 1.0 away."""
    for script, expected in (([2.0, 1.0], 0.5), ([1.0, 2.0], 1.0)):
        _, _, handle = toy_run(H2CacheConfig(), doubles=[script, [1.0]], singles=[[1.0], [1.0]], steps=2)
        assert columns(handle, "diff")[1][0] == pytest.approx(expected)


def test_a_stage_that_is_forced_keeps_its_own_older_reference():
    """Detail is forced at step 1 and compared at step 2 with step 0: |1 - 1.4| / 1, not with the forced step's 1.3."""
    _, _, handle = toy_run(
        H2CacheConfig(tau1=0.15, tau2=0.22),
        doubles=[[1.0, 1.0, 9.0], [10.0]],
        singles=[[1.0, 1.3, 1.4], [1.0]],
        steps=3,
    )
    assert columns(handle, "decision") == [("warmup", "warmup"), ("hit", "forced"), ("compute", "compute")]
    assert columns(handle, "diff")[2][1] == pytest.approx(0.4, rel=1e-5)


def test_a_reference_of_zeros_is_replaced_at_the_next_step():
    """0, 1, 1: nothing is relative to zero, so step 1 computes; its 1 is the reference that step 2 equals."""
    _, _, handle = toy_run(
        H2CacheConfig(tau1=0.15, tau2=-1), doubles=[[0.0, 1.0, 1.0], [10.0]], singles=[[1.0], [1.0]], steps=3
    )
    assert [pair[0] for pair in columns(handle, "decision")] == ["warmup", "compute", "hit"]


def test_without_the_hierarchy_detail_decides_for_itself():
    """The same numbers: at step 1 detail is 0.3 away from its reference, and now that counts."""
    _, executed, handle = toy_run(
        H2CacheConfig(tau1=0.15, tau2=0.22, hierarchical=False),
        doubles=[[1.0, 1.0, 9.0], [10.0]],
        singles=[[1.0, 1.3, 1.4], [1.0]],
        steps=3,
    )
    assert columns(handle, "decision") == [("warmup", "warmup"), ("hit", "compute"), ("compute", "hit")]
    assert executed == [3, 2, 3, 2]


def test_a_stage_of_one_block_has_nothing_to_skip():
    added, executed, handle = toy_run(
        H2CacheConfig(tau1=9, tau2=9), doubles=[[1.0, 2.0]], singles=[[10.0, 20.0]], steps=2
    )
    assert added == pytest.approx([11.0, 22.0])
    assert executed == [2, 2]
    assert handle.summary()["computed_fraction"] == 1.0


def test_only_the_blocks_behind_the_first_are_skipped(transformer):
    """2 double and 3 single blocks; every step after the first is a hit of both stages."""
    with h2cache.apply(transformer, H2CacheConfig(tau1=float("inf"))), executions(transformer) as calls:
        denoise(transformer, steps=3)
    assert calls == [[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0]]
