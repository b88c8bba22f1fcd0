"""What `run.py` does with its configuration: draw the image, show what the cache did, write it all down."""

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import FluxPipeline
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import h2cache
from eval import doctor, report
from eval.errors import UserError
from eval.files import atomic_files, check_writable
from eval.generate import Drawing, generate
from eval.pipelines import ModelConfig, describe_machine, load_pipeline

WARM_UP_STEPS = 3  # a first run pays for allocations and kernel choices; with a cache it also has to hit once
GAP = 8  # pixels between the two images of a comparison


@dataclass(frozen=True)
class Job:
    """The fields of configs/run.yaml, checked. `method` is a cache's configuration, or None for the baseline."""

    prompt: str
    seed: int
    out: Path
    compare: bool
    model: ModelConfig
    method: Any

    def __post_init__(self) -> None:
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**63) or isinstance(self.seed, bool):
            raise UserError(f"seed={self.seed} is not allowed: it must be a whole number from 0 to 2**63 - 1")
        if not isinstance(self.compare, bool):
            raise UserError(f"compare={self.compare} is not allowed: it must be true or false")
        if self.compare and self.method is None:
            raise UserError("compare=true compares a method with none: choose one with method=, or compare=false")
        if self.out.suffix != ".png":
            raise UserError(f"out={self.out} is not allowed: it must end in .png")

    @property
    def trace_file(self) -> Path:
        return self.out.with_suffix(".trace.csv")

    @property
    def config_file(self) -> Path:
        return self.out.with_suffix(".yaml")

    @property
    def comparison_file(self) -> Path:
        return self.out.with_suffix(".compare.png")


@dataclass(frozen=True)
class Run:
    """One drawing with what its cache recorded: an empty trace and no summary where there was no cache."""

    drawing: Drawing
    trace: pd.DataFrame
    summary: Mapping[str, Any] | None


def run(cfg: DictConfig, choices: Mapping[str, str], number: int | None) -> None:
    """Do the job that Hydra composed; `number` is its place in a multirun. Raises UserError."""
    if _asks_for_doctor(cfg):
        doctor.show(Console())
        return
    cfg = OmegaConf.masked_copy(cfg, [field for field in cfg if field != "doctor"])
    job = _job(cfg, choices, number)
    files = [job.out, job.trace_file, job.config_file, *([job.comparison_file] if job.compare else [])]
    check_writable(files)
    messages = Console(stderr=True, highlight=False)
    try:
        with messages.status(f"loading {choices['model']}"):
            pipe = load_pipeline(job.model)
        _note_truncation(job, pipe, messages)
        machine = describe_machine(job.model)
        baseline, cached = _draw_all(job, pipe, choices["method"], messages)
    except torch.OutOfMemoryError as error:
        advice = job.model.memory_advice
        raise UserError(f"{choices['model']} does not fit into the GPU's memory: {advice}") from error

    with atomic_files(files) as (image_file, trace_file, config_file, *comparison_file):
        cached.drawing.image.save(image_file)
        cached.trace.to_csv(trace_file, index=False)
        config_file.write_text(_record(cfg, choices, machine), encoding="utf-8")
        for file in comparison_file:
            _side_by_side(baseline.drawing.image, cached.drawing.image).save(file)

    facts = {"time": report.timing(cached.drawing)}
    if cached.summary:
        facts["blocks"] = report.bound(cached.summary)
    if baseline:
        facts |= report.comparison(cached.drawing, baseline.drawing)
    facts["written"] = ", ".join(map(str, files))
    report.show(Console(), job.prompt, _settings(job, choices, machine), cached.trace, facts)


def _asks_for_doctor(cfg: DictConfig) -> bool:
    """Whether to describe the machine instead of drawing."""
    value = cfg.get("doctor", False)
    if not isinstance(value, bool):
        raise UserError(f"doctor={value} is not allowed: it must be true or false")
    return value


def _job(cfg: DictConfig, choices: Mapping[str, str], number: int | None) -> Job:
    """The configuration as checked objects; in a multirun with the job's number in the file names."""
    known = [field.name for field in dataclasses.fields(Job)]
    if set(cfg) != set(known):
        wrong = ", ".join(sorted(set(cfg) ^ set(known)))
        raise UserError(f"unknown or missing: {wrong}; the fields are {', '.join(known)}")
    try:
        OmegaConf.resolve(cfg)
        model, method = (_instantiate(cfg, group, choices) for group in ("model", "method"))
    except OmegaConfBaseException as error:
        raise UserError(str(error).split("\n")[0]) from error
    out = Path(str(cfg.out)).expanduser()
    if number is not None:
        out = out.with_stem(f"{out.stem}-{number}")
    return Job(str(cfg.prompt), cfg.seed, out, cfg.compare, model, method)


def _instantiate(cfg: DictConfig, group: str, choices: Mapping[str, str]) -> Any:
    try:
        return instantiate(cfg[group], _convert_="all")
    except InstantiationException as error:
        raise UserError(f"{group}={choices[group]}: {error.__cause__ or error}") from error


def _note_truncation(job: Job, pipe: FluxPipeline, messages: Console) -> None:
    read, written = job.model.max_sequence_length, len(pipe.tokenizer_2(job.prompt).input_ids)
    if written > read:
        messages.print(f"note: the model reads {read} of the prompt's {written} tokens (model.max_sequence_length)")


def _draw_all(job: Job, pipe: FluxPipeline, name: str, messages: Console) -> tuple[Run | None, Run]:
    """(baseline, cached); the baseline only for a comparison, where both have run a few untimed steps before."""
    methods = {"baseline": None, name: job.method} if job.compare else {name: job.method}
    if job.compare:
        for method in methods.values():
            # A method for certain conditions, as a plan is, has none for a shorter run.
            bound = method is not None and method.depends_on_run
            steps = job.model.num_inference_steps if bound else WARM_UP_STEPS
            _draw(job, pipe, method, "warming up", messages, num_inference_steps=steps)
    runs = {name: _draw(job, pipe, method, name, messages) for name, method in methods.items()}
    return runs.get("baseline"), runs[name]


def _draw(job: Job, pipe: FluxPipeline, method: Any, title: str, messages: Console, **other_arguments: Any) -> Run:
    arguments = job.model.call_arguments | other_arguments
    with _progress(title, messages) as on_step:
        if method is None:
            drawing = generate(pipe, job.prompt, job.seed, on_step, **arguments)
            return Run(drawing, h2cache.Trace().to_pandas(), None)
        with h2cache.apply(pipe, method) as handle:
            drawing = generate(pipe, job.prompt, job.seed, on_step, **arguments)
            return Run(drawing, handle.trace.to_pandas(), handle.summary())


@contextmanager
def _progress(title: str, messages: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar that is gone when the work is done; yields what to call after each step, with (done, total).

    Where nobody watches a terminal there is none: rich would leave an empty line in the log.
    """
    if not messages.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
    columns += (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _settings(job: Job, choices: Mapping[str, str], machine: str) -> str:
    model = job.model
    return (
        f"{'no cache' if job.method is None else choices['method']} on {choices['model']}, "
        f"{model.width}x{model.height}, {model.num_inference_steps} steps, seed {job.seed}, {model.dtype} on {machine}"
    )


def _record(cfg: DictConfig, choices: Mapping[str, str], machine: str) -> str:
    """The resolved configuration as YAML, under what it was drawn with."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    chosen = " ".join(f"{group}={choices[group]}" for group in ("model", "method"))
    header = f"# python run.py {chosen}\n# {versions}, Python {platform.python_version()}, {machine}\n"
    return header + OmegaConf.to_yaml(cfg)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    pair = Image.new("RGB", (left.width + GAP + right.width, left.height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + GAP, 0))
    return pair
