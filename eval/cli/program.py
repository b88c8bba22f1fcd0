"""The program `h2cache`. Each command hands its options to the code behind run.py, `python -m eval` or the library.

Only typer is imported here: the help and a wrong option need neither torch nor Hydra.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

import h2cache

Fields = Annotated[
    list[str] | None,
    typer.Argument(help="Any other field, such as method.tau1=0.1.", metavar="FIELD=VALUE"),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A name that `doctor` lists, a hub id (OWNER/NAME) or a folder.")
]
Method = Annotated[str, typer.Option("--method", "-c", help="fast, balanced, careful, block_cache, none, ...")]
Prompt = Annotated[str, typer.Argument(help="What to draw.")]
Picture = Annotated[Path, typer.Option("--out", "-o", help="A PNG; of a video also an MP4.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the model's if not given.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the noise.")]

app = typer.Typer(
    name="h2cache",
    help="Caches for diffusion transformers: draw, compare, measure, tune.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
plans = typer.Typer(help="Plans: which steps a model computes.", no_args_is_help=True)
app.add_typer(plans, name="plan")


def main() -> None:
    """The entry point of the package."""
    app(prog_name="h2cache")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"h2cache {h2cache.__version__}")
        raise typer.Exit


@app.command()
def generate(
    prompt: Prompt,
    fields: Fields = None,
    model: Model = "flux-mini",
    method: Method = "balanced",
    seed: Seed = 0,
    out: Picture = Path("image.png"),
    steps: Steps = None,
) -> None:
    """Draw an image or a video and show what the cache did."""
    _draw("generate", prompt, fields, model, method, seed, out, steps)


@app.command()
def compare(
    prompt: Prompt,
    fields: Fields = None,
    model: Model = "flux-mini",
    method: Method = "balanced",
    seed: Seed = 0,
    out: Picture = Path("image.png"),
    steps: Steps = None,
) -> None:
    """Draw with and without a cache: PSNR, SSIM, speedup, both pictures in one."""
    _draw("compare", prompt, [*(fields or ()), "compare=true"], model, method, seed, out, steps)


@app.command()
def bench(
    experiments: Annotated[
        list[str] | None, typer.Argument(help="table1, frontier, ...; all if none is given. FIELD=VALUE: any field.")
    ] = None,
    model: Model = "flux-mini",
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each experiment, at most.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder; the same one goes on.")] = Path("results"),
    launcher: Annotated[str, typer.Option(help="local, or ray: on every GPU of a cluster.")] = "local",
) -> None:
    """Run the experiments: images, tables, figures and a page. An interrupted run goes on with the same command."""
    given = experiments or ()
    fields = [each for each in given if "=" in each or each.startswith("~")]  # ~FIELD leaves one out
    names = [each for each in given if each not in fields]
    chosen = [f"experiment=[{','.join(names)}]"] if names else []
    limits = [f"limit={limit}"] if limit else []
    sys.argv[1:] = [*_models().overrides(model), *chosen, *limits, f"out={out}", f"launcher={launcher}", *fields]
    _needs("eval", "datasets", "matplotlib", "pyiqa", "scipy", "jinja2")
    _code("cli.experiments").main("h2cache bench")


@app.command()
def rescore(
    out: Annotated[Path, typer.Argument(help="The folder of a run of `bench`.")] = Path("results"),
    fields: Annotated[
        list[str] | None, typer.Argument(help="Such as metric_weights=FOLDER.", metavar="FIELD=VALUE")
    ] = None,
) -> None:
    """Measure a run's images again, when weights of metrics have come; draw none."""
    sys.argv[1:] = ["rescore", f"out={out}", *(fields or ())]
    _needs("eval", "datasets", "matplotlib", "pyiqa", "scipy", "jinja2")
    _code("cli.experiments").main("h2cache rescore")


@app.command()
def votes(
    files: Annotated[list[Path], typer.Argument(help="What the page's Blind preference exported.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the table.")] = Path("results"),
) -> None:
    """Count blind votes: how often each method was preferred to the baseline."""
    _needs("eval", "scipy")
    _code("cli.votes").main(files, out, "h2cache votes")


@app.command()
def tune(
    fields: Fields = None,
    model: Model = "flux-mini",
    method: Method = "balanced",
    psnr: Annotated[float | None, typer.Option(help="As fast as possible at so many decibels.")] = None,
    speedup: Annotated[float | None, typer.Option(help="As close as possible at so many times fewer blocks.")] = None,
    wall_speedup: Annotated[float | None, typer.Option(help="... at so many times the speed, measured.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file, one prompt a line.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings tried in each search, at most.")] = 8,
    seed: Seed = 0,
) -> None:
    """Find the thresholds that reach a quality or a speed."""
    targets = {"psnr": psnr, "speedup": speedup, "wall-speedup": wall_speedup}
    given = [(name, value) for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise typer.BadParameter("give one of --psnr, --speedup and --wall-speedup")
    overrides = [*_models().overrides(model), f"method={method}", *(fields or ())]
    _code("cli.tuning").main(overrides, given[0], prompts, trials, seed)


@app.command()
def calibrate(
    prompts: Annotated[Path, typer.Argument(help="A file, one prompt a line.", exists=True, dir_okay=False)],
    fields: Annotated[
        list[str] | None, typer.Argument(help="Of configs/calibrate.yaml.", metavar="FIELD=VALUE")
    ] = None,
    model: Model = "flux-mini",
    budget: Annotated[float, typer.Option(min=1, help="How many times fewer steps.")] = 4,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the plan.")] = Path("plans"),
) -> None:
    """Search for the steps worth computing and write them as a plan."""
    asked = [f"budget={budget}", f"out={out}", f"prompts_file={prompts}"]
    sys.argv[1:] = [*_models().overrides(model), *asked, *(fields or ())]
    _code("cli.calibrate").main("h2cache calibrate")


@app.command()
def demo(
    fields: Fields = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="As in generate; may be given again. [default: embedded]")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0: at all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="From 7860 the first free one if not given.")
    ] = None,
) -> None:
    """Serve a page on which a method's fields are turned and their effect is seen."""
    _needs("demo", "gradio", "datasets", "matplotlib", "scipy", "jinja2")
    page = _code("demo.app")
    chosen = model or page.embedded()
    page.main([[*_models().overrides(name), *(fields or ())] for name in chosen], host, port)


@app.command()
def doctor() -> None:
    """Show what is on this machine and which models can run on it."""
    from rich.console import Console

    _code("cli.doctor").show(Console())


@plans.command()
def show(file: Annotated[Path, typer.Argument(help="A plan's JSON file.", exists=True, dir_okay=False)]) -> None:
    """Show what a plan computes, for which model, and what it reached."""
    _code("cli.plans").show(file)


@plans.command()
def export(
    file: Annotated[Path, typer.Argument(help="A plan's JSON file.", exists=True, dir_okay=False)],
    form: Annotated[str, typer.Option("--format", help="sigmas, k-diffusion or json.")] = "json",
) -> None:
    """Write a plan for other programs, to stdout: noise levels, a sampler for k-diffusion, or both as JSON."""
    _code("cli.plans").export(file, form)


def _draw(
    command: str,
    prompt: str,
    fields: list[str] | None,
    model: str,
    method: str,
    seed: int,
    out: Path,
    steps: int | None,
) -> None:
    asked = [f"model.num_inference_steps={steps}"] if steps else []
    settings = [f"method={method}", f"prompt={prompt}", f"seed={seed}", f"out={out}"]
    sys.argv[1:] = [*_models().overrides(model), *settings, *asked, *(fields or ())]
    _code("cli.generate").main(f"h2cache {command}")


def _models() -> Any:
    return _code("cli.models")


def _code(name: str) -> Any:
    """A module of h2cache.eval, which is imported when its command is given."""
    import_module("h2cache.eval.cli.arguments").prepare()
    with import_module("h2cache.eval.cli.progress").importing():
        return import_module(f"h2cache.eval.{name}")


def _needs(extra: str, *libraries: str) -> None:
    """Exit with a sentence where the extra of the package is not installed."""
    from importlib.util import find_spec

    if missing := [name for name in libraries if find_spec(name) is None]:
        typer.echo(f"h2cache: error: {', '.join(missing)} missing: pip install 'h2cache[{extra}]'", err=True)
        raise typer.Exit(2)
