"""`h2cache.tune`: settings that reach a PSNR or a speedup, and the curve of what was tried."""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, HunyuanVideoPipeline
from tiny import TEXT_TOKENS

import h2cache
from h2cache import CacheConfig, H2CacheConfig, Psnr, Speedup
from h2cache.baselines import BlockCacheConfig, ClusCaConfig, HiCacheConfig, TaylorSeerConfig, TeaCacheConfig
from h2cache.eval.files import REPOSITORY
from h2cache.eval.metrics.images import psnr
from h2cache.policy.forecasts import Taylor
from h2cache.policy.rules import Interval
from h2cache.policy.stages import NETWORK, BlockStage
from h2cache.runtime.interception import interception_of
from h2cache.tuning import WallSpeedup, as_written

PROMPTS = ("a red sign", "a cat on a mat")
CALL = dict(height=32, width=32, num_inference_steps=12, max_sequence_length=TEXT_TOKENS)
METHODS = [
    pytest.param(H2CacheConfig(warmup_steps=2), id="h2"),
    pytest.param(BlockCacheConfig(), id="block-cache"),
    pytest.param(TeaCacheConfig(coefficients=(1.0, 0.0)), id="teacache"),
    pytest.param(TaylorSeerConfig(order=2), id="taylorseer"),
    pytest.param(HiCacheConfig(granularity="stage", sigma=0.6), id="hicache"),
    pytest.param(ClusCaConfig(clusters=3), id="clusca"),
]
KNOBS = {"threshold", "tau1", "tau2", "interval"}


def decibels(drawn: np.ndarray, plain: np.ndarray) -> float:
    """PSNR of all frames together, 0 to 255."""
    return float(-10 * np.log10(np.square(drawn / 255.0 - plain / 255.0).mean()))


def draw(pipe: FluxPipeline, seed: int = 0):
    noise = torch.Generator("cpu").manual_seed(seed)
    return pipe(PROMPTS[seed], generator=noise, **CALL).images[0]


def measured(pipe: FluxPipeline, config: CacheConfig) -> tuple[float, float]:
    """Mean PSNR of saved images and fraction computed, without `tune`."""
    plain = [draw(pipe, seed) for seed in range(len(PROMPTS))]
    with h2cache.apply(pipe, config) as handle:
        drawn = [draw(pipe, seed) for seed in range(len(PROMPTS))]
    return sum(map(psnr, drawn, plain)) / len(PROMPTS), handle.summary()["computed_fraction"]


@pytest.mark.parametrize("method", METHODS)
def test_a_speedup_is_reached_with_the_best_images_that_were_tried(tiny_pipe, method):
    found = h2cache.tune(tiny_pipe, PROMPTS, method, Speedup(1.6), trials=3, **CALL)
    fast = [trial for trial in found.curve if trial.speedup >= 1.6]
    assert found.best in fast and found.best.psnr == max(trial.psnr for trial in fast)
    assert (found.best.psnr, found.best.computed_fraction) == pytest.approx(measured(tiny_pipe, found.config))


@pytest.mark.parametrize("method", METHODS[::2])  # a target is the same to all; two thresholds, one, an interval
def test_a_psnr_is_reached_as_fast_as_any_that_were_tried(tiny_pipe, method):
    asked = measured(tiny_pipe, method.updated(**{name: 3 if name == "interval" else 0.3 for name in knobs_of(method)}))
    found = h2cache.tune(tiny_pipe, PROMPTS, method, Psnr(asked[0] - 0.01), trials=3, **CALL)
    near = [trial for trial in found.curve if trial.psnr >= asked[0] - 0.01]
    assert found.best in near and found.best.speedup == max(trial.speedup for trial in near) > 1
    assert (found.best.psnr, found.best.computed_fraction) == pytest.approx(measured(tiny_pipe, found.config))


def knobs_of(method: CacheConfig) -> set[str]:
    return {name for name in KNOBS if hasattr(method, name)}


@pytest.mark.parametrize("speedup", [1.3, 1.5, 2.0, 3.0])
def test_an_interval_is_the_smallest_that_is_fast_enough(tiny_pipe, speedup):
    """12 steps, 3 of warm-up: 1 in n of the other 9 is computed."""
    computed = {n: 3 + 9 // n for n in range(1, 11)}
    expected = min(n for n, steps in computed.items() if 12 / steps >= speedup)
    method = TaylorSeerConfig(interval=4, granularity="stage")
    tried = h2cache.tune(tiny_pipe, PROMPTS[:1], method, Speedup(speedup), **CALL).curve
    found = {trial.config.interval: round(12 * trial.computed_fraction, 9) for trial in tried}
    assert expected in found and all(steps == computed.get(n, 3) for n, steps in found.items())


def test_a_speedup_that_a_setting_has_exactly_is_reached_by_it(tiny_pipe):
    """4 of 12 steps computed: 1 / (1 - 2 / 3) is a little less than 3 in floating point."""
    method = TaylorSeerConfig(granularity="stage")
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], method, Speedup(3), over={"interval": (5, 7, 9)}, **CALL)
    assert found.config.interval in (5, 7, 9) and found.best.computed_fraction == pytest.approx(1 / 3)


def test_a_threshold_is_followed_to_its_boundary(tiny_pipe):
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], BlockCacheConfig(), Speedup(1.7), trials=10, **CALL)
    slower = max(trial.config.threshold for trial in found.curve if trial.speedup < 1.7)
    faster = min(trial.config.threshold for trial in found.curve if trial.speedup >= 1.7)
    assert slower < faster < 1.06 * slower


@pytest.mark.parametrize("method", METHODS)
def test_other_fields_are_kept(tiny_pipe, method):
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], method, Speedup(1.3), trials=1, **CALL)
    for trial in found.curve:
        back = trial.config.updated(**{name: getattr(method, name) for name in knobs_of(method)})
        assert back == method


def test_two_thresholds_are_searched_at_several_ratios(tiny_pipe):
    curve = h2cache.tune(tiny_pipe, PROMPTS[:1], H2CacheConfig(), Speedup(1.3), trials=1, **CALL).curve
    ratios = {round(trial.config.tau2 / trial.config.tau1, 3) for trial in curve}
    assert len(ratios) >= 3 and 0 in ratios


def test_over_searches_every_combination_of_further_fields(tiny_pipe):
    over = {"order": (1, 2), "sigma": (0.4, 0.6)}
    method = HiCacheConfig(granularity="stage")
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], method, Speedup(1.5), over=over, trials=2, **CALL)
    tried = {(trial.config.order, trial.config.sigma) for trial in found.curve}
    assert tried == {(1, 0.4), (1, 0.6), (2, 0.4), (2, 0.6)}


def test_over_the_searched_fields_tries_exactly_what_it_names(tiny_pipe):
    over = {"tau1": (0.2, 0.4), "tau2": (0.1, 0.3)}
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], H2CacheConfig(), Speedup(1.01), over=over, **CALL)
    tried = {(trial.config.tau1, trial.config.tau2) for trial in found.curve}
    assert tried == {(0.2, 0.1), (0.2, 0.3), (0.4, 0.1), (0.4, 0.3)}


def test_the_curve_goes_from_slow_to_fast_and_each_setting_is_told_once(tiny_pipe):
    told = []
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], TeaCacheConfig(), Speedup(1.5), on_trial=told.append, **CALL)
    speedups = [trial.speedup for trial in found.curve]
    assert speedups == sorted(speedups)
    assert sorted(told, key=lambda trial: trial.speedup) == list(found.curve)
    assert len({trial.config for trial in told}) == len(told) > 3
    assert all(trial.wall_speedup > 0 for trial in told)


def test_equal_arguments_give_equal_results(tiny_pipe):
    first, second = (h2cache.tune(tiny_pipe, PROMPTS, BlockCacheConfig(), Speedup(1.5), trials=4, **CALL) for _ in "ab")
    assert first == second


def test_noise_begins_at_the_seed(tiny_pipe):
    one, other = (
        h2cache.tune(tiny_pipe, PROMPTS[:1], TaylorSeerConfig(), Speedup(1.5), seed=seed, trials=1, **CALL).curve
        for seed in (0, 5)
    )
    assert [trial.speedup for trial in one] == [trial.speedup for trial in other]
    assert [trial.psnr for trial in one] != [trial.psnr for trial in other]


def test_the_pipeline_is_left_without_a_cache(tiny_pipe):
    """Not even with one that was applied before, which the uncached images must not be drawn with."""
    plain = draw(tiny_pipe)
    h2cache.apply(tiny_pipe, BlockCacheConfig(threshold=9.0))
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], BlockCacheConfig(), Speedup(1.2), trials=1, **CALL)
    assert interception_of(tiny_pipe.transformer) is None
    assert draw(tiny_pipe).tobytes() == plain.tobytes()
    assert found.curve[-1].psnr < 60  # computed once and then never again, against a true uncached image


@pytest.mark.parametrize("target", [Psnr(500.0), Speedup(13.0)])
def test_out_of_reach_is_an_error_with_what_came_nearest(tiny_pipe, target):
    with pytest.raises(h2cache.Unreachable, match="TaylorSeerConfig did not reach") as caught:
        h2cache.tune(tiny_pipe, PROMPTS[:1], TaylorSeerConfig(), target, **CALL)
    assert isinstance(caught.value, ValueError) and caught.value.best in caught.value.curve
    nearest = {
        Psnr: max(trial.psnr for trial in caught.value.curve if trial.computed_fraction < 1),
        Speedup: caught.value.curve[-1].speedup,
    }
    assert nearest[type(target)] in (caught.value.best.psnr, caught.value.best.speedup)


@dataclass(frozen=True)
class NothingToTurn(CacheConfig):
    order: int = 1

    def compose(self) -> tuple[BlockStage, ...]:
        return (BlockStage("network", NETWORK, Interval(3, 2), Taylor(self.order)),)


def test_a_method_with_nothing_to_search(tiny_pipe):
    with pytest.raises(TypeError, match="NothingToTurn has no threshold and no interval"):
        h2cache.tune(tiny_pipe, PROMPTS, NothingToTurn(), Speedup(2), **CALL)
    over = {"order": (0, 1)}
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], NothingToTurn(), Speedup(2), over=over, **CALL)
    assert {trial.config.order for trial in found.curve} == {0, 1}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(prompts="a sign"), ValueError, "prompts = 'a sign'"),
        (dict(prompts=[]), ValueError, "prompts"),
        (dict(trials=0), ValueError, "trials = 0"),
        (dict(over={"tau1": (0.1,)}), ValueError, "tau1, tau2"),
        (dict(over={"oder": (1,)}), ValueError, "oder"),
        (dict(over={"order": (0,)}), ValueError, "order"),
        (dict(pipe=object()), TypeError, "knows the blocks"),
        (dict(method=H2CacheConfig), TypeError, "config"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_drawn(tiny_pipe, changes, error, words, monkeypatch):
    monkeypatch.setattr(type(tiny_pipe), "__call__", lambda *_, **__: pytest.fail("an image was drawn"))
    arguments = dict(pipe=tiny_pipe, prompts=PROMPTS, method=H2CacheConfig(), target=Speedup(2)) | changes
    with pytest.raises(error, match=words):
        h2cache.tune(**arguments, **CALL)


class Clock:
    """Seconds that pass with the model's work, so that a measured speedup is known beforehand: one for each step whose
    last double block is computed, and `drift` more for each second that passed before the step."""

    def __init__(self, pipe: FluxPipeline, drift: float = 0.0):
        self.now, self.drift = 0.0, drift
        pipe.transformer.transformer_blocks[-1].attn.register_forward_hook(self.computed)
        pipe.transformer.register_forward_pre_hook(self.stepped)

    def computed(self, *_) -> None:
        self.now += self.pace

    def stepped(self, *_) -> None:
        self.pace = 1 + self.drift * self.now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("drift", [0.0, 0.01])
def test_a_measured_speedup_is_reached_on_a_machine_that_gets_slower(own_pipe, monkeypatch, drift):
    """12 steps, 3 of warm-up; with the drift each computed step takes 1 % longer than the one before it."""
    monkeypatch.setattr(
        sys.modules["h2cache.tuning.tune"], "time", SimpleNamespace(perf_counter=Clock(own_pipe, drift))
    )
    method = TaylorSeerConfig(interval=2, granularity="stage")
    found = h2cache.tune(own_pipe, PROMPTS, method, WallSpeedup(1.75), **CALL)
    assert found.config.interval == 3  # 3 + 9 // 3 = 6 of 12 steps
    assert found.best.wall_speedup == pytest.approx(2, rel=0.12)


@pytest.mark.parametrize(("target", "uncached"), [(Speedup(1.75), 1), (Psnr(20), 1), (WallSpeedup(0.01), 3)])
def test_only_times_need_an_uncached_run_beside_each_cached_one(own_pipe, monkeypatch, target, uncached):
    """Over three settings on two prompts, after the two runs of the warm-up."""
    calls = Counter()
    own_pipe.transformer.register_forward_pre_hook(lambda *_: calls.update(steps=1))
    method = TaylorSeerConfig(granularity="stage")
    h2cache.tune(own_pipe, PROMPTS[:2], method, target, over={"interval": (2, 3, 4)}, **CALL)
    assert calls["steps"] == CALL["num_inference_steps"] * (2 + 2 * (3 + uncached))


def test_knobs_may_be_given(tiny_pipe):
    method = H2CacheConfig(tau1=0.2, tau2=0.3)
    found = h2cache.tune(tiny_pipe, PROMPTS[:1], method, Speedup(1.5), knobs=[as_written(method)], trials=3, **CALL)
    assert {round(trial.config.tau2 / trial.config.tau1, 9) for trial in found.curve} == {1.5}
    assert as_written(NothingToTurn()) is None


@pytest.mark.parametrize("target", [Psnr, Speedup, WallSpeedup])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "35", True])
def test_a_target_is_a_positive_number(target, value):
    with pytest.raises(ValueError, match=f"{target.__name__}\\."):
        target(value)


def test_on_flux_mini(flux_mini):
    """HiCache at four times fewer blocks, on one prompt: as near as the forecast is good."""
    call = dict(height=128, width=128, num_inference_steps=20, max_sequence_length=40)
    prompt = 'a red square sign that says "GATE" in white bold letters, on a blue background'
    found = h2cache.tune(flux_mini, [prompt], HiCacheConfig(granularity="stage"), Speedup(2.5), trials=3, **call)
    assert found.best.speedup >= 2.5 and found.best.psnr > 25
    assert found.best.psnr == max(trial.psnr for trial in found.curve if trial.speedup >= 2.5)


def test_on_videos():
    pipe = HunyuanVideoPipeline.from_pretrained(REPOSITORY / "assets/hunyuan-mini", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = dict(height=16, width=16, num_frames=5, num_inference_steps=6, max_sequence_length=24)
    call["prompt_template"] = {"template": "{}", "crop_start": 0}
    found = h2cache.tune(pipe, ["a pink ring"], BlockCacheConfig(), Speedup(1.4), trials=2, **call)
    noise = torch.Generator().manual_seed(0)
    plain = pipe("a pink ring", generator=noise, **call).frames[0]
    with h2cache.apply(pipe, found.config):
        drawn = pipe("a pink ring", generator=noise.manual_seed(0), **call).frames[0]
    assert found.best.speedup >= 1.4
    assert found.best.psnr == pytest.approx(decibels(np.stack(drawn), np.stack(plain)))


def test_what_was_tuned_says_what_it_found():
    best = h2cache.Trial(H2CacheConfig(tau1=0.1), 0.5, 38.25, 1.75)
    told = repr(h2cache.Tuned(h2cache.Psnr(38), best, (best,)))
    assert all(word in told for word in ("38.25 dB", "2.00 times fewer blocks", "1.75 times the speed", "tau1=0.1"))
