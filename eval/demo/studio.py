"""What the demo draws, without its page: one pipeline that everybody shares, and the pictures made of a run."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from h2cache import CacheConfig, Plan, PlanConfig
from h2cache.eval.cli.draw import STOP_SIGN, WARM_UP_STEPS
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS, REPOSITORY
from h2cache.eval.generation.backends import applied
from h2cache.eval.generation.generate import Drawing, generate
from h2cache.eval.generation.videos import contact_sheet, filmstrip, write_mp4
from h2cache.eval.generation.work import WorkCounter
from h2cache.eval.metrics.images import psnr
from h2cache.eval.models.loading import OnBytes, unwatched
from h2cache.eval.models.pipelines import ModelConfig, describe_machine, load_pipeline
from h2cache.eval.models.schedulers import denoised_with
from h2cache.eval.report.figures.heatmap import COLOURS, heat_panel
from h2cache.eval.report.figures.images import difference
from h2cache.eval.report.figures.style import COLUMN, styled
from h2cache.eval.report.figures.traces import timeline
from h2cache.plans.conditions import digest

MOVING_STAR = "a red star moving right quickly on a blue background"
CPU_STEPS = 30  # of the embedded model, two seconds on one core
FULL_COLOUR = 0.25  # of the range of values: how different a pixel is that has the brightest colour of the map
CELL = 0.36  # inches of height
GAIN = 4  # of the differences in a film
SHOWN_WIDTH = 256  # pixels of each video of a film, at least


@dataclass(frozen=True)
class Task:
    """What is drawn, whatever cache or solver draws it. `picture` is a file, for a model that takes one."""

    prompt: str
    seed: int
    steps: int
    picture: Path | None = None


@dataclass(frozen=True)
class Run:
    """One drawing and what it took.

    Fields:
        trace: of decisions; None without a cache.
        summary: of the trace; None without a cache.
        multiply_adds, calls: of the denoiser (`h2cache.eval.generation.work`).
    """

    drawing: Drawing
    trace: pd.DataFrame | None
    summary: Mapping[str, Any] | None
    multiply_adds: int
    calls: int

    @property
    def picture(self) -> Image.Image:
        """The image; of a video its contact sheet."""
        return contact_sheet(self.drawing.frames) if self.drawing.is_video else self.drawing.image

    def fidelity(self, whole: "Run") -> float:
        """PSNR in dB, over all pixels of the image or video."""
        return psnr(filmstrip(self.drawing.frames), filmstrip(whole.drawing.frames))

    def evaluations(self, whole: "Run") -> float:
        """The work done, in evaluations of the model as `whole`, a run without a cache, has them.

        By the fraction of blocks computed where layers of the model's kinds are not counted.
        """
        if whole.multiply_adds:
            return self.multiply_adds * whole.calls / whole.multiply_adds
        return self.calls * (self.summary["computed_fraction"] if self.summary else 1)


@dataclass(frozen=True)
class Studio:
    """A loaded pipeline, and the methods that configs/method has for its model.

    Fields:
        name: of the model.
        methods: option of configs/method to what it makes; the other libraries' caches, which leave no trace, are
            left out, and so are plans, which are for their own number of steps.
        plans: those that ship for this model, by the name of their file.
        busy: held while anything is drawn; all studios of a process share it, as matplotlib has one style for them.
    """

    name: str
    model: ModelConfig
    pipe: Any
    methods: Mapping[str, CacheConfig]
    plans: Mapping[str, Plan]
    busy: threading.Lock

    @classmethod
    def opened(cls, overrides: Sequence[str], busy: threading.Lock, on_bytes: OnBytes = unwatched) -> "Studio":
        """With the model of configs/run.yaml under these overrides, loaded and warm. UserError if it cannot be had."""
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("run", overrides=[*overrides, "method=none"], return_hydra_config=True)
            name = cfg.hydra.runtime.choices["model"]
            try:
                model = instantiate(cfg.model, _convert_="all")
            except InstantiationException as error:
                raise UserError(f"model={name}: {error.__cause__ or error}") from error
            methods = {file.stem: _method(file.stem, overrides) for file in sorted((CONFIGS / "method").glob("*.yaml"))}
        pipe = load_pipeline(model, on_bytes)
        known = {name: each for name, each in methods.items() if _is_turned(each)}
        files = sorted((REPOSITORY / "assets" / "plans").glob("*.json"))
        plans = {
            file.stem: plan for file in files if (plan := Plan.load(file)).made_for.model == digest(pipe.transformer)
        }
        studio = cls(name, model, pipe, known, plans, busy)
        if model.picture_argument is None:
            for method in (None, *known.values()):
                run = studio.draw(Task("", 0, WARM_UP_STEPS), method)
                if run.trace is not None:
                    studio.decisions(run)  # a process's first figure takes half a second more than the next
                    break
        return studio

    @property
    def steps(self) -> int:
        """Of a run, if nobody says: the model's, and fewer where nothing but a CPU computes them."""
        steps = self.model.num_inference_steps
        return steps if self.pipe._execution_device.type == "cuda" else min(steps, CPU_STEPS)

    @property
    def first_prompt(self) -> str:
        """For the page: one that the embedded models know."""
        return MOVING_STAR if self.model.makes_videos else STOP_SIGN

    @property
    def title(self) -> str:
        """Model, size and machine, in words."""
        return (
            f"{self.name}, {self.model.width}x{self.model.height}, {self.model.dtype} on {describe_machine(self.model)}"
        )

    def draw(
        self,
        task: Task,
        method: CacheConfig | None = None,
        solver: str | None = None,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Run:
        """Draw when nobody else does. UserError where the pipeline refuses the method or an argument.

        Args:
            solver: one of `h2cache.eval.models.schedulers.NAMES`; None: the pipeline's own.
            on_step: called with (done, total) after each denoising step.
        """
        arguments = self.model.arguments_with(task.picture) | {"num_inference_steps": task.steps}
        with self.busy, ExitStack() as stack:
            try:
                stack.enter_context(denoised_with(self.pipe, solver))
                work = stack.enter_context(WorkCounter(self.pipe))
                handle = stack.enter_context(applied(self.pipe, method)) if method else None
                drawing = generate(self.pipe, task.prompt, task.seed, on_step, **arguments)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{self.name} does not fit into the GPU's memory: {self.model.memory_advice}"
                ) from error
            except (TypeError, ValueError) as error:
                raise UserError(str(error)) from error
            trace = handle and handle.trace.to_pandas()
            return Run(drawing, trace, handle and handle.summary(), work.multiply_adds, work.calls)

    def show(self, figure: Callable[..., Figure], *arguments: Any) -> Image.Image:
        """The figure that `figure(*arguments)` draws in the style of all figures, as a picture.

        One at a time: matplotlib has one style for the whole process.
        """
        with self.busy, styled():
            canvas = FigureCanvasAgg(figure(*arguments))
            canvas.draw()
            return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    def decisions(self, run: Run) -> Image.Image:
        """Metric, thresholds and decisions of a cached run, step by step."""
        return self.show(timeline, run.trace)

    def heat_maps(
        self,
        rows: Mapping[str, Sequence[float]],
        columns: Mapping[str, Sequence[float]],
        values: Mapping[str, np.ndarray],
    ) -> Image.Image:
        """A map for each of `values`, by its title, with NaN where nothing is drawn yet."""
        return self.show(_heat_maps, rows, columns, values)


def film(fps: int, run: Run, whole: Run | None) -> bytes:
    """An MP4: the run's video; or beside each other the one of `whole`, the run's, and their difference as gray."""
    frames = [np.asarray(frame) for frame in run.drawing.frames]
    if whole is not None:
        pairs = zip(run.drawing.frames, whole.drawing.frames, strict=True)
        gray = [np.uint8(255 * np.minimum(GAIN * difference(*pair), 1))[..., None].repeat(3, 2) for pair in pairs]
        frames = list(map(np.hstack, zip(whole.drawing.frames, frames, gray, strict=True)))
    times = -(-SHOWN_WIDTH // run.drawing.frames[0].width)
    file = BytesIO()
    write_mp4([Image.fromarray(frame.repeat(times, 0).repeat(times, 1)) for frame in frames], fps, file)
    return file.getvalue()


def difference_map(image: Image.Image, reference: Image.Image) -> Image.Image:
    """How far each pixel is from the reference's, as a colour: dark is equal, bright a quarter of the range or more."""
    level = np.minimum(difference(image, reference) / FULL_COLOUR, 1)
    return Image.fromarray((colormaps[COLOURS](level)[..., :3] * 255).astype(np.uint8))


def _is_turned(method: Any) -> bool:
    return isinstance(method, CacheConfig) and not isinstance(method, PlanConfig)


def _method(option: str, overrides: Sequence[str]) -> Any:
    """What an option of configs/method makes for the model; None where it has nothing for it or a library lacks."""
    try:
        return instantiate(compose("run", overrides=[*overrides, f"method={option}"]).method, _convert_="all")
    except Exception:  # Hydra's, for a file, a value or a library that is not there: the method is not offered
        return None


def _heat_maps(
    rows: Mapping[str, Sequence[float]], columns: Mapping[str, Sequence[float]], values: Mapping[str, np.ndarray]
) -> Figure:
    (down,) = rows.values()
    figure = Figure(figsize=(COLUMN, len(values) * (CELL * len(down) + 0.6)), layout="constrained")
    axes = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    for ax, (title, numbers) in zip(axes, values.items(), strict=True):
        heat_panel(ax, numbers, _number, title, rows, columns)
    return figure


def _number(value: float) -> str:
    return "" if np.isnan(value) else "∞" if np.isinf(value) else f"{value:.3g}"
