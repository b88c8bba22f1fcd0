"""`h2cache calibrate` and `python -m tools.calibrate`: searches for the steps that a model had best compute.

`budget=4`, or `budget=[3,4,6]`. Each plan is a file of a few KB, <model>-<budget>.json in `out`;
`python run.py method=plan method.plan=FILE` draws with it. Plans that are finished when it is stopped stay.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from rich.console import Console

import h2cache
from h2cache.baselines.plans import bespoke, budcache, dpcache, l2p
from h2cache.eval.cli import arguments as commandline
from h2cache.eval.cli.progress import bar, loading
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS, REPOSITORY, atomic_files, check_writable
from h2cache.eval.generation.prompt_lines import prompt_lines
from h2cache.eval.models.pipelines import ModelConfig, load_pipeline
from h2cache.plans import Calibration
from h2cache.plans.calibrate import BUDGETS, PARTS, REFERENCES, computed_steps, evaluations_of_a_plan

OTHERS = (("budcache", budcache), ("l2p", l2p), ("dpcache", dpcache), ("bespoke", bespoke))  # of other papers
SEARCH = ("reference", "seed", "history", "ridge", "tries", "few", "rounds", "batch_size")


@dataclass(frozen=True)
class Settings:
    """The fields of configs/calibrate.yaml. `search` are arguments of `h2cache.plans.Calibration`."""

    name: str
    kind: str
    model: ModelConfig
    budgets: tuple[float, ...]
    steps: int
    quality: h2cache.AtLeast | None
    images: int
    prompts_file: Path | None
    folder: Path
    overwrite: bool
    search: dict[str, Any]

    def __post_init__(self) -> None:
        numbers = {"images": 1, "steps": 1}
        for name, least in numbers.items() | {"tries": 0, "rounds": 0, "few": 1, "history": 1, "batch_size": 1}.items():
            value = getattr(self, name) if name in numbers else self.search[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name}={value} is not allowed: it must be a whole number from {least}")
        sound = [isinstance(b, int | float) and not isinstance(b, bool) and 1 <= b <= self.steps for b in self.budgets]
        if not self.budgets or not all(sound):
            raise UserError(
                f"budget={list(self.budgets)} is not allowed: it must be a number from 1 to the {self.steps} steps, or "
                "several"
            )
        if self.kind != "plan" and (self.kind not in dict(OTHERS) or self.quality):
            choices = ", ".join(["plan", *dict(OTHERS)])
            raise UserError(f"kind={self.kind} is not allowed: it must be one of {choices}, with psnr= plan")
        if self.search["reference"] not in REFERENCES:
            choices = " or ".join(REFERENCES)
            raise UserError(f"reference={self.search['reference']} is not allowed: it must be {choices}")
        if self.quality and self.images < 2 * self.quality.prompts_needed:
            raise UserError(
                f"images={self.images} is not allowed: fraction={self.quality.fraction:g} with "
                f"confidence={self.quality.confidence:g} takes {2 * self.quality.prompts_needed} or more"
            )
        there = [target for target in self.targets if target.exists()]
        if there and not self.overwrite:
            raise UserError(f"{there[0]} is there already: overwrite=true replaces it, out=FOLDER writes elsewhere")

    @property
    def targets(self) -> list[Path]:
        """The plans' files."""
        wanted = [f"{self.quality.psnr:g}dB"] if self.quality else [f"{budget:g}" for budget in self.budgets]
        ending = "" if self.search["reference"] == "uncached" else f"-{self.search['reference']}"
        if self.kind != "plan":
            ending += f"-{self.kind}"
        if self.steps != self.model.num_inference_steps:
            ending = f"-{self.steps}steps{ending}"
        return [self.folder / f"{self.name}-{each}{ending}.json" for each in wanted]


Prompts = Callable[[Path | None, int, int, str], list[str]]  # of a file, so many, with a seed, for a model


def of_file(file: Path | None, images: int, seed: int, model: str) -> list[str]:
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
        print(
            f"{program}: interrupted; plans that were finished stay, and the same command with the other budgets makes "
            "the rest",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:  # raised by Hydra
        commandline.fail(commandline.explain(error, program, "put several budgets in brackets, as [3,4]"), program)


def _settings(cfg: DictConfig, name: str) -> Settings:
    try:
        model = instantiate(cfg.model, _convert_="all")
        asked = None if cfg.psnr is None else h2cache.AtLeast(cfg.psnr, cfg.fraction, cfg.confidence)
    except InstantiationException as error:
        raise UserError(f"model={name}: {error.__cause__ or error}") from error
    except ValueError as error:
        raise UserError(f"psnr={cfg.psnr}: {error}") from error
    return Settings(
        name=name,
        kind=cfg.kind,
        model=model,
        budgets=tuple(cfg.budget) if isinstance(cfg.budget, ListConfig) else (cfg.budget,),
        steps=model.num_inference_steps if cfg.steps is None else cfg.steps,
        quality=asked,
        images=cfg.images,
        prompts_file=Path(cfg.prompts_file).expanduser() if cfg.prompts_file else None,
        folder=Path(cfg.out).expanduser() if cfg.out else REPOSITORY / "assets/plans",
        overwrite=cfg.overwrite,
        search={key: cfg[key] for key in SEARCH},
    )


def run(settings: Settings, prompts_of: Prompts) -> list[str]:
    """Calibrate for each budget, write the plans, and say what they reached."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    check_writable(settings.targets)
    prompts = prompts_of(settings.prompts_file, settings.images, settings.search["seed"], settings.name)
    messages = Console(stderr=True)
    with loading(messages, settings.model.title) as on_bytes:
        pipe = load_pipeline(settings.model, on_bytes)
    call = dict(settings.model.call_arguments) | {"num_inference_steps": settings.steps}
    batch_size, per_step, seconds = _fitting_batch(pipe, prompts, settings.search["batch_size"], call)
    settings.search["batch_size"] = batch_size
    evaluations = round(expected_evaluations(settings) * per_step)
    print(
        f"about {evaluations:,} evaluations of the model on one image, at {seconds:.3g} s each: "
        f"{evaluations * seconds:.0f} s",
        flush=True,
    )
    del call["num_inference_steps"]
    try:
        with _watched(pipe, evaluations, messages) as show:
            plans = _plans(pipe, prompts, settings, call, show)
            return [_written(plan, target) for plan, target in zip(plans, settings.targets, strict=True)]
    except ValueError as error:
        raise UserError(str(error)) from error


def _plans(
    pipe: Any,
    prompts: Sequence[str],
    settings: Settings,
    call: dict[str, Any],
    show: Callable[[int, int, float], None],
) -> Iterator[h2cache.Plan]:
    if settings.quality:
        search = {"steps": settings.steps, "quality": settings.quality, **settings.search}
        yield h2cache.calibrate(pipe, prompts, on_progress=show, **search, **call)
        return
    calibration = Calibration(pipe, prompts, settings.steps, **settings.search, **call)
    for budget in settings.budgets:
        if settings.kind != "plan":
            yield dict(OTHERS)[settings.kind](calibration, computed_steps(budget, settings.steps))
        else:
            yield calibration.plan(budget, show)


def _written(plan: h2cache.Plan, target: Path) -> str:
    with atomic_files([target]) as (file,):
        plan.save(file)
    notes = plan.notes
    reached = f"{notes['psnr']} dB on {notes['prompts']} prompts of the calibration; " if "psnr" in notes else ""
    steps = ", ".join(map(str, plan.computed))
    promise = f"; {plan.promise}" if plan.promise else ""
    return f"{target}: {len(plan.computed)} of {plan.steps} steps computed; {reached}steps {steps}{promise}"


def expected_evaluations(settings: Settings) -> int:
    """At most so many calls of the model on one image, recording included; with a promise, if every budget is tried."""
    steps, images = settings.steps, settings.images
    budgets = [each for each in BUDGETS if each <= steps] if settings.quality else settings.budgets
    search = {name: settings.search[name] for name in ("tries", "few", "rounds", "batch_size")}
    plans = sum(evaluations_of_a_plan(computed_steps(budget, steps), images, **search) for budget in budgets)
    return images * steps * (PARTS if settings.search["reference"] == "converged" else 1) + plans


def _fitting_batch(
    pipe: Any, prompts: Sequence[str], batch_size: int, call: dict[str, Any]
) -> tuple[int, float, float]:
    """The largest batch, halved from `batch_size`, that the memory holds; evaluations of the model on one image that a
    step takes, more than one with guidance; and the seconds of one.
    """
    times: list[float] = []
    rows: list[int] = []

    def note(module: Any, args: Any, output: Any = None) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        rows.extend([] if output is None else [len(output[0])])

    hooks = [pipe.transformer.register_forward_pre_hook(note), pipe.transformer.register_forward_hook(note)]
    try:
        while True:
            part = list(prompts[:batch_size])
            try:
                rows.clear()
                pipe(part, output_type="latent", **(call | {"num_inference_steps": 2}))
                return batch_size, sum(rows) / 2 / len(part), (times[-1] - times[-2]) / rows[-1]
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise UserError("the memory of this device does not hold one image") from None
                batch_size //= 2
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _watched(pipe: Any, evaluations: int, messages: Console) -> Iterator[Callable[[int, int, float], None]]:
    """A bar of the model's evaluations on one image, `evaluations` at most; yields a calibration's `on_progress`."""
    done = 0
    with bar(messages, "evaluations, at most") as show:

        def called(module: Any, args: Any, output: Any) -> None:
            nonlocal done
            done += len(output[0])
            show(min(done, evaluations), evaluations)

        hook = pipe.transformer.register_forward_hook(called)
        try:
            yield lambda tried, of, best: show(done, evaluations, title=f"evaluations, at most; best {best:.2f} dB")
        finally:
            hook.remove()
