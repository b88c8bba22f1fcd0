"""Settings that find themselves: `tune` turns a method's knob until its images, or its speed, are what was asked for.

A knob (`knobs.py`) is followed by bisection, since more skipping is less fidelity. Every setting that was tried is
returned with the answer, so that the next question may need no further run.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import CacheConfig
from ..handle import apply
from .knobs import Knob, knobs_of
from .targets import Target, Trial, WallSpeedup


class Unreachable(ValueError):
    """No setting that was tried meets the target. `best` came nearest; `curve` has them all."""

    def __init__(self, method: CacheConfig, target: Target, best: Trial, curve: tuple[Trial, ...]):
        self.best, self.curve = best, curve
        super().__init__(
            f"{type(method).__name__} did not reach {target} in {len(curve)} settings: nearest was {best.config}, "
            f"{best.psnr:.2f} dB at {best.speedup:.2f} times fewer blocks, {best.wall_speedup:.2f} times the speed; "
            "ask for less, or give other fields to try with over="
        )


@dataclass(frozen=True)
class Tuned:
    """The answer to a target. `curve` has every setting that was tried, from the slowest to the fastest."""

    target: Target
    best: Trial
    curve: tuple[Trial, ...]

    def __repr__(self) -> str:
        best = self.best
        return (
            f"Tuned({self.target}: {best.config}, {best.psnr:.2f} dB, {best.speedup:.2f} times fewer blocks, "
            f"{best.wall_speedup:.2f} times the speed, of {len(self.curve)} settings)"
        )

    @property
    def config(self) -> CacheConfig:
        """For `h2cache.apply`."""
        return self.best.config


def tune(
    pipe: Any,
    prompts: Sequence[str],
    method: CacheConfig,
    target: Target,
    *,
    over: Mapping[str, Sequence[Any]] | None = None,
    knobs: Sequence[Knob] | None = None,
    seed: int = 0,
    trials: int = 8,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    **call: Any,
) -> Tuned:
    """The setting of `method` that meets `target` best on `prompts`, and the curve of all that were tried.

    `pipe(prompt, generator=..., output_type="pt", **call)` draws, on noise of seed, seed + 1, ... for the prompts; a
    cache that is applied to it is removed. `method` is a configuration: its threshold, two thresholds or interval are
    searched, its other fields kept. `target` is `Psnr(decibels)`, answered by the fastest setting that is so near,
    `Speedup(times)`, by the nearest that computes so few blocks, or `WallSpeedup(times)`, by the nearest that takes so
    little time; only this one draws the prompts without a cache again for each setting. `over` gives values for further
    fields, each combination of which is searched; where it names the searched fields themselves, exactly its
    combinations are tried. `knobs` are searched one after the other; None: all that the method has, two thresholds at
    several ratios. Each search takes at most `trials` settings after the one that skips all it can; `on_trial` sees
    each as it is measured. Equal arguments give equal results, wall times and what is chosen by them apart.

    Unreachable (a ValueError) where no setting meets the target; TypeError for a method that has nothing to search, and
    whatever `h2cache.apply` raises; ValueError for fields and values that `method` does not have.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts = {prompts!r}: must be a list of one prompt or more")
    if trials < 1:
        raise ValueError(f"trials = {trials!r}: must be a whole number from 1")
    apply(pipe, method).remove()  # refuses what cannot be cached, and removes what was applied before
    searches = list(_searches(method, knobs_of(method) if knobs is None else list(knobs), dict(over or {})))
    bench = _Bench(pipe, prompts, seed, call, on_trial, paired=isinstance(target, WallSpeedup))
    bench.warm_up(method)
    for start, knob in searches:
        if knob is None:
            bench.measure(start)
        else:
            _follow(knob, start, bench.measure, target, trials)
    curve = tuple(sorted(bench.trials, key=lambda trial: trial.speedup))
    answers = [trial for trial in curve if target.met_by(trial)]
    if not answers:
        raise Unreachable(method, target, max(curve, key=target.nearness), curve)
    return Tuned(target, max(answers, key=target.worth), curve)


def _searches(
    method: CacheConfig, knobs: Sequence[Knob], over: dict[str, Sequence[Any]]
) -> Iterator[tuple[CacheConfig, Knob | None]]:
    """Where to start, and the knob to follow from there: None where `over` leaves nothing to follow."""
    turned = {name for knob in knobs for name in knob.fields}
    if not turned and not over:
        raise TypeError(
            f"{type(method).__name__} has no threshold and no interval to search: say what to try with over="
        )
    if turned & over.keys() and not turned <= over.keys():
        raise ValueError(f"over gives values for some of {', '.join(sorted(turned))}: give all of them or none")
    followed: Sequence[Knob | None] = [None] if turned <= over.keys() else knobs
    for values in itertools.product(*over.values()):
        start = method.updated(**dict(zip(over, values, strict=True)))
        yield from ((start, knob) for knob in followed)


def _follow(
    knob: Knob, start: CacheConfig, measure: Callable[[CacheConfig], Trial], target: Target, trials: int
) -> None:
    """Bisect for the boundary of `target`, after a bracket around it has been found."""

    def beyond(position: float) -> bool:
        return target.beyond(measure(start.updated(**knob.setting(position))))

    if not beyond(knob.most):
        return
    low: float | None = None
    high: float | None = None
    position: float | None = knob.start(start)
    for _ in range(trials):
        if position is None:
            return
        if beyond(position):
            high = position
        else:
            low = position
        if low is not None and high is not None:
            position = knob.between(low, high)
        else:
            position = knob.smaller(position) if low is None else knob.larger(position)


class _Bench:
    """Measures settings on the same prompts and noise.

    With `paired` an uncached run stands right before each cached one, so that both meet the same load of the machine;
    without, each prompt is drawn uncached once.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seed: int,
        call: dict[str, Any],
        on_trial: Callable[[Trial], None],
        paired: bool,
    ):
        self.pipe, self.prompts, self.seed, self.call, self.on_trial = pipe, prompts, seed, call, on_trial
        self.paired = paired
        self.plain: dict[int, tuple[Tensor, float]] = {}
        self.trials: list[Trial] = []

    def warm_up(self, config: CacheConfig) -> None:
        """The first calls of a process, and of a method, are slower than the others."""
        self._draw(0)
        with apply(self.pipe, config):
            self._draw(0)

    def measure(self, config: CacheConfig) -> Trial:
        """Each prompt with the setting, against the prompt without a cache."""
        fractions, psnrs, ratios = [], [], []
        for index in range(len(self.prompts)):
            if self.paired or index not in self.plain:
                self.plain[index] = self._draw(index)
            plain, before = self.plain[index]
            with apply(self.pipe, config) as handle:
                image, seconds = self._draw(index)
            fractions.append(handle.summary()["computed_fraction"])
            psnrs.append(_psnr(image, plain))
            ratios.append(before / seconds)
        trial = Trial(config, statistics.mean(fractions), statistics.mean(psnrs), statistics.median(ratios))
        self.trials.append(trial)
        self.on_trial(trial)
        return trial

    def _draw(self, index: int) -> tuple[Tensor, float]:
        """Images or videos as they would be saved, 0 to 255, and the seconds that the pipeline took."""
        noise = torch.Generator("cpu").manual_seed(self.seed + index)
        started = time.perf_counter()
        images = self.pipe(self.prompts[index], generator=noise, output_type="pt", **self.call)[0]
        images = images.to("cpu", torch.float32)  # waits for the device
        return (images * 255).round(), time.perf_counter() - started


def _psnr(images: Tensor, plain: Tensor) -> float:
    error = (images - plain).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf
