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
from h2cache.eval.experiments.experiment import Experiment, Match
from h2cache.eval.experiments.settings import Setting
from h2cache.eval.experiments.study import Study
from h2cache.eval.files import atomic_files
from h2cache.eval.generation.backends import applied
from h2cache.eval.generation.generate import generate
from h2cache.eval.generation.prompts import Prompt
from h2cache.eval.generation.sweep import Failure
from h2cache.eval.models.pipelines import takes
from h2cache.eval.models.schedulers import denoised_with
from h2cache.eval.report.results import Tuning
from h2cache.tuning import as_written

FORMAT = 1  # of what is kept; a change of how settings are found raises it
FOLDER = "tunings"
TRIALS = 6  # of a method's threshold or interval, after the one that skips all it can
STEP_TRIALS = 4  # of a number of steps


def matched(study: Study, model: Mapping[str, Any], messages: Console) -> Study:
    """The study with every setting that is to be matched as it was found, now or before.

    The launcher makes the searches, where and as it draws. Settings that have nothing to turn, such as a plan, stay as
    they are written. `model` is its identity. UserError for what cannot be tuned.
    """
    searches = _searches(study)
    if not searches:
        return study
    machine = study.launcher.machine(study.model)
    kept = _Kept(study.out / FOLDER, model, machine)
    missing = {kept.file(search): search for search in searches.values() if kept.read(search) is None}
    if missing:

        def check(worker: str) -> None:
            if worker != machine:
                raise UserError(
                    f"match: one worker is {worker}, and another is {machine}: speedups of different machines are not "
                    "comparable; give the launcher machines of one kind"
                )

        with bar(messages, "matching settings") as show:
            for search, tuning in study.launcher.search(study.model, list(missing.values()), show, check):
                if isinstance(tuning, Failure):
                    raise UserError(f"match: {search.name} cannot be tuned: {tuning.reason}")
                kept.write(search, tuning)
                note = f"matched: {search.name}, {tuning.words}, {tuning.speedup:.2f}x where {tuning.asked:g}x is asked"
                messages.print(note, markup=False, soft_wrap=True)
    return _with_tunings(study, searches, kept)


def as_matched(study: Study, model: Mapping[str, Any], machine: str) -> Study:
    """The study with every setting as it was found before, on `machine`; UserError if one never was."""
    return _with_tunings(study, _searches(study), _Kept(study.out / FOLDER, model, machine))


Place = tuple[str, str]  # the experiment's name and the setting's


def _searches(study: Study) -> dict[Place, "_Search"]:
    """Of every setting that is to be matched. UserError for what cannot be."""
    searches = {}
    for experiment in study.experiments:
        for setting in experiment.settings if experiment.match else ():
            if search := _search(study, experiment, setting):
                searches[experiment.name, setting.name] = search
    return searches


def _search(study: Study, experiment: Experiment, setting: Setting) -> "_Search | None":
    """How to find a setting; None for the baseline, and for what has nothing to turn."""
    prompts, seed = experiment.tuning_prompts(study.prompts[experiment.prompts])
    if any(prompt.picture for prompt in prompts):
        raise UserError(f"{experiment.name}: match: settings are tuned on prompts alone, and these have pictures")
    if setting.weights:
        raise UserError(f"match: {setting.name} has weights of its own, which is not tuned: leave it out")
    steps = experiment.steps or study.model.num_inference_steps
    fields = (setting, experiment.match, study.model.call_arguments, prompts, seed, steps)
    if setting.scheduler:
        if experiment.match.measured != "time":
            raise UserError(f"match: {setting.name} is matched by its number of steps, which needs measured: time")
        return _OfSteps(*fields)
    turns = isinstance(setting.config, CacheConfig) and as_written(setting.config)
    return _OfKnob(*fields) if turns else None


def _with_tunings(study: Study, searches: Mapping[Place, "_Search"], kept: "_Kept") -> Study:
    def found(experiment: Experiment, setting: Setting) -> Setting:
        search = searches.get((experiment.name, setting.name))
        if search is None:
            return setting
        tuning = kept.read(search)
        if tuning is None:
            raise UserError(f"{kept.folder} has no tuning of {setting.name}: finish the run with its own command")
        return search.tuned(tuning)

    experiments = [
        replace(experiment, settings=tuple(found(experiment, setting) for setting in experiment.settings))
        for experiment in study.experiments
    ]
    return replace(study, experiments=tuple(experiments))


@dataclass(frozen=True)
class _Kept:
    """What was found with a model on a machine, one file in `folder` for each search."""

    folder: Path
    model: Mapping[str, Any]
    machine: str

    def file(self, search: "_Search") -> Path:
        name = hashlib.sha256(json.dumps(self._identity(search), sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{name}.json"

    def read(self, search: "_Search") -> Tuning | None:
        """None: not tuned yet, or damaged."""
        try:
            return Tuning(**json.loads(self.file(search).read_bytes())["found"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, search: "_Search", tuning: Tuning) -> None:
        file, content = self.file(search), {"search": self._identity(search), "found": asdict(tuning)}
        try:
            self.folder.mkdir(exist_ok=True)
            with atomic_files([file]) as (path,):
                path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}; put that right and try again") from error

    def _identity(self, search: "_Search") -> dict[str, Any]:
        return search.identity() | {"model": dict(self.model), "machine": self.machine}


@dataclass(frozen=True, eq=False)  # one search is one, whatever it says
class _Search:
    """Finds a setting on `prompts`, the first with the noise of `seed`; the baseline takes `steps`.

    `call` has the arguments of the model's calls. All that a search measures is of the pipeline that it is given.
    """

    setting: Setting
    match: Match
    call: Mapping[str, Any]
    prompts: Sequence[Prompt]
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return self.setting.name

    @property
    def target(self) -> Speedup:
        """The speedup that is asked for."""
        return self.match.target(self.setting.method)

    def identity(self) -> dict[str, Any]:
        """What the answer depends on besides model and machine."""
        setting = self.setting
        method = setting.config.identity() if setting.config else {"method": "none", "fields": {}}
        return method | {
            "format": FORMAT,
            "measured": self.match.measured,
            "asked": self.target.times,
            "prompts": [prompt.text for prompt in self.prompts],
            "seed": self.seed,
            "baseline_steps": self.steps,
            "scheduler": setting.scheduler,
            "call": dict(setting.call),
            "steps": setting.steps,
        }

    def _tuning(self, fields: dict[str, Any], speedup: float, reached: bool) -> Tuning:
        return Tuning(self.target.times, self.match.measured, fields, speedup, reached, len(self.prompts))


class _OfKnob(_Search):
    """The position of the method's threshold, pair of thresholds, or interval."""

    def find(self, pipe: DiffusionPipeline, on_trial: Callable[[int, int], None]) -> Tuning:
        setting, target, knob = self.setting, self.target, as_written(self.setting.config)
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
                on_trial=lambda trial: on_trial(next(tried), 1 + TRIALS),
                **{name: value for name, value in arguments.items() if takes(pipe, name)},
            ).curve
        except Unreachable as error:
            return self._tuning(_fields(error.best.config, knob.fields), target.of(error.best), reached=False)
        nearest = min(curve, key=lambda trial: _distance(target.of(trial), target))
        return self._tuning(_fields(nearest.config, knob.fields), target.of(nearest), reached=True)

    def tuned(self, tuning: Tuning) -> Setting:
        return replace(self.setting, tuning=tuning, config=self.setting.config.updated(**tuning.fields))


class _OfSteps(_Search):
    """The number of steps of the setting's scheduler."""

    def find(self, pipe: DiffusionPipeline, on_trial: Callable[[int, int], None]) -> Tuning:
        target = self.target
        tried: dict[int, float] = {}
        steps = max(1, round(self.steps / target.times))
        self._seconds(pipe, self.setting, steps, 0)  # the first call of a scheduler or method is slower than the others
        while steps not in tried and len(tried) < STEP_TRIALS:
            ratios = []
            for index in range(len(self.prompts)):
                before = self._seconds(pipe, None, self.steps, index)
                ratios.append(before / self._seconds(pipe, self.setting, steps, index))
            tried[steps] = statistics.median(ratios)
            on_trial(len(tried), STEP_TRIALS)
            steps = max(1, round(steps * tried[steps] / target.times))
        nearest = min(tried, key=lambda steps: _distance(tried[steps], target))
        too_slow = nearest == 1 and tried[nearest] < target.times
        return self._tuning({"steps": nearest}, tried[nearest], reached=not too_slow)

    def tuned(self, tuning: Tuning) -> Setting:
        return replace(self.setting, tuning=tuning, **tuning.fields)

    def _seconds(self, pipe: DiffusionPipeline, setting: Setting | None, steps: int, index: int) -> float:
        """What one image of the setting, or of the baseline, takes."""
        arguments = {**self.call, "num_inference_steps": steps, **dict(setting.call if setting else ())}
        cached = setting and setting.config
        with denoised_with(pipe, setting and setting.scheduler), applied(pipe, cached) if cached else nullcontext():
            return generate(pipe, self.prompts[index].text, self.seed + index, **arguments).total_seconds


def _fields(config: CacheConfig, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _distance(speedup: float, target: Speedup) -> float:
    """The same for half and twice as fast."""
    return abs(math.log(speedup / target.times))
