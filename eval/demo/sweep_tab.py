"""The demo's tab Sweep: H2-Cache at every pair of thresholds, in maps that fill in."""

import math
from collections.abc import Iterator
from html import escape
from itertools import product
from typing import Any

import gradio as gr
import numpy as np

from h2cache.eval.demo.facts import in_words
from h2cache.eval.demo.studio import Studio
from h2cache.eval.demo.visit import PRIVATE, PROGRESS, Kept, baseline, onto, picture_place, task_of, told
from h2cache.eval.errors import UserError

TAU1, TAU2 = "0.03, 0.05, 0.1, 0.15", "0.05, 0.1, 0.15, 0.25"
MOST_CELLS = 100
FEWER = "times fewer evaluations"


def make(studio: Studio, task: list[Any], kept: gr.State) -> None:
    """Put the tab where the page is being made; arguments as those of the tab Compare."""
    gr.HTML("H2-Cache at every pair of thresholds. The maps fill in as the pictures are drawn.")
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            tau1 = gr.Textbox(TAU1, label="tau1, structure")
            tau2 = gr.Textbox(TAU2, label="tau2, detail")
            with gr.Row():
                begin = gr.Button("Sweep", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=100)
            about_latest = gr.HTML()
            latest = picture_place()
        with gr.Column(scale=3, min_width=280):
            said = gr.HTML(elem_classes="facts")
            maps = picture_place()

    def sweep(
        kept: Kept | None,
        progress: gr.Progress = PROGRESS,
        *given: Any,
    ) -> Iterator[tuple[Any, ...]]:
        with told():
            wanted = task_of(*given[: len(task)])
            rows, columns = (
                _numbers(name, text) for name, text in zip(("tau1", "tau2"), given[len(task) :], strict=True)
            )
            count = len(rows) * len(columns)
            if count > MOST_CELLS:
                raise UserError(f"{count} pairs are too many: at most {MOST_CELLS}")
            kept = baseline(studio, kept, wanted, progress)
            values = {name: np.full((len(rows), len(columns)), math.nan) for name in (FEWER, "PSNR, dB")}
            base = studio.methods["h2cache"]
            for done, ((i, one), (j, two)) in enumerate(product(enumerate(rows), enumerate(columns)), 1):
                pair = f"tau1 = {one:g}, tau2 = {two:g}"
                run = studio.draw(wanted, base.updated(tau1=one, tau2=two), on_step=onto(progress, pair))
                values[FEWER][i, j] = kept.run.calls / run.evaluations(kept.run)
                values["PSNR, dB"][i, j] = run.fidelity(kept.run)
                drawn = studio.heat_maps({"tau1": rows}, {"tau2": columns}, values)
                words = f"{done} of {count} pairs, one picture each, {escape(in_words(wanted))}"
                yield kept, words, drawn, pair, run.picture

    begun = begin.click(
        sweep,
        [kept, *task, tau1, tau2],
        [kept, said, maps, about_latest, latest],
        show_progress="minimal",
        show_progress_on=latest,
        **PRIVATE,
    )
    stop.click(None, cancels=[begun], **PRIVATE)


def _numbers(name: str, text: str) -> list[float]:
    """The different numbers in `text`, in their order. UserError where there is another word, or none at all."""
    try:
        numbers = sorted({float(word) for word in text.replace(",", " ").split()})
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UserError(f"{name}={text!r} is not allowed: it must be numbers, such as 0.05, 0.1, 0.2")
    return numbers
