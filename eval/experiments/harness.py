"""From a configuration to a folder of results: draw what is missing, measure, make tables, figures and the page.

`run` does it all; `rescore` measures what another run has drawn, and draws nothing.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from h2cache.eval.cli.progress import bar, watching
from h2cache.eval.errors import UserError
from h2cache.eval.experiments.experiment import Experiment, Row
from h2cache.eval.experiments.match import as_matched, matched
from h2cache.eval.experiments.study import Study, read_study
from h2cache.eval.files import atomic_files
from h2cache.eval.generation.backends import backend_of, fields_of
from h2cache.eval.generation.records import Cell, Record, Store
from h2cache.eval.generation.sweep import Report, found, sweep
from h2cache.eval.metrics.registry import TRUTH_IMAGE, Metrics, kind, set_metric
from h2cache.eval.metrics.scores import Scores
from h2cache.eval.metrics.sets import Features, SetScore, set_score
from h2cache.eval.models.environment import environment
from h2cache.eval.models.identity import identity
from h2cache.eval.report import page, published
from h2cache.eval.report.results import BASELINE, KEY, Artifact, Results
from h2cache.eval.report.tables import SummaryTable

PAGE, ENVIRONMENT, MEASUREMENTS = "report.html", "environment.json", "measurements.csv"


Method = Callable[[str], DictConfig]


def run(cfg: DictConfig, model_name: str, method: Method, command: str, overrides: Sequence[str]) -> int:
    """Do what Hydra composed of `overrides`; returns the exit code, 1 if some images could not be drawn.

    Raises UserError.
    """
    study = read_study(cfg, model_name, method)
    messages = Console(stderr=True, highlight=False)
    model = identity(study.model)
    store = Store(study.out / "records", model)
    with store.locked():
        study = matched(study, model, messages)
        with watching(messages, study.names) as watcher:
            report = sweep(store, study.all_cells, study.model, study.launcher, watcher)
        if store.damaged:
            messages.print(f"note: damaged records, whose images are drawn again: {len(store.damaged)}")
        names = study.names
        drawn = [cell for cell in study.all_cells if store.fingerprint(cell) in report.records]
        store.write_index((names[cell.way], cell) for cell in drawn)
        results = _measured(study, store, report, command, messages)
    _write(study, report, results, environment(command) | _facts(study, report, overrides), messages)
    if report.failures:
        _complain(messages, study, report)
    return 1 if report.failures else 0


def rescore(cfg: DictConfig, model_name: str, method: Method, command: str, overrides: Sequence[str]) -> int:
    """Measure what a run has drawn, and make its tables, figures and page anew; returns the exit code 0.

    What stands beside the results about the run itself stays; when they were scored is added. Raises UserError.
    """
    study = read_study(cfg, model_name, method)
    messages = Console(stderr=True, highlight=False)
    before = facts_of(study.out)
    model = identity(study.model)
    store = Store(study.out / "records", model)
    with store.locked():
        study = as_matched(study, model, before.get("machine", ""))
        report = found(store, study.all_cells)
        if not report.records:
            raise UserError(f"{study.out}: none of the images of this command is there; give the fields of the run too")
        results = _measured(study, store, report, before.get("command", command), messages)
    missing = len({store.fingerprint(cell) for cell in study.all_cells}) - len(report.records)
    if missing:
        messages.print(f"note: {missing} images are not there, or damaged; the run's own command draws them")
    now = environment(command)
    rescored = {"rescored": {name: now[name] for name in ("time", "commit", "command")}}
    _write(study, report, results, now | before | _facts(study, report, overrides) | rescored, messages)
    return 0


def facts_of(out: Path) -> dict[str, Any]:
    """What stands beside the results in `out` about the run that made them; UserError if nothing does."""
    try:
        return json.loads((out / ENVIRONMENT).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"out={out}: no run has ended there ({ENVIRONMENT} is missing or damaged)") from error


def _measured(study: Study, store: Store, report: Report, command: str, messages: Console) -> list[Results]:
    """The results of every experiment of which there are images. `store` is locked: its scores are added to."""
    with messages.status("loading the metrics"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        metrics = Metrics(study.metrics, study.metric_weights, device, study.set_metrics)
    with bar(messages, "measuring the images") as show:
        scores = Scores(store.folder / "scores.jsonl", metrics)
        measured, images = count(1), sum(map(len, study.rows))
        frames = [
            measurements(store, report.records, experiment, rows, scores, lambda: show(next(measured), images))
            for experiment, rows in zip(study.experiments, study.rows, strict=True)
        ]
    for name, reason in metrics.unavailable.items():
        messages.print(f"note: {name} is n/a: {reason}", soft_wrap=True)
    with messages.status("measuring the sets of images"):
        return [
            _results(experiment, frame, metrics, study, command)
            for experiment, frame in zip(study.experiments, frames, strict=True)
            if len(frame)
        ]


def _write(
    study: Study, report: Report, results: Sequence[Results], facts: Mapping[str, Any], messages: Console
) -> None:
    """Make all that is made of the results, and say where it is."""
    with messages.status("drawing tables and figures"):
        made, beside = _make(study, results, facts)
    _tell(Console(highlight=False, soft_wrap=True), study, made, beside, report)


def measurements(
    store: Store,
    records: Mapping[str, Record],
    experiment: Experiment,
    rows: Sequence[Row],
    scores: Scores,
    on_row: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """The frame of `Results`: a row for each of `rows` that `records` has, setting by setting.

    A setting without any is a category of the column `setting` all the same, so that tables can say that it failed.
    `on_row` is called after each of `rows`.
    """

    def found(cell: Cell) -> Record | None:
        return records.get(store.fingerprint(cell))

    order = [setting.name for setting in experiment.settings]
    measured = []
    for row in sorted(rows, key=lambda row: order.index(row.setting.name)):
        record = found(row.cell)
        if record:
            references = {name: other for name, cell in row.references.items() if (other := found(cell))}
            truth = {TRUTH_IMAGE: row.cell.prompt.truth} if row.cell.prompt.truth else {}
            scored = scores.of(experiment.metrics, record, references | truth, row.cell.prompt)
            measured.append(_row(row, record, references) | scored)
        on_row()
    frame = pd.DataFrame(measured)
    if len(frame) and set(order) - set(frame["setting"]):
        frame["setting"] = pd.Categorical(frame["setting"], categories=order)
    return frame


def _row(row: Row, record: Record, references: Mapping[str, Record]) -> dict[str, Any]:
    setting, cell = row.setting, row.cell
    columns = {
        "setting": setting.name,
        "method": setting.method,
        "backend": backend_of(setting.config),
        "scheduler": setting.scheduler,
        "fields": fields_of(setting.config),
        "prompt_id": cell.prompt.id,
        "prompt": cell.prompt.text,
        "word": cell.prompt.word,
        "seed": cell.seed,
        "steps": cell.steps,
        "images": cell.images,
        "total_seconds": record.total_seconds,
    }
    columns |= dataclasses.asdict(record) | {"evaluations": _evaluations(cell, record, references)}
    return columns | {"peak_memory_bytes": float(columns["peak_memory_bytes"] or "nan")}


def _evaluations(cell: Cell, record: Record, references: Mapping[str, Record]) -> float:
    """How many whole evaluations of the model the run's work amounts to.

    It is in multiply-adds of one evaluation of an uncached run of the same size; by the fraction of blocks computed
    where these were not counted.
    """
    for other in references.values():
        if record.multiply_adds and other.multiply_adds and other.calls:
            return record.multiply_adds * other.calls / other.multiply_adds
    calls = record.calls or cell.steps
    return calls * record.computed_fraction


def set_scores(frame: pd.DataFrame, name: str, features: Features) -> dict[str, SetScore]:
    """The metric `name` of each setting's images in a frame of `Results`, against the baseline's of the same prompts.

    Empty without a baseline.
    """
    measure = set_metric(name)
    of = {file: features(file) for file in frame["image"].unique()}
    groups = {setting: group.set_index(KEY)["image"] for setting, group in frame.groupby("setting", observed=True)}
    if BASELINE not in groups:
        return {}
    scores = {}
    for setting, images in groups.items():
        pairs = pd.concat([images, groups[BASELINE]], axis=1, join="inner", keys=["image", "reference"]).sort_index()
        if setting != BASELINE and len(pairs):
            ours, theirs = (np.stack([of[file] for file in pairs[column]]) for column in pairs)
            scores[setting] = set_score(measure, ours, theirs, list(pairs.index.get_level_values(0)))
    return scores


def _results(experiment: Experiment, frame: pd.DataFrame, metrics: Metrics, study: Study, command: str) -> Results:
    reasons = {name: kind(name).metric for name in experiment.metrics} | {name: name for name in experiment.set_metrics}
    return Results(
        name=experiment.name,
        title=experiment.title,
        description=experiment.description,
        frame=frame,
        metrics=experiment.metrics,
        unavailable={
            name: metrics.unavailable[metric] for name, metric in reasons.items() if metric in metrics.unavailable
        },
        set_metrics=experiment.set_metrics,
        set_scores={
            name: set_scores(frame, name, metrics.features[name])
            for name in experiment.set_metrics
            if name in metrics.features
        },
        model=study.model_name,
        machine=" and ".join(sorted(set(frame["machine"]))),
        command=command,
        converged_run=experiment.converged_run,
        left_out=experiment.left_out,
        tunings={setting.name: setting.tuning for setting in experiment.settings if setting.tuning},
        methods={setting.name: setting.config for setting in experiment.settings if setting.scheduler is None},
        model_config=study.model,
        prompts={prompt.id: prompt for prompt in study.prompts[experiment.prompts]},
    )


def _make(
    study: Study, results: Sequence[Results], facts: Mapping[str, Any]
) -> tuple[list[tuple[Results, list[Artifact]]], Artifact | None]:
    """Write all that is made of the results; returns it, and the table of what the papers claim."""
    outputs = {experiment.name: experiment.outputs for experiment in study.experiments}
    made: list[tuple[Results, list[Artifact]]] = []
    try:
        for each in results:
            folder = study.out / each.name
            folder.mkdir(exist_ok=True)
            with atomic_files([folder / MEASUREMENTS]) as (file,):
                relative = {name: each.frame[name].map(_below(study.out)) for name in ("image", "trace")}
                each.frame.assign(**relative).to_csv(file, index=False)
            artifacts = [output.make(each, folder) for output in outputs[each.name]]
            made.append((each, [artifact for artifact in artifacts if artifact]))
        with atomic_files([study.out / ENVIRONMENT]) as (file,):
            file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        beside = published.make(results, study.out / "published", published.read_claims()) if made else None
        if beside:
            page.write(made, facts, study.out / PAGE, published=beside)
    except OSError as error:
        raise UserError(
            f"cannot write to {study.out} ({error.strerror}): put that right and run the same command again; all "
            "images are kept"
        ) from error
    return made, beside


def _below(folder: Path) -> Callable[[Path | None], str | None]:
    return lambda path: path and path.relative_to(folder).as_posix()


def _facts(study: Study, report: Report, overrides: Sequence[str]) -> dict[str, Any]:
    """What environment.json says besides of this run and of where its images were drawn."""
    records = report.records.values()
    facts = {
        "model": study.model_name,
        "model_fields": dataclasses.asdict(study.model),
        "machine": " and ".join(sorted({record.machine for record in records})),
        "drawn_with": " and ".join(sorted({record.versions for record in records})),
        "images": len(records),
        "failed": len(report.failures),
        "overrides": list(overrides),
    }
    if report.drawn:
        facts["harness_overhead"] = round(report.overhead_seconds / report.drawing_seconds, 5)
    return facts


def _tell(
    console: Console,
    study: Study,
    made: Sequence[tuple[Results, Sequence[Artifact]]],
    beside: Artifact | None,
    report: Report,
) -> None:
    """Where everything is."""
    outputs = {experiment.name: experiment.outputs for experiment in study.experiments}
    for results, artifacts in made:
        for output in outputs[results.name]:
            if isinstance(output, SummaryTable):
                _show(console, output.terminal(results))
        for artifact in artifacts:
            console.print(f"{results.name}: {artifact.title}: {', '.join(map(str, artifact.files))}", markup=False)
    if beside:
        console.print(f"{beside.title}: {', '.join(map(str, beside.files))}", markup=False)
    now = f", {report.drawn} of them drawn now" if report.drawn else ""
    console.print(f"{len(report.records)} images{now}; tables, figures and images: {study.out / PAGE}", markup=False)


def _show(console: Console, table: Table) -> None:
    """Print a table where it fits."""
    anything = console.options.update(width=10_000)
    if console.measure(table, options=anything).maximum <= console.width:
        console.print(table)


def _complain(messages: Console, study: Study, report: Report) -> None:
    """What could not be drawn, one line a setting and reason, and what to do about it."""
    names = study.names
    reasons = Counter((names[cell.way], failure.reason) for cell, failure in report.failures.values())
    for (name, reason), images in reasons.items():
        messages.print(f"failed: {name}, {images} images: {reason}", markup=False, soft_wrap=True)
    messages.print(
        f"{len(report.failures)} images are missing from the tables (details: {study.out}/records/*.failed.json); the "
        "same command tries them again",
        markup=False,
        soft_wrap=True,
    )
