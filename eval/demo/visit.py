"""What the tabs of the demo share: what a visitor asks for, and the uncached run that the visit keeps.

Each visitor has their own: nothing of a visit is seen in another.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path

import gradio as gr

from h2cache.eval.demo.studio import Run, Studio, Task
from h2cache.eval.errors import UserError

BETWEEN = 0.25  # seconds between two messages on how far a picture is
PROGRESS = gr.Progress()  # a default of this kind is gradio's way to hand each call its own
PRIVATE = {"api_visibility": "private"}  # of an event: it is for the page alone


@dataclass(frozen=True)
class Kept:
    """The uncached run of a visit's last task, so that turning a threshold draws one picture and not two."""

    task: Task
    run: Run


def baseline(studio: Studio, kept: Kept | None, wanted: Task, progress: gr.Progress) -> Kept:
    """The visit's uncached run of the task, drawn unless it is kept."""
    if kept is not None and kept.task == wanted:
        return kept
    return Kept(wanted, studio.draw(wanted, on_step=onto(progress, "without a cache")))


def picture_place() -> gr.Image:
    """A place for a picture, without words over it."""
    return gr.Image(show_label=False, interactive=False, format="png", buttons=["fullscreen"], elem_classes="picture")


@contextmanager
def told() -> Iterator[None]:
    """Show the visitor a sentence about what can be put right; gradio shows it as markup, so that it is escaped."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise gr.Error(escape(str(error)), print_exception=False) from error


def task_of(prompt: str, seed: float | None, steps: float, picture: str | None) -> Task:
    """What the inputs hold. UserError for a seed that is none."""
    if seed is None or not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} is not allowed: it must be a whole number from 0 to 2**63 - 1")
    return Task(prompt, int(seed), int(steps), picture and Path(picture))


def onto(progress: gr.Progress, words: str) -> Callable[[int, int], None]:
    """Called after each step, tells the visitor of some: each message costs as much time as a part of a step."""
    told = -math.inf

    def after_step(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > BETWEEN:
            told = time.monotonic()
            progress((done, total), desc=words, unit="steps")

    return after_step
