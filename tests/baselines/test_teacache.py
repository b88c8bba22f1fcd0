"""TeaCache against an independent plain loop: decisions, sums and images; and how it finds the last step out."""

import math

import pytest
import torch
from loops import denoise, denoising, executions, position_ids
from pictures import picture
from torch import Tensor

import h2cache
from h2cache import Decision
from h2cache.baselines import TeaCacheConfig

LINE = (1.0, 0.0)


class PlainTeaCache:
    """The published loop, written for one image around a transformer whose parts it calls itself."""

    def __init__(self, transformer, threshold: float, coefficients: tuple[float, ...], num_steps: int):
        self.transformer, self.threshold, self.num_steps = transformer, threshold, num_steps
        self.coefficients = coefficients
        self.config, self.device = transformer.config, transformer.device
        self.step, self.sum, self.previous, self.residual = 0, 0.0, None, None
        self.sums: list[float | None] = []
        self.computed: list[bool] = []

    def __call__(self, **call) -> tuple[Tensor]:
        net = self.transformer
        hidden = net.x_embedder(call["hidden_states"])
        time = call["timestep"] * 1000
        temb = net.time_text_embed(time, call["guidance"] * 1000, call["pooled_projections"])
        text = net.context_embedder(call["encoder_hidden_states"])
        rotary = net.pos_embed(torch.cat([call["txt_ids"], call["img_ids"]]))
        modulated = net.transformer_blocks[0].norm1(hidden, emb=temb)[0]
        compute, compared = True, None
        if self.step > 0:
            change = ((modulated - self.previous).abs().mean() / self.previous.abs().mean()).item()
            self.sum += sum(c * change**k for k, c in enumerate(reversed(self.coefficients)))
            compared = self.sum
            compute = self.sum >= self.threshold or self.step == self.num_steps - 1
        self.previous = modulated
        self.computed.append(compute)
        self.sums.append(compared)
        if compute:
            self.sum = 0.0
            entered = hidden
            for block in net.transformer_blocks:
                text, hidden = block(hidden, text, temb, rotary)
            for block in net.single_transformer_blocks:
                text, hidden = block(hidden, text, temb, rotary)
            self.residual = hidden - entered
        else:
            hidden = hidden + self.residual
        self.step += 1
        return (net.proj_out(net.norm_out(hidden, temb)),)


@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.4, 0.8])
@pytest.mark.parametrize("coefficients", [LINE, (2.0, -0.5, 0.3), (-1.0, 0.05)], ids=["line", "parabola", "negative"])
@pytest.mark.parametrize("num_steps", [None, 20])
def test_sums_decides_and_draws_as_the_plain_loop(transformer, threshold, coefficients, num_steps):
    oracle = PlainTeaCache(transformer, threshold, coefficients, 20)
    *_, expected = denoising(oracle, steps=20)
    with h2cache.apply(transformer, TeaCacheConfig(threshold, coefficients, num_steps)) as handle:
        latents = denoise(transformer, steps=20)
    rows = list(handle.trace)
    assert [not row.decision.skips for row in rows] == oracle.computed
    known = [row.diff for row in rows if row.diff is not None]
    assert known == pytest.approx([value for value in oracle.sums if value is not None][: len(known)], rel=1e-4)
    assert len(known) == (19 if num_steps is None else 18), "a last step that is known is not measured"
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_the_thresholds_above_mix_hits_and_misses(transformer):
    patterns = []
    for threshold in (0.1, 0.25, 0.4, 0.8):
        oracle = PlainTeaCache(transformer, threshold, LINE, 20)
        denoise(oracle, steps=20)
        patterns.append(sum(oracle.computed))
    assert (
        patterns == sorted(patterns, reverse=True) and len(set(patterns)) == 4 and 2 < patterns[-1] < patterns[0] < 20
    )


def shifted(steps: int, shift: float, start: float = 1.0) -> list[float]:
    """Noise levels spaced evenly from `start` to one spacing above zero, under FLUX's exponential shift."""
    levels = [start * (steps - step) / steps for step in range(steps)]
    return [shift * t / (1 + (shift - 1) * t) for t in levels]


@pytest.mark.parametrize("steps", [3, 4, 5, 8, 20, 28, 50, 100])
@pytest.mark.parametrize("shift", [1.0, 1.65, 3.16, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [1.0, 0.6])
def test_the_last_step_is_found_out_from_the_timesteps(transformer, steps, shift, dtype, start):
    """At any step count, shift and image-to-image strength, also in the precision that pipelines call with."""
    times = shifted(steps, shift, start)

    def set_time(step, call):
        call["timestep"] = torch.tensor([times[step]], dtype=dtype)

    with h2cache.apply(transformer, TeaCacheConfig(math.inf, LINE)) as handle:
        denoise(transformer, steps=steps, before_step=set_time)
    decisions = [row.decision for row in handle.trace]
    assert decisions == [Decision.WARMUP, *[Decision.HIT] * (steps - 2), Decision.COMPUTE]


@pytest.mark.parametrize("steps", [3, 7, 12])
def test_the_last_step_of_a_pipeline_is_found_out(tiny_pipe, steps):
    """With its own scheduler and dynamic shift; run by run, each with its own number of steps."""
    with h2cache.apply(tiny_pipe, TeaCacheConfig(math.inf, LINE)) as handle:
        picture(tiny_pipe, steps=5)
        picture(tiny_pipe, steps=steps)
    last = [row.decision for row in handle.trace if row.run == 1]
    assert last == [Decision.WARMUP, *[Decision.HIT] * (steps - 2), Decision.COMPUTE]


def test_a_schedule_of_another_spacing_needs_num_steps(transformer):
    """Where timesteps repeat or are spaced otherwise nothing is concluded; `num_steps` says it."""

    def set_time(step, call):
        call["timestep"] = torch.tensor([[1.0, 0.9, 0.9, 0.3, 0.3][step]])

    for num_steps, last in ((None, Decision.HIT), (5, Decision.COMPUTE)):
        with h2cache.apply(transformer, TeaCacheConfig(math.inf, LINE, num_steps)) as handle:
            denoise(transformer, steps=5, before_step=set_time)
        assert list(handle.trace)[-1].decision is last


def test_the_sum_starts_again_with_a_new_run(transformer):
    ids = [position_ids(4, 4) for _ in range(2)]
    with h2cache.apply(transformer, TeaCacheConfig(0.4, LINE)) as handle:
        first, second = (denoise(transformer, img_ids=each) for each in ids)
    assert torch.equal(first, second)
    assert [row.diff for row in handle.trace if row.run == 0] == [row.diff for row in handle.trace if row.run == 1]


def test_no_block_runs_to_decide(transformer):
    with h2cache.apply(transformer, TeaCacheConfig(math.inf, LINE, num_steps=6)), executions(transformer) as calls:
        denoise(transformer, steps=6)
    # The norm of the first block is the probe; no other norm is touched on a hit.
    assert [sum(blocks) for blocks in calls] == [6, 1, 1, 1, 1, 6]
