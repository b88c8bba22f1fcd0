"""`h2cache calibrate` and `python -m tools.calibrate`: searches for the steps that a model had best compute.

`budget=4`, or `budget=[3,4,6]`. Each plan is a file of a few KB, <model>-<budget>.json in `out`;
`python run.py method=plan method.plan=FILE` draws with it. A calibration that is stopped goes on where it was.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import h2cache
from h2cache.eval.cli import arguments as commandline
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS, REPOSITORY, atomic_files, check_writable
from h2cache.eval.generation.prompt_lines import prompt_lines
from h2cache.eval.models.pipelines import ModelConfig, load_pipeline

SEARCH = ("seed", "history", "ridge", "annealing", "climbing", "annealing_prompts", "batch_size")


@dataclass(frozen=True)
class Settings:
    """The fields of configs/calibrate.yaml. `search` are arguments of `h2cache.calibrate`, which checks them."""

    name: str
    model: ModelConfig
    budgets: tuple[float, ...]
    images: int
    prompts_file: Path | None
    folder: Path
    search: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.budgets or any(not isinstance(b, int | float) or isinstance(b, bool) for b in self.budgets):
            raise UserError(f"budget={list(self.budgets)} is not allowed: it must be a number from 1, or several")
        if not isinstance(self.images, int) or isinstance(self.images, bool) or self.images < 1:
            raise UserError(f"images={self.images} is not allowed: it must be a whole number from 1")

    def target(self, budget: float) -> Path:
        """The plan's file."""
        return self.folder / f"{self.name}-{budget:g}.json"


Prompts = Callable[[Path | None, int, int], list[str]]  # of a file, so many, with a seed


def of_file(file: Path | None, images: int, seed: int) -> list[str]:
    """The first `images` prompts of `file`. UserError where there are fewer, or no file is given."""
    if file is None:
        raise UserError("prompts_file must be given: a file with one prompt a line")
    return prompt_lines(file, images)


def main(program: str = "calibrate", prompts: Prompts = of_file) -> None:
    """Do what `sys.argv` says.

    Args:
        program: what errors call the program.
        prompts: where a calibration's prompts come from.
    """
    commandline.prepare()
    sys.argv[1:] = [commandline.as_typed(each, ("out", "prompts_file"), multirun=False) for each in sys.argv[1:]]

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="calibrate")
    def job(cfg: DictConfig) -> None:
        try:
            for line in run(_settings(cfg, HydraConfig.get().runtime.choices["model"]), prompts):
                print(line)
        except UserError as error:
            commandline.fail(str(error), program)

    try:
        job()
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # raised by Hydra
        commandline.fail(commandline.explain(error, program, "put several budgets in brackets, as [3,4]"), program)


def _settings(cfg: DictConfig, name: str) -> Settings:
    try:
        model = instantiate(cfg.model, _convert_="all")
    except InstantiationException as error:
        raise UserError(f"model={name}: {error.__cause__ or error}") from error
    return Settings(
        name=name,
        model=model,
        budgets=tuple(cfg.budget) if isinstance(cfg.budget, ListConfig) else (cfg.budget,),
        images=cfg.images,
        prompts_file=Path(cfg.prompts_file).expanduser() if cfg.prompts_file else None,
        folder=Path(cfg.out).expanduser() if cfg.out else REPOSITORY / "assets/plans",
        search={key: cfg[key] for key in SEARCH},
    )


def run(settings: Settings, prompts_of: Prompts) -> list[str]:
    """Calibrate for each budget, write the plans, and say what they reached."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    check_writable([settings.target(budget) for budget in settings.budgets])
    prompts = prompts_of(settings.prompts_file, settings.images, settings.search["seed"])
    pipe = load_pipeline(settings.model)
    call = dict(settings.model.call_arguments)
    steps = call.pop("num_inference_steps")
    lines = []
    for budget in settings.budgets:
        target = settings.target(budget)
        checkpoint = target.with_suffix(".search")
        with _bar() as bar:
            task = bar.add_task(f"{settings.name}, {budget:g}x", total=None, best="recording")
            try:
                plan = h2cache.calibrate(
                    pipe,
                    prompts,
                    budget,
                    steps,
                    checkpoint=checkpoint,
                    on_progress=partial(_show, bar, task),
                    **settings.search,
                    **call,
                )
            except ValueError as error:
                raise UserError(str(error)) from error
        with atomic_files([target]) as (file,):
            plan.save(file)
        checkpoint.unlink(missing_ok=True)
        lines.append(
            f"{target}: {len(plan.computed)} of {plan.steps} steps computed, {plan.notes['psnr']} dB on "
            f"{len(prompts)} prompts of the calibration; steps {', '.join(map(str, plan.computed))}"
        )
    return lines


def _show(bar: Progress, task: int, done: int, total: int, best: float) -> None:
    bar.update(task, completed=done, total=total, best=f"{best:.2f} dB")


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[best]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
