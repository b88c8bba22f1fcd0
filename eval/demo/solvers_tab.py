"""The demo's tab Plans and solvers: other ways to evaluate the model less often, in a table and a gallery."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from h2cache import PlanConfig
from h2cache.eval.demo.facts import COLUMNS, html_table, row_of
from h2cache.eval.demo.studio import Run, Studio, Task
from h2cache.eval.demo.visit import PRIVATE, PROGRESS, Kept, baseline, onto, task_of, told
from h2cache.eval.errors import UserError
from h2cache.eval.models.schedulers import NAMES as SOLVERS

EVALUATIONS = 12  # of each solver, as of the plan flux-mini-4


def make(studio: Studio, task: list[Any], kept: gr.State) -> None:
    """Put the tab where the page is being made; arguments as those of the tab Compare."""
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
        with told():
            prompt, seed, _, picture = of_task
            whole = task_of(prompt, seed, studio.model.num_inference_steps, picture)
            kept = baseline(studio, kept, whole, progress)
            lines = [COLUMNS, row_of("all steps", whole, kept.run, kept.run)]
            pictures = [(kept.run.picture, "all steps")]
            yield kept, html_table(lines), pictures
            for name in picked:
                try:
                    way, run = _way(studio, name, whole, int(limit), onto(progress, name))
                except UserError as error:  # a pipeline may refuse a solver; the others are drawn
                    lines.append((name, str(error)))
                else:
                    lines.append(row_of(name, way, run, kept.run))
                    pictures.append((run.picture, name))
                yield kept, html_table(lines), pictures

    begin.click(
        draw,
        [kept, *task, chosen, evaluations],
        [kept, table, gallery],
        show_progress="minimal",
        show_progress_on=gallery,
        **PRIVATE,
    )


def _way(
    studio: Studio, name: str, whole: Task, evaluations: int, on_step: Callable[[int, int], None]
) -> tuple[Task, Run]:
    """What is drawn by a plan or a solver of this name, with at most so many evaluations where it is a solver."""
    plan = studio.plans.get(name.removeprefix("plan "))
    if plan is not None:
        task = replace(whole, steps=plan.made_for.steps)
        return task, studio.draw(task, PlanConfig(plan), on_step=on_step)
    steps = (evaluations + 1) // 2 if name == "heun" else evaluations  # heun evaluates twice, but at the last step
    task = replace(whole, steps=steps)
    return task, studio.draw(task, solver=name, on_step=on_step)
