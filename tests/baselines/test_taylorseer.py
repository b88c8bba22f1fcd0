"""TaylorSeer is diffusers' TaylorSeer: the same forecasts of the same modules; and its published schedule."""

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import FluxPipeline, TaylorSeerCacheConfig
from loops import blocks_of, denoise, executions
from pictures import picture

import h2cache
from h2cache import CacheConfig, Decision
from h2cache.baselines import TaylorSeerConfig
from h2cache.policy.forecasts import Taylor
from h2cache.policy.rules import RuleState
from h2cache.policy.stages import NETWORK, ModuleStage

MODULES = [r"transformer_blocks\.\d+\.(attn|ff|ff_context)", r"single_transformer_blocks\.\d+\.proj_out"]


@dataclass(frozen=True)
class DiffusersSchedule:
    """Which steps diffusers computes: its first forecast window is shorter than the paper's."""

    interval: int
    first: int
    threshold = float("nan")
    reference_every_step = False

    def without_measuring(self, state: RuleState, step: int, parent_skipped: bool) -> Decision:
        if step < self.first:
            return Decision.WARMUP
        return Decision.COMPUTE if (step - self.first - 1) % self.interval == 0 else Decision.HIT


@dataclass(frozen=True)
class AsDiffusers(CacheConfig):
    """A method of one's own: TaylorSeer with another schedule, and differences from the first step on."""

    interval: int = 5
    order: int = 1
    first: int = 3

    def compose(self) -> tuple[ModuleStage, ...]:
        rule = DiffusersSchedule(self.interval, self.first)
        return (ModuleStage("modules", NETWORK, rule, Taylor(self.order)),)


def with_diffusers(pipe: FluxPipeline, interval: int, order: int, **options) -> torch.Tensor:
    oracle = copy.copy(pipe)
    oracle.transformer = copy.deepcopy(pipe.transformer)
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=MODULES,
    )
    oracle.transformer.enable_cache(config)
    return picture(oracle, **options)


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_forecasts_as_diffusers_does(tiny_pipe, interval, order):
    expected = with_diffusers(tiny_pipe, interval, order, steps=20)
    with h2cache.apply(tiny_pipe, AsDiffusers(interval=interval, order=order)):
        latents = picture(tiny_pipe, steps=20)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(latents, picture(tiny_pipe, steps=20))


def test_forecasts_as_diffusers_does_on_flux_mini(flux_mini):
    run = dict(height=128, width=128, max_sequence_length=40, steps=16)
    expected = with_diffusers(flux_mini, 4, 1, **run)
    with h2cache.apply(flux_mini, AsDiffusers(interval=4, order=1)):
        latents = picture(flux_mini, **run)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("granularity", ["module", "stage"])
@pytest.mark.parametrize(
    ("interval", "first_enhance", "expected"),
    [(5, 3, "wwwhhhhchhhhch"), (3, 1, "whhchhchhchhch"), (1, 2, "wwcccccccccccc"), (20, 4, "wwwwhhhhhhhhhh")],
)
def test_the_published_schedule(transformer, granularity, interval, first_enhance, expected):
    """The counter runs from the last computed step: steps 0, 1, 2, 7, 12 at interval 5."""
    config = TaylorSeerConfig(interval=interval, first_enhance=first_enhance, granularity=granularity)
    with h2cache.apply(transformer, config) as handle:
        denoise(transformer, steps=len(expected))
    for stage in {row.stage for row in handle.trace}:
        assert "".join(row.decision[0] for row in handle.trace if row.stage == stage) == expected


@pytest.mark.parametrize("order", [0, 1, 2])
def test_differences_start_at_the_last_of_the_first_steps(order):
    """`first_enhance` 3: D_1 at step 2, from steps 1 and 2; D_2 only at the next computed step."""
    stage, *_ = TaylorSeerConfig(order=order).compose()
    assert [stage.order_at(step) for step in (0, 1, 2, 7)] == [0, 0, order, order]


def test_stages_run_nothing_where_they_forecast(transformer):
    with h2cache.apply(transformer, TaylorSeerConfig(interval=4, granularity="stage")) as handle:
        with executions(transformer) as calls:
            denoise(transformer, steps=11)
    assert [sum(blocks) for blocks in calls] == [5, 5, 5, 0, 0, 0, 5, 0, 0, 0, 5]
    assert handle.summary()["computed_fraction"] == pytest.approx(5 / 11)


def test_modules_run_norms_only_where_they_forecast(transformer):
    """Attention and MLPs are what costs: none of their matrices is multiplied."""
    counts: list[int] = []
    linears = [
        linear
        for block in blocks_of(transformer)
        for name, linear in block.named_modules()
        if isinstance(linear, torch.nn.Linear) and "norm" not in name
    ]
    hooks = [linear.register_forward_hook(lambda *_: counts.__setitem__(-1, counts[-1] + 1)) for linear in linears]
    hooks.append(transformer.register_forward_pre_hook(lambda *_: counts.append(0)))
    with h2cache.apply(transformer, TaylorSeerConfig(interval=4)):
        denoise(transformer, steps=11)
    for hook in hooks:
        hook.remove()
    all_of_them = counts[0]
    assert all_of_them >= len(linears) - 2
    assert counts == [all_of_them * computed for computed in (1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1)]


def test_a_linear_feature_is_forecast_exactly():
    """Whatever the granularity, forecasts of order 1 are lines through the last two computed steps."""
    assert Taylor(1).coefficients(4) == [1.0, 4.0]
    assert Taylor(2).coefficients(4) == [1.0, 4.0, 8.0]
