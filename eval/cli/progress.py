"""How far the work is, and the time left: bars in a terminal; of a sweep, a line now and then where nobody watches."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:  # sweeps need packages that drawing one image does without
    from h2cache.eval.generation.records import Cell
    from h2cache.eval.generation.sweep import Batch, Watcher

SILENCE = 60.0  # seconds between two lines
SECONDS, MINUTES = 30.0, 600.0  # what the speed of steps is taken from, and that of components, of which few are large
MB = 1_000_000
REDRAWS = 4  # of the bars, a second: each takes time from a model on the CPU


@contextmanager
def bar(messages: Console, title: str) -> Iterator[Callable[..., None]]:
    """A bar that is gone when the block ends; yields what to call with (done, total) and, by name, a `title`.

    Where nobody watches a terminal there is none: rich would leave an empty line in the log.
    """
    with _shown(messages, MofNCompleteColumn(), SECONDS) as progress:
        task = progress.add_task(title, total=None)
        progress.start()
        yield lambda done, total, title=None: progress.update(task, completed=done, total=total, description=title)


@contextmanager
def loading(messages: Console, model: str) -> Iterator[Callable[[int, int], None]]:
    """As `bar`, of bytes. It begins with the first call: until then the hub may show bars of a download."""
    with _shown(messages, DownloadColumn(), MINUTES) as progress:

        def show(done: int, total: int) -> None:
            if not progress.task_ids:
                progress.add_task(f"loading {model}", total=total)
                progress.start()
            progress.update(progress.task_ids[0], completed=done)

        yield show


@contextmanager
def _shown(messages: Console, amount: ProgressColumn, period: float) -> Iterator[Progress]:
    """A display of one task, not yet begun, that ends with the block.

    Args:
        amount: the column that says how much is done.
        period: the time left is reckoned from so many of the last seconds.
    """
    columns = (TextColumn("{task.description}"), BarColumn(None), amount, TimeElapsedColumn(), TimeRemainingColumn())
    # What is printed meanwhile goes above the bar, but not where stdout is a file.
    options = {"transient": True, "redirect_stdout": sys.stdout.isatty(), "disable": not messages.is_terminal}
    options["speed_estimate_period"] = period
    progress = Progress(*columns, console=messages, **options)
    try:
        yield progress
    finally:
        progress.stop()


def importing() -> AbstractContextManager:
    """What a terminal shows while torch and the libraries on it are imported; how long that takes nobody knows."""
    return Console(stderr=True).status("importing torch, diffusers and transformers")


@contextmanager
def watching(console: Console, names: dict) -> Iterator[Watcher]:
    """Who watches, for as long as the block lasts. `names`: what to call the settings, by the cells' `way`."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, refresh_per_second=REDRAWS)
    try:
        yield Bars(progress, names)
    finally:
        progress.stop()


class Bars:
    """Images of the whole sweep, with the time left; then prompts, settings of this prompt, steps of this image."""

    def __init__(self, progress: Progress, names: dict):
        self._progress = progress
        self._names = names
        self._left: Counter[str] = Counter()

    def has(self, batches: Sequence[Batch]) -> None:
        self._sizes = {_prompt(batch[0]): len(batch) for batch in batches}
        self._left = Counter(self._sizes)
        self._images = self._progress.add_task("images", total=self._left.total())
        self._prompts = self._progress.add_task("prompts", total=len(batches))
        self._settings = self._progress.add_task("settings", total=None, visible=False)
        self._steps = self._progress.add_task("steps", total=None, visible=False)
        self._model = self._progress.add_task("loading, MB", total=None, visible=False)

    def loads(self, done: int, total: int) -> None:
        self._progress.start()
        self._progress.update(self._model, completed=done // MB, total=total // MB, visible=done < total)

    def begins(self, cell: Cell) -> None:
        size, left = self._sizes[_prompt(cell)], self._left[_prompt(cell)]
        name = self._names.get(cell.way, "")
        self._progress.update(self._settings, description=name, total=size, completed=size - left, visible=True)
        self._progress.update(self._steps, total=cell.steps, completed=0, visible=True)

    def steps(self, done: int, total: int) -> None:
        self._progress.update(self._steps, completed=done)

    def ends(self, cell: Cell, reason: str | None) -> None:
        self._left[_prompt(cell)] -= 1
        self._progress.advance(self._images)
        if not self._left[_prompt(cell)]:
            self._progress.advance(self._prompts)


class Lines:
    """For a log: a line at the start, and one a minute."""

    def __init__(self, console: Console):
        self._console = console

    def has(self, batches: Sequence[Batch]) -> None:
        self._total, self._done = sum(map(len, batches)), 0
        self._begun = self._said = time.monotonic()
        self._console.print(f"{self._total} images to draw, {len(batches)} prompts")

    def loads(self, done: int, total: int) -> None:
        pass

    def begins(self, cell: Cell) -> None:
        pass

    def steps(self, done: int, total: int) -> None:
        pass

    def ends(self, cell: Cell, reason: str | None) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._said > SILENCE:
            self._said = now
            left = (now - self._begun) / self._done * (self._total - self._done)
            self._console.print(f"{self._done} of {self._total} images, about {left / 60:.0f} minutes left")


def _prompt(cell: Cell) -> tuple[str, int]:
    return cell.prompt.id, cell.seed
