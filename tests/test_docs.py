"""The docs site, README.md and the notebook: the site builds, all code runs, and every command is a valid one.

The Python blocks of a page run one after the other, in one namespace, in a folder that has the clone's `assets`. Four
names are given: `h2cache`, `pipe` (flux-mini), `prompt` and `prompts`. A run of flux-mini has eight steps at most, and
a pipeline of the hub is a tiny random one of the same class. A block with a title is a file, and is written instead. On
extend.md the commands run as well.
"""

import functools
import inspect
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import yaml
from diffusers import DiffusionPipeline, FluxPipeline
from families import family_named, generate
from hydra import compose, initialize_config_dir
from PIL import Image
from repository import REPOSITORY

import h2cache
import run
from h2cache import baselines
from h2cache.adapters import Registry
from h2cache.eval import __main__ as evaluation
from h2cache.eval.cli import arguments as commandline
from h2cache.eval.metrics import registry

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
WITH_COMMANDS = DOCS / "extend.md"
FAMILIES = {
    diffusers.FluxPipeline: "flux",
    diffusers.Flux2Pipeline: "flux2",
    diffusers.QwenImagePipeline: "qwen-image",
    diffusers.WanPipeline: "wan-a14b",
}
STEPS = 8
SHORT = {"steps": STEPS, "height": 64, "width": 64, "tries": 0, "rounds": 0}  # of a calibration
PROMPTS = [
    f'a {each} label that says "TEA" in white serif letters, on an orange brick wall' for each in ("green", "red")
]


class Block(NamedTuple):
    """A fenced block of a page. `title` is the name of its file, if it has one."""

    language: str
    title: str | None
    code: str


def blocks(page: Path) -> list[Block]:
    fences = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    titles = [re.search(r'title="([^"]+)"', attributes) for _, attributes, _ in fences]
    return [
        Block(language, title and title[1], code) for (language, _, code), title in zip(fences, titles, strict=True)
    ]


def commands(page: Path) -> list[str]:
    """The lines of shell and of indented blocks, and code in a line of text, that call a program of this repository."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^(?: {4})?(python (?:run\.py|-m) .*)$", text, re.MULTILINE)
    return lines + re.findall(r"`(python (?:run\.py|-m) [^`]*)`", text)


def named(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(REPOSITORY)))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the blocks run: as in the clone, as far as they know it."""
    for name in ("assets", "run.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def nothing_stays(monkeypatch) -> None:
    """What blocks register is gone afterwards."""
    monkeypatch.setattr(Registry, "added", ())
    monkeypatch.setattr(registry, "METRICS", dict(registry.METRICS))


@pytest.fixture
def small(monkeypatch) -> None:
    """Runs have few steps, searches take the first that they find, models of the hub are tiny, no video is encoded."""
    load, call = DiffusionPipeline.from_pretrained.__func__, FluxPipeline.__call__
    tune, calibrate = h2cache.tune, h2cache.calibrate

    def from_pretrained(cls: type, source: str, **options: Any) -> DiffusionPipeline:
        if not Path(source).exists():
            assert source in hub_ids()
            return tiny(cls)
        pipe = load(cls, source, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @functools.wraps(call)
    def few_steps(pipe: FluxPipeline, *args: Any, **kwargs: Any) -> Any:
        """At flux-mini's size, where a page leaves that to the model. A plan has the steps that it was made for."""
        kwargs = {"height": 128, "width": 128, "max_sequence_length": 40, **kwargs}
        if not isinstance(pipe.scheduler, h2cache.PlanScheduler):
            kwargs["num_inference_steps"] = min(STEPS, kwargs.get("num_inference_steps", STEPS))
        return call(pipe, *args, **kwargs)

    def tuned(pipe: Any, prompts: list[str], method: Any, target: Any, **options: Any) -> Any:
        return tune(pipe, prompts[:1], method, h2cache.Psnr(1), **{**options, "trials": 1})

    def calibrated(pipe: Any, prompts: list[str], budget: float | None = None, **options: Any) -> Any:
        if "quality" in options:
            options["quality"] = h2cache.AtLeast(psnr=1, fraction=0.5, confidence=0.5)
        return calibrate(pipe, prompts, budget, **{**options, **SHORT})

    class Recorded(h2cache.plans.Calibration):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, **SHORT})

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(FluxPipeline, "__call__", few_steps)
    monkeypatch.setattr(h2cache, "tune", tuned)
    monkeypatch.setattr(h2cache, "calibrate", calibrated)
    monkeypatch.setattr(h2cache.plans, "Calibration", Recorded)
    monkeypatch.setattr(import_module("h2cache.plans.calibrate"), "BUDGETS", (2,))  # the function has the module's name
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda frames, path, fps: None)


def hub_ids() -> set[str]:
    """The models that configs/model knows."""
    files = (REPOSITORY / "configs/model").glob("*.yaml")
    return {yaml.safe_load(file.read_text(encoding="utf-8"))["hub_id"] for file in files}


def tiny(kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """A pipeline of this class that takes the arguments of its class and denoises tiny latents."""
    family = family_named(FAMILIES[kind])

    def call(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> SimpleNamespace:
        inspect.signature(kind.__call__).bind(pipe, *args, **kwargs)  # TypeError for an argument that it does not have
        pipe.__class__ = kind
        latents = generate(family, pipe)
        pipe.__class__ = own
        assert latents.isfinite().all()
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))], frames=[[]])

    own = type(kind.__name__, (kind,), {"__call__": call, "enable_model_cpu_offload": lambda pipe: None})
    pipe = family.build()
    pipe.__class__ = own
    return pipe


def do(command: str, monkeypatch) -> None:
    """Run a line of a shell block in this process."""
    words = shlex.split(command)
    match words:
        case ["python", "run.py", *arguments]:
            program, name = run.main, "run.py"
        case ["python", "-m", "eval", *arguments]:
            program, name, arguments = evaluation.main, "eval", [*arguments, "launcher.workers=1"]
        case ["cat", file]:
            assert Path(file).is_file()
            return
        case _:
            raise AssertionError(f"{command}: teach tests/test_docs.py to run this command")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    try:
        program()
    except SystemExit as end:
        assert not end.code, command


@named([page for page in PAGES if any(block.language == "python" for block in blocks(page))])
def test_the_code_of_a_page_runs(page, folder, small, nothing_stays, flux_mini, monkeypatch):
    monkeypatch.setattr(flux_mini, "scheduler", flux_mini.scheduler)  # a block may put another in its place
    namespace = {"__name__": page.stem, "h2cache": h2cache, "pipe": flux_mini, "prompt": PROMPTS[0], "prompts": PROMPTS}
    for block in blocks(page):
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, f"{page.name}, a block", "exec"), namespace)
        elif block.language == "sh" and page == WITH_COMMANDS:
            for command in block.code.splitlines():
                do(command, monkeypatch)


@pytest.mark.thorough
def test_the_notebook_runs(folder, monkeypatch):
    """As it is, in the folder of a clone; it stores no output, and leaves the pipeline as it was."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads((REPOSITORY / "notebooks/frontier.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    namespace = {"__name__": "notebook"}
    monkeypatch.setattr(sys, "path", [*sys.path])
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"notebook, code {number}", "exec"), namespace)
    points = namespace["points"]
    assert (
        len(points) == 12 and np.isfinite(points["psnr"]).all() and (points["evaluations"] < namespace["STEPS"]).all()
    )
    assert len(namespace["ax"].lines) == points["method"].nunique() == 4
    assert namespace["found"].best.psnr >= 36
    assert namespace["draw"](namespace["prompt"]) == namespace["plain"]


@named([page for page in PAGES if commands(page)])
def test_every_command_is_a_valid_one(page):
    """Programs exist, and their configuration composes. What comes with values in capitals is a pattern."""
    for command in commands(page):
        words = [word for word in shlex.split(command.partition("#")[0])[1:] if word not in ("-m", "...")]
        program, *arguments = words
        if program not in ("run.py", "eval"):
            assert find_spec(program), command
        elif not {"--config-dir", "--help"} & set(arguments) and not re.search(r"=[A-Z]+\b|=\.\.\.|-m \w+\.", command):
            if arguments[:1] == ["votes"]:
                continue
            arguments = arguments[1:] if arguments[:1] == ["rescore"] else arguments
            root = "run" if program == "run.py" else "eval"
            overrides = [commandline.as_typed(argument, ("prompt", "out"), False) for argument in arguments]
            with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
                compose(root, overrides=[each for each in overrides if "," not in each or "[" in each or "'" in each])


def test_the_readme_links_to_files_that_exist():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    described = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    assert {*h2cache.__all__, *baselines.__all__} <= described


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    """Such as: a link or anchor that leads nowhere, a page that is in no menu, a docstring that cannot be read."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -r requirements-docs.txt")
    pytest.importorskip("mkdocstrings_handlers", reason="mkdocstrings is not installed")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "H2CacheConfig" in (tmp_path / "api/cache.html").read_text(encoding="utf-8")
