"""What `run.py` does with its configuration: draw an image or a video, show what the cache did, write it all down."""

import dataclasses
import platform
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from rich.console import Console

import h2cache
from h2cache import PlanConfig
from h2cache.eval.cli import doctor
from h2cache.eval.cli import terminal as report
from h2cache.eval.cli.progress import bar, loading
from h2cache.eval.errors import UserError
from h2cache.eval.files import atomic_files, check_writable
from h2cache.eval.generation.generate import Drawing, generate
from h2cache.eval.generation.videos import contact_sheet, write_mp4
from h2cache.eval.models.pipelines import ModelConfig, describe_machine, load_pipeline, takes
from h2cache.plans.conditions import OtherConditions

WARM_UP_STEPS = 3  # a first run pays for allocations and kernel choices; with a cache it also has to hit once
GAP = 8  # pixels between the two images of a comparison
STOP_SIGN = 'a red octagonal sign that says "STOP" in white bold letters in a straight line, on a blue background'
T5 = "T5"  # in the name of a tokenizer of that kind


@dataclass(frozen=True)
class Job:
    """The fields of configs/run.yaml, which `generate.check` has seen. `method` is None for the baseline."""

    prompt: str
    image: Path | None
    seed: int
    out: Path
    compare: bool
    model: ModelConfig
    method: Any

    def __post_init__(self) -> None:
        if self.compare and self.method is None:
            raise UserError("compare=true compares a method with none: choose one with method=, or compare=false")
        self.model.check_picture(self.image)

    def files(self, video: bool) -> list[Path]:
        """What is written. The picture of a video is its contact sheet."""
        files = [self.picture_file, self.trace_file, self.config_file]
        files += [self.comparison_file] if self.compare else []
        return [self.video_file, *files] if video else files

    @property
    def picture_file(self) -> Path:
        return self.out.with_suffix(".png")

    @property
    def video_file(self) -> Path:
        return self.out.with_suffix(".mp4")

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
    if cfg.get("doctor"):
        doctor.show(Console())
        return
    cfg = OmegaConf.masked_copy(cfg, [field for field in cfg if field != "doctor"])
    job = _job(cfg, choices, number)
    cfg.prompt = job.prompt
    check_writable(job.files(job.model.makes_videos))
    messages = Console(stderr=True, highlight=False)
    try:
        with loading(messages, job.model.title) as on_bytes:
            pipe = load_pipeline(job.model, on_bytes)
        _note_truncation(job, pipe, messages)
        _note_left_out(job, pipe, messages)
        machine = describe_machine(job.model)
        baseline, cached = _draw_all(job, pipe, choices["method"], messages)
    except torch.OutOfMemoryError as error:
        advice = job.model.memory_advice
        raise UserError(f"{choices['model']} does not fit into the GPU's memory: {advice}") from error
    _note_other_size(job, cached.drawing, messages)

    files = job.files(cached.drawing.is_video)
    replaced = [str(file) for file in files if file.exists()]
    with _room(job.out), atomic_files(files) as temporary:
        write = dict(zip(files, temporary, strict=True))
        _picture(cached.drawing).save(write[job.picture_file])
        cached.trace.to_csv(write[job.trace_file], index=False)
        write[job.config_file].write_text(_record(cfg, choices, machine), encoding="utf-8")
        if baseline:
            _comparison(baseline.drawing, cached.drawing).save(write[job.comparison_file])
        if cached.drawing.is_video:
            write_mp4(cached.drawing.frames, job.model.fps, write[job.video_file])

    facts = {"time": report.timing(cached.drawing)}
    if cached.summary:
        facts["blocks"] = report.bound(cached.summary)
    if baseline:
        facts |= report.comparison(cached.drawing, baseline.drawing)
    facts["written"] = ", ".join(map(str, files))
    if replaced:
        facts["replaced"] = ", ".join(replaced)
    settings = _settings(job, choices, cached.drawing, machine)
    report.show(Console(), job.prompt, settings, _by_branch(cached.trace), facts)


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """Say in a sentence why a file could not be written, such as a full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; make room, or change out=") from error


def _job(cfg: DictConfig, choices: Mapping[str, str], number: int | None) -> Job:
    """The configuration as checked objects; in a multirun with the job's number in the file names."""
    try:
        OmegaConf.resolve(cfg)
        model, method = (_instantiate(cfg, group, choices) for group in ("model", "method"))
    except OmegaConfBaseException as error:
        raise UserError(str(error).split("\n")[0]) from error
    out = Path(str(cfg.out)).expanduser()
    if number is not None:
        out = out.with_stem(f"{out.stem}-{number}")
    image = None if cfg.image is None else Path(str(cfg.image)).expanduser()
    prompt = cfg.prompt
    if prompt is None:
        prompt = STOP_SIGN if image is None else ""
    return Job(str(prompt), image, cfg.seed, out, cfg.compare, model, method)


def _instantiate(cfg: DictConfig, group: str, choices: Mapping[str, str]) -> Any:
    try:
        return instantiate(cfg[group], _convert_="all")
    except InstantiationException as error:
        reason = _unknown_field(cfg[group]) or error.__cause__ or error
        raise UserError(f"{group}={choices[group]}: {reason}") from error


def _unknown_field(cfg: DictConfig) -> str | None:
    """Which field the class does not have, and which it has; Hydra lets `+model.field=` add any."""
    target = get_object(cfg["_target_"])
    known = [field.name for field in dataclasses.fields(target)] if dataclasses.is_dataclass(target) else []
    unknown = [str(field) for field in cfg if field not in (*known, "_target_")]
    return f"there is no field {unknown[0]}; choose from {', '.join(known)}" if known and unknown else None


def _note_truncation(job: Job, pipe: DiffusionPipeline, messages: Console) -> None:
    """Say if the prompt is longer than what the model reads, where a T5 encoder reads it: Flux, Wan, SD3."""
    tokenizers = [part for name, part in pipe.components.items() if name.startswith("tokenizer")]
    read = job.model.max_sequence_length
    for tokenizer in tokenizers:
        written = len(tokenizer(job.prompt).input_ids) if T5 in type(tokenizer).__name__ else 0
        if read is not None and written > read:
            messages.print(f"note: the model reads {read} of the prompt's {written} tokens (model.max_sequence_length)")


def _note_left_out(job: Job, pipe: DiffusionPipeline, messages: Console) -> None:
    """Say which of the configuration's call arguments this pipeline does not take."""
    left_out = [name for name in job.model.call_arguments if not takes(pipe, name)]
    if left_out:
        messages.print(f"note: left out, because {type(pipe).__name__} does not take it: {', '.join(left_out)}")


def _note_other_size(job: Job, drawing: Drawing, messages: Console) -> None:
    """Say if the pipeline has rounded the size or the number of frames, which some do without a word."""
    asked = job.model.width, job.model.height, job.model.call_arguments.get("num_frames", 1)
    made = *drawing.frames[0].size, len(drawing.frames)
    if made != asked:
        words = "{}x{} and {} frames".format
        messages.print(f"note: asked for {words(*asked)}, the pipeline made {words(*made)}")


def _draw_all(job: Job, pipe: DiffusionPipeline, name: str, messages: Console) -> tuple[Run | None, Run]:
    """(baseline, cached); the baseline only for a comparison, where both have run a few untimed steps before."""
    methods = {"baseline": None, name: job.method} if job.compare else {name: job.method}
    if job.compare:
        for method in methods.values():
            # A plan is for its number of steps.
            steps = job.model.num_inference_steps if isinstance(method, PlanConfig) else WARM_UP_STEPS
            _draw(job, pipe, method, "warming up", messages, num_inference_steps=steps)
    runs = {name: _draw(job, pipe, method, name, messages) for name, method in methods.items()}
    return runs.get("baseline"), runs[name]


def _draw(job: Job, pipe: DiffusionPipeline, method: Any, title: str, messages: Console, **other_arguments: Any) -> Run:
    arguments = job.model.arguments_with(job.image) | other_arguments
    with bar(messages, title) as on_step, _explained():
        if method is None:
            drawing = generate(pipe, job.prompt, job.seed, on_step, **arguments)
            return Run(drawing, h2cache.Trace().to_pandas(), None)
        with _apply(pipe, method) as handle:
            drawing = generate(pipe, job.prompt, job.seed, on_step, **arguments)
            return Run(drawing, handle.trace.to_pandas(), handle.summary())


def _apply(pipe: DiffusionPipeline, method: Any) -> h2cache.Handle:
    """The method at work; UserError where the pipeline's transformer cannot have it."""
    try:
        return h2cache.apply(pipe, method)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


@contextmanager
def _explained() -> Iterator[None]:
    """Turn a plan's refusal of the run, and a pipeline's of its arguments, both before any work, into a UserError."""
    try:
        yield
    except OtherConditions as error:
        raise UserError(
            f"{error.reason}: calibrate one for this run (h2cache calibrate), or allow it with "
            "method.allow_transfer=true"
        ) from error
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name != "check_inputs":
            raise
        raise UserError(str(error)) from error


def _settings(job: Job, choices: Mapping[str, str], drawing: Drawing, machine: str) -> str:
    model = job.model
    width, height = drawing.frames[0].size
    frames = f", {len(drawing.frames)} frames at {model.fps} a second" if drawing.is_video else ""
    return (
        f"{'no cache' if job.method is None else choices['method']} on {choices['model']}, "
        f"{width}x{height}{frames}, {model.num_inference_steps} steps, seed {job.seed}, {model.dtype} on {machine}"
    )


def _by_branch(trace: pd.DataFrame) -> pd.DataFrame:
    """The trace with a stage of its own for each branch of guidance: another context, or another half of the batch."""
    names = trace["stage"]
    for branch in ("context", "sample"):
        if trace[branch].nunique() > 1:
            names = names + " " + trace[branch].astype(str)
    return trace.assign(stage=names)


def _record(cfg: DictConfig, choices: Mapping[str, str], machine: str) -> str:
    """The resolved configuration as YAML, under what it was drawn with."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    chosen = " ".join(f"{group}={choices[group]}" for group in ("model", "method"))
    header = f"# python run.py {chosen}\n# {versions}, Python {platform.python_version()}, {machine}\n"
    return header + OmegaConf.to_yaml(cfg)


def _picture(drawing: Drawing) -> Image.Image:
    return contact_sheet(drawing.frames) if drawing.is_video else drawing.image


def _comparison(baseline: Drawing, cached: Drawing) -> Image.Image:
    """Both in one picture: images side by side, videos one above the other."""
    if cached.is_video:
        return contact_sheet(baseline.frames, cached.frames)
    left, right = baseline.image, cached.image
    pair = Image.new("RGB", (left.width + GAP + right.width, left.height), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + GAP, 0))
    return pair
