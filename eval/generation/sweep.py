"""Draws what is not drawn yet: prompt by prompt, the settings in turns, so that all of them see the same machine."""

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers import DiffusionPipeline

from h2cache.eval.errors import UserError
from h2cache.eval.generation.backends import PeerCache, applied, own_copy
from h2cache.eval.generation.generate import generate
from h2cache.eval.generation.records import Cell, Drawn, Record, Store
from h2cache.eval.generation.videos import filmstrip
from h2cache.eval.generation.work import WorkCounter
from h2cache.eval.models.environment import machine_name
from h2cache.eval.models.loading import OnBytes, unwatched
from h2cache.eval.models.pipelines import ModelConfig, load_pipeline
from h2cache.eval.models.schedulers import denoised_with
from h2cache.eval.models.weights import Weights

if TYPE_CHECKING:  # results know images, which is no reason for images to know results
    from h2cache.eval.report.results import Tuning

Batch = tuple[Cell, ...]  # of one prompt: what is drawn in one go
Show = Callable[..., None]  # a bar, called with how many are done, of how many, and by name a `title`


@dataclass(frozen=True)
class Failure:
    """Why a cell could not be drawn."""

    reason: str
    details: str


@dataclass
class Report:
    """What a sweep did: records and failures by fingerprint.

    `overhead_seconds` is what the `drawn` images took besides the `drawing_seconds` that their records sum up to:
    putting the cache on, reading its trace, writing, telling the watcher. Loading and warm-up are neither.
    """

    records: dict[str, Record] = field(default_factory=dict)
    failures: dict[str, tuple[Cell, Failure]] = field(default_factory=dict)
    drawn: int = 0
    drawing_seconds: float = 0.0
    overhead_seconds: float = 0.0


class Watcher(Protocol):
    """Who is told how a sweep gets on; eval/cli/progress.py."""

    def has(self, batches: Sequence[Batch]) -> None:
        """That these are to be drawn."""

    def loads(self, done: int, total: int) -> None:
        """How many bytes of the model's weights are in place; (0, 0) where other processes load it."""

    def begins(self, cell: Cell) -> None:
        """That the launcher draws this cell now; never called where several are drawn at a time."""

    def steps(self, done: int, total: int) -> None:
        """How many denoising steps of the cell are done."""

    def ends(self, cell: Cell, reason: str | None) -> None:
        """That a cell is drawn and kept, or why it is not."""


class Search(Protocol):
    """What finds a setting by measuring it (eval/experiments/match.py); it can be sent to another process."""

    @property
    def name(self) -> str:
        """The setting's."""

    def find(self, pipe: DiffusionPipeline, on_trial: Callable[[int, int], None]) -> "Tuning":
        """The setting that was found; `on_trial` is called with how many were tried, and of how many."""


class Launcher(Protocol):
    """Where the work is done; eval/generation/launchers.py."""

    def machine(self, model: ModelConfig) -> str:
        """The name of the machine that `draw` and `search` measure times of; the model is not loaded for it."""

    def search(
        self, model: ModelConfig, searches: Sequence[Search], show: Show, on_machine: Callable[[str], None]
    ) -> Iterator[tuple[Search, "Tuning | Failure"]]:
        """Make every search, in whatever order, and hand out what each has found when it is there.

        Each is made whole on one of the pipelines that `draw` draws with. `on_machine`: as of `draw`.
        """

    def draw(
        self, model: ModelConfig, batches: Sequence[Batch], watcher: Watcher, on_machine: Callable[[str], None]
    ) -> Iterator[tuple[Cell, Drawn | Failure]]:
        """Draw every cell of every batch, in whatever order, and hand out each when it is there.

        `on_machine` is called with the name of a machine before the first drawing there, and may raise.
        """


class Painter:
    """A loaded pipeline that draws cells. UserError if it cannot be had."""

    def __init__(self, model: ModelConfig, on_bytes: OnBytes = unwatched):
        self._model = model
        try:
            self._pipe = load_pipeline(model, on_bytes)
        except torch.OutOfMemoryError as error:
            raise UserError(f"the model does not fit into the GPU's memory: {model.memory_advice}") from error
        self._device = self._pipe._execution_device
        self.machine = machine_name(model)
        self._versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
        self._warm: set[tuple[Any, ...]] = set()
        self._copies: dict[tuple[Weights | None, bool], DiffusionPipeline] = {}

    def draw(self, cell: Cell, on_step: Callable[[int, int], None] = lambda done, total: None) -> Drawn | Failure:
        """The cell's image and measurements; or why there is none.

        What is new here is drawn twice: allocations and choices of kernels are in the first time alone.
        """
        try:
            cold, readied = None, self._readied_by(cell)
            if readied not in self._warm:
                cold = self._generate(cell, lambda done, total: None).denoising_seconds
                self._warm.add(readied)
            return replace(self._generate(cell, on_step), cold_seconds=cold)
        except Exception as error:  # whatever a method or a device can raise: the other cells go on
            reason, details = f"{type(error).__name__}: {error}".strip(), traceback.format_exc()
        gc.collect()  # an out-of-memory's frames hold what filled the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Failure(" ".join(reason.split()), details)

    def search(self, search: Search, on_trial: Callable[[int, int], None] = lambda done, total: None) -> "Tuning":
        """What a search finds with this pipeline."""
        return search.find(self._pipe, on_trial)

    def _readied_by(self, cell: Cell) -> tuple[Any, ...]:
        """The same for two cells if drawing one makes the other as fast as it will be.

        A GPU takes memory and chooses kernels by sizes. A CPU readies code alone, whatever a method's numbers and the
        size of the batch.
        """
        if self._device.type == "cpu":
            return type(cell.method), getattr(cell.method, "cache", None), cell.scheduler, cell.weights
        return cell.method, cell.scheduler, cell.weights, cell.call

    def _generate(self, cell: Cell, on_step: Callable[[int, int], None]) -> Drawn:
        start = time.perf_counter()
        picture = cell.prompt.picture and cell.prompt.picture.image
        arguments = self._model.arguments_with(picture) | {"num_inference_steps": cell.steps} | dict(cell.call)
        pipe = self._pipe_for(cell)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        with ExitStack() as stack:
            stack.enter_context(denoised_with(pipe, cell.scheduler))
            work = stack.enter_context(WorkCounter(pipe))
            solver = type(pipe.scheduler).__name__
            handle = stack.enter_context(applied(pipe, cell.method)) if cell.method else None
            begun = time.perf_counter()
            drawing = generate(pipe, cell.prompt.text, cell.seed, on_step, **arguments)
            generating = time.perf_counter() - begun
        return Drawn(
            image=filmstrip(drawing.frames) if drawing.is_video else drawing.image,
            text_seconds=drawing.text_seconds,
            denoising_seconds=drawing.denoising_seconds,
            vae_seconds=drawing.vae_seconds,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
            trace=handle and handle.trace.to_pandas(),
            computed_fraction=handle.summary()["computed_fraction"] if handle else 1.0,
            multiply_adds=work.multiply_adds,
            calls=work.calls,
            solver=solver,
            machine=self.machine,
            versions=self._versions,
            overhead_seconds=time.perf_counter() - start - generating,
        )

    def _pipe_for(self, cell: Cell) -> DiffusionPipeline:
        """The pipeline, or a copy of it with other weights or for libraries that change theirs for good."""
        alone = isinstance(cell.method, PeerCache) and cell.method.leaves_traces
        if not (cell.weights or alone):
            return self._pipe
        if (cell.weights, alone) not in self._copies:
            copy = own_copy(self._pipe)
            if cell.weights:
                cell.weights.put_on(copy)
            self._copies[cell.weights, alone] = copy
        return self._copies[cell.weights, alone]


def found(store: Store, cells: Sequence[Cell]) -> Report:
    """What `store` has of `cells`; nothing is drawn."""
    named = {store.fingerprint(cell): cell for cell in cells}
    return Report({name: record for name, cell in named.items() if (record := store.read(cell))})


def sweep(store: Store, cells: Sequence[Cell], model: ModelConfig, launcher: Launcher, watcher: Watcher) -> Report:
    """Draw those of `cells` that `store`, which is locked, does not have.

    A cell that fails is noted, and the others go on. UserError for what concerns them all: no model, no room, or times
    of another machine among the records.
    """
    report = found(store, cells)
    named = ((store.fingerprint(cell), cell) for cell in cells)
    missing = {name: cell for name, cell in named if name not in report.records}
    if not missing:
        return report
    batches = _batches(missing.values())
    watcher.has(batches)
    for cell, outcome in launcher.draw(model, batches, watcher, _same_machine(store, report.records)):
        start = time.perf_counter()
        name = store.fingerprint(cell)
        if isinstance(outcome, Failure):
            report.failures[name] = cell, outcome
            store.write_failure(cell, outcome.details)
            watcher.ends(cell, outcome.reason)
            continue
        report.records[name] = record = store.write(cell, outcome)
        report.drawn += 1
        watcher.ends(cell, None)
        report.drawing_seconds += record.total_seconds
        report.overhead_seconds += outcome.overhead_seconds + time.perf_counter() - start
    return report


def _batches(cells: Iterable[Cell]) -> list[Batch]:
    """Those of one prompt together, in the order given."""
    prompts: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        prompts.setdefault((cell.prompt.id, cell.seed), []).append(cell)
    return [tuple(batch) for batch in prompts.values()]


def _same_machine(store: Store, records: Mapping[str, Record]) -> Callable[[str], None]:
    """What refuses a machine other than that of the records and of those it was called with before."""
    known = {record.machine for record in records.values()}

    def check(machine: str) -> None:
        if known - {machine}:
            raise UserError(
                f"{store.folder} holds images drawn on {' and '.join(sorted(known))}, and this is {machine}: times of "
                "different machines are not comparable; go on there, or choose another out="
            )
        known.add(machine)

    return check
