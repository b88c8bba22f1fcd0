"""What an experiment measured, and what is made of it: the types that tables, figures and the report share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from h2cache.eval.generation.backends import Method
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.metrics.sets import SetScore
from h2cache.eval.models.pipelines import ModelConfig

if TYPE_CHECKING:
    from h2cache.eval.report.tables.sheet import Sheet

KEY = ["prompt_id", "seed"]  # which image
BASELINE = "Baseline"  # the setting without a cache, which times and images are compared with


@dataclass(frozen=True)
class Tuning:
    """What tuning found for a setting before the experiment was drawn, on prompts that the experiment does not show.

    Fields:
        asked: the speedup that was searched for.
        measured: of what: "time" of whole pipeline calls, or "blocks" computed.
        fields: what was turned, and to which values.
        speedup: what these gave on the tuning prompts, `prompts` of them.
        reached: whether any setting is so fast; if not, `fields` are the fastest.
    """

    asked: float
    measured: str
    fields: Mapping[str, Any]
    speedup: float
    reached: bool
    prompts: int

    @property
    def words(self) -> str:
        """What was found."""
        if not self.reached:
            return "does not reach it"
        return ", ".join(f"{name} = {value:.4g}" for name, value in self.fields.items())


@dataclass(frozen=True)
class Results:
    """One experiment's measurements.

    `frame` has one row for each setting and prompt, the settings in the order of the experiment's configuration:

    setting: the row's name in a table, unique within the experiment ("H2-Cache", "TeaCache, threshold = 0.2").
    method: its family, one colour in every figure ("H2-Cache", "TeaCache", "Baseline").
    fields: dict of the method's configuration fields (empty for the baseline).
    prompt_id, prompt, word (None where the prompt set has none), seed.
    fingerprint, image (Path of the PNG), trace (Path of the CSV of `handle.trace.to_pandas()`, None for the baseline).
    total_seconds, text_seconds, denoising_seconds, vae_seconds; peak_memory_bytes (NaN off the GPU).
    images: how many were drawn at a time; the times are of them all, image and metrics of the first.
    cold_seconds: denoising time of the first drawing with the method in a process, which the other columns are not
    of; NaN for all later ones.
    backend: whose code caches; scheduler: None for the pipeline's own; solver: its class; steps: denoising steps.
    computed_fraction: blocks computed, of all; 1.0 for the baseline. hit_rates: dict of stage to fraction of hits.
    evaluations: the work done, in whole evaluations of the model.
    One column for each metric, NaN where it cannot be had; `unavailable` says why.

    `set_scores` has the metrics of sets that can be had, of each setting but the baseline.
    `left_out` has the settings that could not be tried at all, and why.
    `tunings` has the settings that were tuned, by name; those that do not reach their speedup have no rows.
    `methods` has what caches in each setting without a solver of its own, None for nothing.
    `model_config` is for outputs that look into the model itself, `prompts` (by id) for those that look into the set.
    """

    name: str
    title: str
    description: str
    frame: pd.DataFrame
    metrics: tuple[str, ...]
    unavailable: dict[str, str]  # metric -> reason
    model: str
    machine: str
    command: str
    converged_run: str
    set_metrics: tuple[str, ...] = ()
    set_scores: Mapping[str, Mapping[str, SetScore]] = field(default_factory=dict)  # metric -> setting -> score
    left_out: Mapping[str, str] = field(default_factory=dict)
    tunings: Mapping[str, Tuning] = field(default_factory=dict)
    methods: Mapping[str, Method | None] = field(default_factory=dict)
    model_config: ModelConfig | None = None
    prompts: Mapping[str, Prompt] = field(default_factory=dict)

    @property
    def baseline(self) -> pd.DataFrame:
        """The baseline's rows, indexed by KEY; empty if the experiment has none."""
        return self.frame[self.frame["setting"] == BASELINE].set_index(KEY)

    def prompt_of(self, row: pd.Series) -> Prompt:
        """The prompt of a row of `frame`, with its pictures where `prompts` has it."""
        return self.prompts.get(row["prompt_id"]) or Prompt(row["prompt_id"], row["prompt"], row["word"])

    @property
    def baseline_run(self) -> str:
        """What the baseline is, in words."""
        runs = {(row.solver or "the model's own scheduler", row.steps) for row in self.baseline.itertuples()}
        return " and ".join(f"{solver}, {steps} steps" for solver, steps in sorted(runs))


@dataclass(frozen=True)
class Artifact:
    """A table or figure on disk: the same content in each of `files` (.png and .pdf, or .md, .csv and .tex).

    `table`: what the files of a table show; None for a figure.
    """

    name: str
    title: str
    caption: str
    files: tuple[Path, ...]
    table: "Sheet | None" = None


class Output(Protocol):
    """One table or figure of an experiment; `configs/experiment/*.yaml` lists them by `_target_`."""

    def make(self, results: Results, folder: Path) -> Artifact | None:
        """Write the files into `folder`, whole or not at all. None where nothing of it was measured."""
