"""The page of `h2cache demo`: prompt, method and its fields; with and without a cache; sweeps; plans and solvers.

What a visitor draws is theirs: it is kept in the session and in the page. All share one pipeline, which draws one
picture at a time. Text that a visitor types is shown escaped.
"""

import base64
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from rich.console import Console

from h2cache import PlanConfig
from h2cache.eval.cli import arguments as commandline
from h2cache.eval.cli import terminal
from h2cache.eval.demo.controls import changed, controls, fields_of
from h2cache.eval.demo.studio import GAIN, Run, Studio, Task, difference_map, film
from h2cache.eval.errors import UserError
from h2cache.eval.models.pipelines import find_folder
from h2cache.eval.models.schedulers import NAMES as SOLVERS

PROGRAM = "h2cache demo"
EMBEDDED = ("flux-mini", "hunyuan-mini")
FIRST_CHOICES = ("balanced", "h2cache")
TAU1, TAU2 = "0.03, 0.05, 0.1, 0.15", "0.05, 0.1, 0.15, 0.25"
MOST_CELLS = 100
EVALUATIONS = 12  # of each solver, as of the plan flux-mini-4
FEWER = "times fewer evaluations"
COLUMNS = ("way", "steps", "evaluations", "PSNR", "denoising", "speedup")
HIDDEN = {"api_visibility": "private"}
BETWEEN = 0.25  # seconds between two messages on how far a picture is
PROGRESS = gr.Progress()  # a default of this kind is gradio's way to hand each call its own
FILES_KEPT = 3600  # seconds that pictures stay on disk
STYLE = """
.facts table {width: 100%; border-collapse: collapse}
.facts :is(table, tr, th, td) {border: 0 !important}
.facts th {text-align: left; white-space: nowrap; padding: 2px 14px 2px 0; vertical-align: top}
.facts td {padding: 2px 0; overflow-wrap: anywhere}
.wide {overflow-x: auto}
.wide td {white-space: nowrap; padding-right: 14px}
.headline {display: flex; flex-wrap: wrap; gap: 6px 28px; margin-bottom: 8px}
.film video {width: 100%}
.picture .image-frame {width: 100%}
.picture img {width: 100%; max-width: 480px; margin: auto; object-fit: contain}
.headline b {display: block; font-size: 1.5em; line-height: 1.2}
"""


@dataclass(frozen=True)
class Kept:
    """The uncached run of a session's last task, so that turning a threshold draws one picture and not two."""

    task: Task
    run: Run


def embedded() -> list[str]:
    """The models of this repository that the page is for; of later ones those whose weights are there."""
    first, *others = EMBEDDED
    return [first, *(name for name in others if find_folder(f"assets/{name}", "model_index.json"))]


def main(models: Sequence[Sequence[str]], host: str, port: int | None) -> None:
    """Serve the page until Ctrl-C. Exit code 2 for what the user can put right.

    Args:
        models: for each of them the overrides of configs/run.yaml.
        host: the address to listen at.
        port: None: the first free one from 7860.
    """
    commandline.prepare()
    try:
        with Console(stderr=True, highlight=False).status("loading the model"):
            busy = threading.Lock()
            studios = [Studio.opened(overrides, busy) for overrides in models]
        serve(studios, host, port)
    except (UserError, OSError) as error:  # OSError: the port is taken
        commandline.fail(str(error), PROGRAM)
    except KeyboardInterrupt:
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:
        commandline.fail(commandline.explain(error, PROGRAM, "give one value"), PROGRAM)


def serve(studios: Sequence[Studio], host: str, port: int | None, in_background: bool = False) -> gr.Blocks:
    """The page, at work at this address.

    Args:
        in_background: return while it serves; `close()` ends it.
    """
    page = _blocks(studios)
    page.queue(default_concurrency_limit=8)  # visitors wait for the pipeline, and see that they do
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=in_background,
        quiet=in_background,
        footer_links=[],
        css=STYLE,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return page


def _blocks(studios: Sequence[Studio]) -> gr.Blocks:
    """The whole page, not yet served: a tab for each model where there are several."""
    with gr.Blocks(
        title="H2-Cache", analytics_enabled=False, delete_cache=(FILES_KEPT, FILES_KEPT), fill_width=False
    ) as blocks:
        gr.HTML("<h1>H2-Cache</h1>")
        for studio in studios:
            with gr.Tab(studio.name) if len(studios) > 1 else nullcontext():
                Page(studio).make()
    return blocks


class Page:
    """What there is of one model, and what it does."""

    def __init__(self, studio: Studio):
        self._studio = studio

    def make(self) -> None:
        """Put it where the page is being made."""
        studio = self._studio
        gr.HTML(escape(studio.title))
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                prompt = gr.Textbox(studio.first_prompt, label="prompt", lines=2, max_lines=6)
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    seed = gr.Number(0, precision=0, minimum=0, label="seed", min_width=100)
                    steps = gr.Slider(1, max(100, studio.steps), studio.steps, step=1, label="steps", min_width=160)
        takes_picture = studio.model.picture_argument is not None
        picture = gr.Image(type="filepath", label="picture", format="png", visible=takes_picture)
        task = [prompt, seed, steps, picture]
        kept = gr.State(None)
        with gr.Tab("Compare"):
            self._compare(task, kept)
        with gr.Tab("Sweep"):
            self._sweep(task, kept)
        with gr.Tab("Plans and solvers"):
            self._ways(task, kept)

    def _compare(self, task: list[Any], kept: gr.State) -> None:
        methods = self._studio.methods
        first = next((name for name in FIRST_CHOICES if name in methods), None)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                method = gr.Dropdown(list(methods), value=first, label="method")
                fields = gr.Column()
            with gr.Column(scale=3, min_width=280):
                shown = gr.HTML(elem_classes="film") if self._studio.model.makes_videos else _slider()
                facts = gr.HTML(elem_classes="facts")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                gr.HTML("<h3>What the cache decided, step by step</h3>")
                decisions = _picture()
            with gr.Column(scale=2, min_width=280):
                gr.HTML("<h3>Difference</h3>dark: equal; brightest: a quarter of the range or more")
                differences = _picture()

        def draw(
            kept: Kept | None, progress: gr.Progress, name: str, task: Sequence[Any], values: Mapping[str, Any]
        ) -> Iterator[tuple[Any, ...]]:
            with _told():
                wanted = _task(*task)
                config = changed(methods[name], dict(values))
                run = self._studio.draw(wanted, config, on_step=_onto(progress, name))
                if kept is None or kept.task != wanted:  # what the cache drew first: a second or more before the other
                    drawn = _table({"drawn": _what(wanted), "with the cache": terminal.timing(run.drawing)}.items())
                    yield kept, self._shown(run), drawn, None, None
                kept = self._baseline(kept, wanted, progress)
                shown, table = self._shown(run, kept.run), _facts(wanted, run, kept.run)
                yield kept, shown, table, self._studio.decisions(run), difference_map(run.picture, kept.run.picture)

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
                    **HIDDEN,
                )

    def _sweep(self, task: list[Any], kept: gr.State) -> None:
        gr.HTML("H2-Cache at every pair of thresholds. The maps fill in as the pictures are drawn.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                tau1 = gr.Textbox(TAU1, label="tau1, structure")
                tau2 = gr.Textbox(TAU2, label="tau2, detail")
                with gr.Row():
                    begin = gr.Button("Sweep", variant="primary", min_width=100)
                    stop = gr.Button("Stop", min_width=100)
                about_latest = gr.HTML()
                latest = _picture()
            with gr.Column(scale=3, min_width=280):
                said = gr.HTML(elem_classes="facts")
                maps = _picture()

        def sweep(
            kept: Kept | None,
            progress: gr.Progress = PROGRESS,
            *given: Any,
        ) -> Iterator[tuple[Any, ...]]:
            with _told():
                wanted = _task(*given[: len(task)])
                rows, columns = (
                    _numbers(name, text) for name, text in zip(("tau1", "tau2"), given[len(task) :], strict=True)
                )
                count = len(rows) * len(columns)
                if count > MOST_CELLS:
                    raise UserError(f"{count} pairs are too many: at most {MOST_CELLS}")
                kept = self._baseline(kept, wanted, progress)
                values = {name: np.full((len(rows), len(columns)), math.nan) for name in (FEWER, "PSNR, dB")}
                base = self._studio.methods["h2cache"]
                for done, ((i, one), (j, two)) in enumerate(product(enumerate(rows), enumerate(columns)), 1):
                    pair = f"tau1 = {one:g}, tau2 = {two:g}"
                    run = self._studio.draw(wanted, base.updated(tau1=one, tau2=two), on_step=_onto(progress, pair))
                    values[FEWER][i, j] = kept.run.calls / run.evaluations(kept.run)
                    values["PSNR, dB"][i, j] = run.psnr(kept.run)
                    drawn = self._studio.heat_maps({"tau1": rows}, {"tau2": columns}, values)
                    words = f"{done} of {count} pairs, one picture each, {escape(_what(wanted))}"
                    yield kept, words, drawn, pair, run.picture

        begun = begin.click(
            sweep,
            [kept, *task, tau1, tau2],
            [kept, said, maps, about_latest, latest],
            show_progress="minimal",
            show_progress_on=latest,
            **HIDDEN,
        )
        stop.click(None, cancels=[begun], **HIDDEN)

    def _ways(self, task: list[Any], kept: gr.State) -> None:
        studio = self._studio
        gr.HTML(
            "Three ways to evaluate the model less often: a calibrated plan, another solver, fewer steps. All are "
            "compared with the picture of all steps by the pipeline's own solver. A plan has its own number of steps."
        )
        most = max(2, studio.model.num_inference_steps)
        names = [*(f"plan {name}" for name in studio.plans), *SOLVERS]
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                chosen = gr.CheckboxGroup(names, value=names, label="plans and solvers")
                evaluations = gr.Slider(
                    1, most, min(EVALUATIONS, most), step=1, label="evaluations of each solver, at most"
                )
                begin = gr.Button("Draw all", variant="primary")
            with gr.Column(scale=3, min_width=280):
                table = gr.HTML(elem_classes=["facts", "wide"])
        gallery = gr.Gallery(label="pictures", buttons=[], columns=3, object_fit="contain", format="png", height="auto")

        def draw(
            kept: Kept | None,
            progress: gr.Progress = PROGRESS,
            *given: Any,
        ) -> Iterator[tuple[Any, ...]]:
            *of_task, picked, limit = given
            with _told():
                prompt, seed, _, picture = of_task
                whole = _task(prompt, seed, studio.model.num_inference_steps, picture)
                kept = self._baseline(kept, whole, progress)
                lines, pictures = (
                    [COLUMNS, _line("all steps", whole, kept.run, kept.run)],
                    [(kept.run.picture, "all steps")],
                )
                yield kept, _table(lines), pictures
                for name in picked:
                    try:
                        way, run = self._way(name, whole, int(limit), _onto(progress, name))
                    except UserError as error:  # a pipeline may refuse a solver; the others are drawn
                        lines.append((name, str(error)))
                    else:
                        lines.append(_line(name, way, run, kept.run))
                        pictures.append((run.picture, name))
                    yield kept, _table(lines), pictures

        begin.click(
            draw,
            [kept, *task, chosen, evaluations],
            [kept, table, gallery],
            show_progress="minimal",
            show_progress_on=gallery,
            **HIDDEN,
        )

    def _way(self, name: str, whole: Task, evaluations: int, on_step: Callable[[int, int], None]) -> tuple[Task, Run]:
        """What is drawn by a plan or a solver of this name, with at most so many evaluations where it is a solver."""
        plan = self._studio.plans.get(name.removeprefix("plan "))
        if plan is not None:
            task = replace(whole, steps=plan.made_for.steps)
            return task, self._studio.draw(task, PlanConfig(plan), on_step=on_step)
        steps = (evaluations + 1) // 2 if name == "heun" else evaluations  # heun evaluates twice, but at the last step
        task = replace(whole, steps=steps)
        return task, self._studio.draw(task, solver=name, on_step=on_step)

    def _shown(self, run: Run, whole: Run | None = None) -> Any:
        """The run beside the one without a cache, where that is there already."""
        if not run.drawing.is_video:
            waiting = Image.new("RGB", run.picture.size, "lightgray")  # a slider shows two pictures or none
            return whole.picture if whole else waiting, run.picture
        both = f"left: without a cache; middle: with it; right: their difference, {GAIN} times"
        words = both if whole else "with the cache"
        source = base64.b64encode(film(self._studio.model.fps, run, whole)).decode()
        return f'{words}<video src="data:video/mp4;base64,{source}" autoplay loop muted playsinline controls></video>'

    def _baseline(self, kept: Kept | None, task: Task, progress: gr.Progress) -> Kept:
        """The session's uncached run of the task, drawn unless it is there."""
        if kept is not None and kept.task == task:
            return kept
        return Kept(task, self._studio.draw(task, on_step=_onto(progress, "without a cache")))


def _slider() -> gr.ImageSlider:
    """Where two images are, one above the other."""
    label = "left: without a cache; right: with it"
    return gr.ImageSlider(label=label, type="pil", interactive=False, elem_classes="pair", format="png")


def _picture() -> gr.Image:
    """A place for a picture, without words over it."""
    return gr.Image(show_label=False, interactive=False, format="png", buttons=["fullscreen"], elem_classes="picture")


@contextmanager
def _told() -> Iterator[None]:
    """Show the visitor a sentence about what can be put right; gradio shows it as markup, so that it is escaped."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise gr.Error(escape(str(error)), print_exception=False) from error


def _task(prompt: str, seed: float | None, steps: float, picture: str | None) -> Task:
    """What the inputs hold. UserError for a seed that is none."""
    if seed is None or not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} is not allowed: it must be a whole number from 0 to 2**63 - 1")
    return Task(prompt, int(seed), int(steps), picture and Path(picture))


def _numbers(name: str, text: str) -> list[float]:
    """The different numbers in `text`, in their order. UserError where there is another word, or none at all."""
    try:
        numbers = sorted({float(word) for word in text.replace(",", " ").split()})
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UserError(f"{name}={text!r} is not allowed: it must be numbers, such as 0.05, 0.1, 0.2")
    return numbers


def _onto(progress: gr.Progress, words: str) -> Callable[[int, int], None]:
    """Called after each step, tells the visitor of some: each message costs as much time as a part of a step."""
    told = -math.inf

    def after_step(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > BETWEEN:
            told = time.monotonic()
            progress((done, total), desc=words, unit="steps")

    return after_step


def _what(task: Task) -> str:
    return f"seed {task.seed}, {task.steps} steps: {task.prompt}"


def _facts(task: Task, run: Run, whole: Run) -> str:
    """What the cache gained and cost, as HTML. Every word of it is escaped."""
    gained = whole.drawing.denoising_seconds / run.drawing.denoising_seconds
    headline = {
        "speedup of denoising": f"{gained:.2f}x",
        "PSNR": _decibels(run, whole),
        "evaluations of the model": f"{run.evaluations(whole):.1f} of {whole.calls}",
        "blocks computed": f"{run.summary['computed_fraction']:.0%}",
    }
    table = {
        "drawn": _what(task),
        "with the cache": terminal.timing(run.drawing),
        **terminal.comparison(run.drawing, whole.drawing),
        "bound": terminal.bound(run.summary),
        **terminal.sigmas(run.summary),
    }
    numbers = "".join(f"<span>{escape(name)}<b>{escape(value)}</b></span>" for name, value in headline.items())
    return f'<div class="headline">{numbers}</div>{_table(table.items())}'


def _table(rows: Iterable[Sequence[str]]) -> str:
    """As HTML, the first word of each row a heading."""
    lines = (
        "".join([f"<th>{escape(name)}</th>", *(f"<td>{escape(each)}</td>" for each in rest)]) for name, *rest in rows
    )
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _line(name: str, task: Task, run: Run, whole: Run) -> tuple[str, ...]:
    """A row of the table with COLUMNS."""
    seconds, speedup = run.drawing.denoising_seconds, whole.drawing.denoising_seconds / run.drawing.denoising_seconds
    done = f"{run.evaluations(whole):.1f}"
    return name, str(task.steps), done, _decibels(run, whole), f"{seconds:.2f} s", f"{speedup:.2f}x"


def _decibels(run: Run, whole: Run) -> str:
    value = run.psnr(whole)
    return "∞" if math.isinf(value) else f"{value:.2f} dB"
