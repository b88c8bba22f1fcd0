"""What the demo says about a run, as HTML. Every word that a visitor typed is escaped."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from h2cache.eval.cli import terminal
from h2cache.eval.demo.studio import Run, Task

COLUMNS = ("way", "steps", "evaluations", "PSNR", "denoising", "speedup")  # of `row_of`


def in_words(task: Task) -> str:
    return f"seed {task.seed}, {task.steps} steps: {task.prompt}"


def facts_of(task: Task, run: Run, whole: Run) -> str:
    """What the cache gained and cost, as HTML. Every word of it is escaped."""
    gained = whole.drawing.denoising_seconds / run.drawing.denoising_seconds
    headline = {
        "speedup of denoising": f"{gained:.2f}x",
        "PSNR": decibels(run, whole),
        "evaluations of the model": f"{run.evaluations(whole):.1f} of {whole.calls}",
        "blocks computed": f"{run.summary['computed_fraction']:.0%}",
    }
    table = {
        "drawn": in_words(task),
        "with the cache": terminal.timing(run.drawing),
        **terminal.comparison(run.drawing, whole.drawing),
        "bound": terminal.bound(run.summary),
        **terminal.sigmas(run.summary),
    }
    numbers = "".join(f"<span>{escape(name)}<b>{escape(value)}</b></span>" for name, value in headline.items())
    return f'<div class="headline">{numbers}</div>{html_table(table.items())}'


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """As HTML, the first word of each row a heading."""
    lines = (
        "".join([f"<th>{escape(name)}</th>", *(f"<td>{escape(each)}</td>" for each in rest)]) for name, *rest in rows
    )
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def row_of(name: str, task: Task, run: Run, whole: Run) -> tuple[str, ...]:
    """A row of a table with COLUMNS."""
    seconds, speedup = run.drawing.denoising_seconds, whole.drawing.denoising_seconds / run.drawing.denoising_seconds
    done = f"{run.evaluations(whole):.1f}"
    return name, str(task.steps), done, decibels(run, whole), f"{seconds:.2f} s", f"{speedup:.2f}x"


def decibels(run: Run, whole: Run) -> str:
    value = run.fidelity(whole)
    return "∞" if math.isinf(value) else f"{value:.2f} dB"
