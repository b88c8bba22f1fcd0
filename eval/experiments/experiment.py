"""What an experiment is: which settings on which prompts and seeds, measured how, and shown as what."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from h2cache.eval.errors import UserError, check_count
from h2cache.eval.experiments.settings import Setting
from h2cache.eval.generation.prompts import Prompt, PromptSet
from h2cache.eval.generation.records import Cell
from h2cache.eval.metrics.registry import BASELINE_IMAGE, CONVERGED_IMAGE, UNCACHED_IMAGE, kind
from h2cache.eval.models.schedulers import NAMES as SCHEDULERS
from h2cache.eval.report.results import BASELINE, Output
from h2cache.tuning import Speedup, WallSpeedup

FIXED_SEED = 0  # the paper's, for every prompt
SEEDS = ("fixed", "per_prompt")
MATCHED = {"time": WallSpeedup, "blocks": Speedup}  # what can be the same for all settings of an experiment


@dataclass(frozen=True)
class Match:
    """Settings are tuned to the same speedup before they are drawn (`h2cache.eval.experiments.match`).

    Fields:
        speedup: against the baseline.
        prompts: the last so many of the set are for tuning, and not drawn.
        measured: "time" of whole pipeline calls, or "blocks" computed.
        apart: entries of the settings that are tuned to another speedup, by name.
    """

    speedup: float
    prompts: int
    measured: str = "time"
    apart: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.measured not in MATCHED:
            raise UserError(f"match: measured={self.measured!r} is not allowed: choose {' or '.join(MATCHED)}")
        check_count("match: prompts", self.prompts)
        try:
            for entry in (None, *self.apart):
                self.target(entry)
        except ValueError as error:
            raise UserError(f"match: {error}") from error

    def target(self, entry: str | None) -> Speedup:
        """Of an entry of the settings, for `h2cache.tune`."""
        return MATCHED[self.measured](self.apart.get(entry, self.speedup))


@dataclass(frozen=True)
class Row:
    """A setting on one prompt and seed: what is drawn, and what by name its metrics compare it with."""

    setting: Setting
    cell: Cell
    references: Mapping[str, Cell]


@dataclass(frozen=True)
class Experiment:
    """`settings` on the first `limit` prompts (None: all), `steps` denoising steps each (None: as many as the model).

    Fields:
        seeds: "fixed" (0 for every prompt) or "per_prompt" (0, 1, ... in the order of the set).
        seeds_per_prompt: images of each prompt; further ones are numbered on from the first ones of all prompts.
        converged_steps: for the solution that metrics `@converged` compare with.
        converged_scheduler: its scheduler, one of `h2cache.eval.models.schedulers.NAMES`; None: the pipeline's own.
        set_metrics: of a setting's images as a set, against the baseline's.
        left_out: settings that this machine lacks a library for, and what is missing.
        match: to what the settings are tuned; None: they are drawn as they are written.
    """

    name: str
    title: str
    description: str
    prompts: PromptSet
    limit: int | None
    seeds: str
    seeds_per_prompt: int
    steps: int | None
    converged_steps: int
    converged_scheduler: str | None
    metrics: tuple[str, ...]
    settings: tuple[Setting, ...]
    outputs: tuple[Output, ...]
    left_out: Mapping[str, str]
    match: Match | None = None
    set_metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seeds not in SEEDS:
            raise UserError(f"{self.name}: seeds={self.seeds!r} is not allowed: it must be {' or '.join(SEEDS)}")
        for field in ("limit", "steps"):
            check_count(f"{self.name}: {field}", getattr(self, field), optional=True)
        for field in ("seeds_per_prompt", "converged_steps"):
            check_count(f"{self.name}: {field}", getattr(self, field))
        if self.converged_scheduler not in (None, *SCHEDULERS):
            raise UserError(
                f"{self.name}: converged_scheduler={self.converged_scheduler!r} is not allowed: it must be null or one "
                f"of {', '.join(SCHEDULERS)}"
            )
        if not self.settings:
            raise UserError(
                f"{self.name}: there are no settings; name at least one, such as Baseline: {{method: none}}"
            )

    @property
    def converged_run(self) -> str:
        """What the converged solution is, in words."""
        return f"{self.converged_steps} steps" + (f" of {self.converged_scheduler}" if self.converged_scheduler else "")

    def rows(self, prompts: Sequence[Prompt], limit: int | None, steps: int) -> Iterator[Row]:
        """What is drawn, prompt by prompt, on `limit` prompts at most; `steps` where the experiment says nothing."""
        steps = self.steps or steps
        for index, prompt in enumerate(prompts[: len(prompts) - self._held_out(prompts)][:limit][: self.limit]):
            first = self._seed(index)
            apart = 1 if self.seeds == "fixed" else len(prompts)
            for seed in range(first, first + apart * self.seeds_per_prompt, apart):
                for setting in self.settings:
                    if not setting.is_drawn:
                        continue
                    run = {"scheduler": setting.scheduler, "weights": setting.weights, "call": setting.call}
                    cell = Cell(prompt, seed, setting.steps or steps, setting.config, **run)
                    yield Row(setting, cell, self._references(cell, steps))

    def tuning_prompts(self, prompts: Sequence[Prompt]) -> tuple[tuple[Prompt, ...], int]:
        """Those that are for tuning alone, and the seed of the first; that of the next is one more."""
        count = len(prompts) - self._held_out(prompts)
        return tuple(prompts[count:]), self._seed(count)

    def _held_out(self, prompts: Sequence[Prompt]) -> int:
        count = self.match.prompts if self.match else 0
        if count >= len(prompts):
            raise UserError(f"{self.name}: match: prompts={count} leaves none of {len(prompts)} prompts to draw")
        return count

    def _seed(self, index: int) -> int:
        return FIXED_SEED if self.seeds == "fixed" else index

    def _references(self, cell: Cell, steps: int) -> dict[str, Cell]:
        """What the experiment's metrics compare the cell with; the baseline always, which its time is compared with."""
        wanted = {kind(name).reference for name in self.metrics}
        plain = replace(cell, method=None)
        known = {
            BASELINE_IMAGE: replace(plain, steps=steps, scheduler=None, weights=None),
            UNCACHED_IMAGE: plain,
            CONVERGED_IMAGE: replace(
                plain, steps=self.converged_steps, scheduler=self.converged_scheduler, weights=None
            ),
        }
        has_baseline = any(setting.name == BASELINE for setting in self.settings)
        return {
            name: reference
            for name, reference in known.items()
            # An uncached image is nothing to compare with itself; the baseline's time is always compared with.
            if (has_baseline and not cell.call if name == BASELINE_IMAGE else name in wanted and reference != cell)
        }
