"""Equal speed before anything is compared: each setting of an experiment with `match` is tuned to the same speedup.

A method's threshold or interval is turned (`h2cache.tune`), two thresholds at the ratio that they are written with; of
a setting with a scheduler of its own, or without a cache, the number of steps. The answer is the setting whose speedup
is nearest to the one asked for. What was found is kept in the folder `tunings` of the results, and never tuned twice.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from rich.console import Console

from h2cache import CacheConfig, Speedup, Unreachable, tune
from h2cache.eval.cli.progress import bar
from h2cache.eval.errors import UserError
from h2cache.eval.experiments.settings import Experiment, Match, Setting
from h2cache.eval.experiments.study import Study
from h2cache.eval.files import atomic_files
from h2cache.eval.generation.backends import applied
from h2cache.eval.generation.generate import generate
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.models.environment import machine_name
from h2cache.eval.models.pipelines import load_pipeline, takes
from h2cache.eval.models.schedulers import denoised_with
from h2cache.eval.report.results import Tuning
from h2cache.tuning import as_written

FORMAT = 1  # of what is kept; a change of how settings are found raises it
FOLDER = "tunings"
TRIALS = 6  # of a method's threshold or interval, after the one that skips all it can
STEP_TRIALS = 4  # of a number of steps


def matched(study: Study, model: Mapping[str, Any], messages: Console) -> Study:
    """The study with every setting that is to be matched as it was found, now or before.

    Settings that have nothing to turn, such as a plan, stay as they are written. `model` is its identity. UserError
    where speeds cannot be measured here.
    """
    if not any(experiment.match for experiment in study.experiments):
        return study
    study.launcher.prepare()

    def searched(setting: Setting, search: Search, target: Speedup) -> Tuning:
        with bar(messages, f"matching {setting.name}") as show:
            tuning = search(setting, target, show)
        note = f"matched: {setting.name}, {tuning.words}, {tuning.speedup:.2f}x where {target.times:g}x is asked"
        messages.print(note, markup=False, soft_wrap=True)
        return tuning

    return _with_tunings(study, model, machine_name(study.model), searched)


def as_matched(study: Study, model: Mapping[str, Any], machine: str) -> Study:
    """The study with every setting as it was found before, on `machine`; UserError if one never was."""

    def missing(setting: Setting, search: Search, target: Speedup) -> Tuning:
        raise UserError(f"{study.out / FOLDER} has no tuning of {setting.name}: finish the run with its own command")

    return _with_tunings(study, model, machine, missing)


def _with_tunings(study: Study, model: Mapping[str, Any], machine: str, searched: "Searched") -> Study:
    experiments = []
    for experiment in study.experiments:
        settings = experiment.settings
        if experiment.match:
            bench = _bench(study, experiment)
            identity = {"format": FORMAT, "model": dict(model), "machine": machine, **bench.identity()}
            settings = tuple(_found(each, bench, identity, study.out / FOLDER, searched) for each in settings)
        experiments.append(replace(experiment, settings=settings))
    return replace(study, experiments=tuple(experiments))


def _found(
    setting: Setting, bench: "_Bench", identity: Mapping[str, Any], folder: Path, searched: "Searched"
) -> Setting:
    """The setting with what was kept of an earlier search for it, or with what `searched` gives."""
    search = bench.search(setting)
    if search is None:
        return setting
    target = bench.match.target(setting.method)
    identity = {**identity, **_written(setting), "asked": target.times}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    file = folder / f"{name}.json"
    tuning = _kept(file)
    if tuning is None:
        tuning = searched(setting, search, target)
        _keep(file, identity, tuning)
    if search == bench.by_steps:
        return replace(setting, tuning=tuning, **tuning.fields)
    return replace(setting, tuning=tuning, config=setting.config.updated(**tuning.fields))


def _written(setting: Setting) -> dict[str, Any]:
    """What a search starts from."""
    method = setting.config.identity() if setting.config else {"method": "none", "fields": {}}
    return {**method, "scheduler": setting.scheduler, "call": dict(setting.call), "steps": setting.steps}


def _kept(file: Path) -> Tuning | None:
    try:
        return Tuning(**json.loads(file.read_bytes())["found"])
    except (OSError, ValueError, KeyError, TypeError):  # not tuned yet, or damaged
        return None


def _keep(file: Path, identity: Mapping[str, Any], tuning: Tuning) -> None:
    try:
        file.parent.mkdir(exist_ok=True)
        with atomic_files([file]) as (path,):
            path.write_text(json.dumps({"search": identity, "found": asdict(tuning)}, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; put that right and try again") from error


def _bench(study: Study, experiment: Experiment) -> "_Bench":
    prompts, seed = experiment.tuning_prompts(study.prompts[experiment.prompts])
    if any(prompt.picture for prompt in prompts):
        raise UserError(f"{experiment.name}: match: settings are tuned on prompts alone, and these have pictures")
    model, steps = study.model, experiment.steps or study.model.num_inference_steps
    return _Bench(lambda: load_pipeline(model), model.call_arguments, experiment.match, prompts, seed, steps)


Search = Callable[[Setting, Speedup, Callable[[int, int], None]], Tuning]  # calls with (settings tried, of how many)
Searched = Callable[[Setting, Search, Speedup], Tuning]  # what a search that was never made gives


@dataclass(frozen=True)
class _Bench:
    """Finds settings on `prompts`, the first with the noise of `seed`; the baseline takes `steps`.

    The pipeline is loaded by the first search: where all is known there is none.
    """

    pipeline: Callable[[], DiffusionPipeline]
    call: Mapping[str, Any]
    match: Match
    prompts: Sequence[Prompt]
    seed: int
    steps: int

    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides model, machine and setting."""
        texts = [prompt.text for prompt in self.prompts]
        return {"measured": self.match.measured, "prompts": texts, "seed": self.seed, "baseline_steps": self.steps}

    def search(self, setting: Setting) -> Search | None:
        """How to find a setting; None for the baseline, and for what has nothing to turn. UserError as below."""
        if setting.weights:
            raise UserError(f"match: {setting.name} has weights of its own, which is not tuned: leave it out")
        if setting.config is None and setting.scheduler is None:
            return None
        if setting.scheduler:
            if self.match.measured != "time":
                raise UserError(f"match: {setting.name} is matched by its number of steps, which needs measured: time")
            return self.by_steps
        turns = isinstance(setting.config, CacheConfig) and as_written(setting.config)
        return self.by_knob if turns else None

    def by_knob(self, setting: Setting, target: Speedup, show: Callable[[int, int], None]) -> Tuning:
        """The position of the method's threshold, pair of thresholds, or interval."""
        pipe, knob = self.pipeline(), as_written(setting.config)
        arguments = self.call | {"num_inference_steps": setting.steps or self.steps} | dict(setting.call)
        tried = count(1)
        try:
            curve = tune(
                pipe,
                [prompt.text for prompt in self.prompts],
                setting.config,
                target,
                knobs=[knob],
                seed=self.seed,
                trials=TRIALS,
                on_trial=lambda trial: show(next(tried), 1 + TRIALS),
                **{name: value for name, value in arguments.items() if takes(pipe, name)},
            ).curve
        except Unreachable as error:
            return self._tuning(target, _fields(error.best.config, knob.fields), target.of(error.best), reached=False)
        nearest = min(curve, key=lambda trial: _distance(target.of(trial), target))
        return self._tuning(target, _fields(nearest.config, knob.fields), target.of(nearest), reached=True)

    def by_steps(self, setting: Setting, target: Speedup, show: Callable[[int, int], None]) -> Tuning:
        """The number of steps of the setting's scheduler."""
        pipe = self.pipeline()
        tried: dict[int, float] = {}
        steps = max(1, round(self.steps / target.times))
        self._seconds(pipe, setting, steps, 0)  # the first call of a scheduler or method is slower than the others
        while steps not in tried and len(tried) < STEP_TRIALS:
            ratios = []
            for index in range(len(self.prompts)):
                before = self._seconds(pipe, None, self.steps, index)
                ratios.append(before / self._seconds(pipe, setting, steps, index))
            tried[steps] = statistics.median(ratios)
            show(len(tried), STEP_TRIALS)
            steps = max(1, round(steps * tried[steps] / target.times))
        nearest = min(tried, key=lambda steps: _distance(tried[steps], target))
        too_slow = nearest == 1 and tried[nearest] < target.times
        return self._tuning(target, {"steps": nearest}, tried[nearest], reached=not too_slow)

    def _seconds(self, pipe: DiffusionPipeline, setting: Setting | None, steps: int, index: int) -> float:
        """What one image of the setting, or of the baseline, takes."""
        arguments = {**self.call, "num_inference_steps": steps, **dict(setting.call if setting else ())}
        cached = setting and setting.config
        with denoised_with(pipe, setting and setting.scheduler), applied(pipe, cached) if cached else nullcontext():
            return generate(pipe, self.prompts[index].text, self.seed + index, **arguments).total_seconds

    def _tuning(self, target: Speedup, fields: dict[str, Any], speedup: float, reached: bool) -> Tuning:
        return Tuning(target.times, self.match.measured, fields, speedup, reached, len(self.prompts))


def _fields(config: CacheConfig, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _distance(speedup: float, target: Speedup) -> float:
    """The same for half and twice as fast."""
    return abs(math.log(speedup / target.times))
