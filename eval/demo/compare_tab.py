"""The demo's tab Compare: a method and its fields; the picture with and without it, and what it decided."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from h2cache.eval.cli.terminal import timing
from h2cache.eval.demo.controls import changed, controls, fields_of
from h2cache.eval.demo.facts import facts_of, html_table, in_words
from h2cache.eval.demo.studio import GAIN, Run, Studio, difference_map, film
from h2cache.eval.demo.visit import PRIVATE, PROGRESS, Kept, baseline, onto, picture_place, task_of, told

FIRST_CHOICES = ("balanced", "h2cache")


def make(studio: Studio, task: list[Any], kept: gr.State) -> None:
    """Put the tab where the page is being made.

    Args:
        task: the inputs that say what is drawn.
        kept: holds the visit's `Kept`.
    """
    methods = studio.methods
    first = next((name for name in FIRST_CHOICES if name in methods), None)
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            method = gr.Dropdown(list(methods), value=first, label="method")
            fields = gr.Column()
        with gr.Column(scale=3, min_width=280):
            shown = gr.HTML(elem_classes="film") if studio.model.makes_videos else _slider()
            facts = gr.HTML(elem_classes="facts")
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            gr.HTML("<h3>What the cache decided, step by step</h3>")
            decisions = picture_place()
        with gr.Column(scale=2, min_width=280):
            gr.HTML("<h3>Difference</h3>dark: equal; brightest: a quarter of the range or more")
            differences = picture_place()

    def draw(
        kept: Kept | None, progress: gr.Progress, name: str, task: Sequence[Any], values: Mapping[str, Any]
    ) -> Iterator[tuple[Any, ...]]:
        with told():
            wanted = task_of(*task)
            config = changed(methods[name], dict(values))
            run = studio.draw(wanted, config, on_step=onto(progress, name))
            if kept is None or kept.task != wanted:  # what the cache drew first: a second or more before the other
                drawn = html_table({"drawn": in_words(wanted), "with the cache": timing(run.drawing)}.items())
                yield kept, _shown(studio, run), drawn, None, None
            kept = baseline(studio, kept, wanted, progress)
            both, numbers = _shown(studio, run, kept.run), facts_of(wanted, run, kept.run)
            apart = difference_map(run.picture, kept.run.picture)
            yield kept, both, numbers, gr.skip(), apart  # the timeline takes a moment that the picture need not wait
            yield kept, both, numbers, studio.decisions(run), apart

    with fields:

        @gr.render(inputs=method)
        def show_fields(name: str) -> None:
            turned_most, others = fields_of(methods[name])
            made = controls(methods[name], turned_most)
            button = gr.Button("Draw", variant="primary")
            with gr.Accordion("other fields", open=False):
                made |= controls(methods[name], others)

            def turned(kept: Kept | None, progress: gr.Progress = PROGRESS, *given: Any) -> Iterator:
                values = dict(zip(made, given[len(task) :], strict=True))
                yield from draw(kept, progress, name, given[: len(task)], values)

            gr.on(
                [button.click, task[0].submit, *(each.change for each in made.values())],
                turned,
                [kept, *task, *made.values()],
                [kept, shown, facts, decisions, differences],
                show_progress_on=facts,  # over the picture it would hide the first one
                trigger_mode="always_last",
                **PRIVATE,
            )


def _shown(studio: Studio, run: Run, whole: Run | None = None) -> Any:
    """The run beside the one without a cache, where that is there already."""
    if not run.drawing.is_video:
        waiting = Image.new("RGB", run.picture.size, "lightgray")  # a slider shows two pictures or none
        return whole.picture if whole else waiting, run.picture
    both = f"left: without a cache; middle: with it; right: their difference, {GAIN} times"
    words = both if whole else "with the cache"
    source = base64.b64encode(film(studio.model.fps, run, whole)).decode()
    return f'{words}<video src="data:video/mp4;base64,{source}" autoplay loop muted playsinline controls></video>'


def _slider() -> gr.ImageSlider:
    """Where two images are, one above the other."""
    label = "left: without a cache; right: with it"
    return gr.ImageSlider(label=label, type="pil", interactive=False, elem_classes="pair", format="png")
