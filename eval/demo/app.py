"""The page of `h2cache demo`: prompt, method and its fields; with and without a cache; sweeps; plans and solvers.

What a visitor draws is theirs: it is kept in the session and in the page. All share one pipeline, which draws one
picture at a time. Text that a visitor types is shown escaped.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from html import escape

import gradio as gr
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from h2cache.eval.cli import arguments as commandline
from h2cache.eval.cli.progress import loading
from h2cache.eval.demo import compare_tab, solvers_tab, sweep_tab
from h2cache.eval.demo.studio import Studio
from h2cache.eval.errors import UserError
from h2cache.eval.models.pipelines import find_folder

PROGRAM = "h2cache demo"
EMBEDDED = ("flux-mini", "hunyuan-mini")
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
        serve(list(_opened(models)), host, port)
    except (UserError, OSError) as error:  # OSError: the port is taken
        commandline.fail(str(error), PROGRAM)
    except KeyboardInterrupt:
        sys.exit(130)
    except (HydraException, OmegaConfBaseException) as error:
        commandline.fail(commandline.explain(error, PROGRAM, "give one value"), PROGRAM)


def _opened(models: Sequence[Sequence[str]]) -> Iterator[Studio]:
    """A studio of each model, with a bar for each while it is loaded."""
    messages, busy = Console(stderr=True, highlight=False), threading.Lock()
    for number, overrides in enumerate(models, 1):
        with loading(messages, f"model {number} of {len(models)}") as on_bytes:
            yield Studio.opened(overrides, busy, on_bytes)


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
                _page_of(studio)
    return blocks


def _page_of(studio: Studio) -> None:
    """What there is of one model, where the page is being made."""
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
        compare_tab.make(studio, task, kept)
    with gr.Tab("Sweep"):
        sweep_tab.make(studio, task, kept)
    with gr.Tab("Plans and solvers"):
        solvers_tab.make(studio, task, kept)
