"""`h2cache tune`: the setting of a method that reaches a quality or a speed on some prompts."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

import h2cache
from h2cache import CacheConfig, Trial
from h2cache.eval.cli import arguments as commandline
from h2cache.eval.cli.progress import bar, loading
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS
from h2cache.eval.generation.prompt_lines import prompt_lines
from h2cache.eval.models.pipelines import load_pipeline, takes
from h2cache.tuning.knobs import knobs_of

PROGRAM = "h2cache tune"
TARGETS = {"psnr": h2cache.Psnr, "speedup": h2cache.Speedup, "wall-speedup": h2cache.WallSpeedup}
# Drawn where the user gives no prompts; no prompt set of the experiments has them.
PROMPTS = (
    'A yellow sign with the word "ROAD" in thick black letters in front of a grey wall',
    "A red fox asleep on a mossy stone in a sunlit forest, photograph",
)


def main(overrides: Sequence[str], target: tuple[str, float], prompts: Path | None, trials: int, seed: int) -> None:
    """Tune and print each setting that is measured, then the answer. Exit code 2 for what the user can put right.

    Args:
        overrides: for configs/run.yaml.
        target: one of TARGETS, and its value.
        prompts: a file, one a line; None: PROMPTS.
        trials: settings in each search, at most.
        seed: of the first prompt's noise; the next one's is one more.
    """
    commandline.prepare()
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("run", overrides=list(overrides))
    except Exception as error:  # raised by Hydra
        commandline.fail(commandline.explain(error, PROGRAM, "give one value"), PROGRAM)
    try:
        _tune(cfg, target, prompt_lines(prompts) if prompts else PROMPTS, trials, seed)
    except UserError as error:
        commandline.fail(str(error), PROGRAM)
    except KeyboardInterrupt:
        print(
            f"{PROGRAM}: interrupted; each setting above can be used, as method.FIELD=VALUE, and the same command "
            "begins anew",
            file=sys.stderr,
        )
        sys.exit(130)


def _tune(cfg: DictConfig, target: tuple[str, float], prompts: Sequence[str], trials: int, seed: int) -> None:
    console, messages = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)
    name, value = target
    try:
        goal = TARGETS[name](value)
        model, method = (instantiate(cfg[group], _convert_="all") for group in ("model", "method"))
    except (ValueError, InstantiationException) as error:
        raise UserError(str(error.__cause__ or error).split("\n")[0]) from error
    if method is None:
        raise UserError("--method none has nothing to tune: choose another, such as balanced")
    with loading(messages, model.title) as on_bytes:
        pipe = load_pipeline(model, on_bytes)
    settings = (trials + 1) * len(knobs_of(method))  # at most, after two runs to warm up
    uncached = settings if isinstance(goal, h2cache.WallSpeedup) else 1
    steps = (2 + (settings + uncached) * len(prompts)) * model.num_inference_steps
    with bar(messages, f"steps on {len(prompts)} prompts, at most") as show:
        done = count(1)

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            show(next(done), steps)
            return tensors

        watched = {"callback_on_step_end": after_step} if takes(pipe, "callback_on_step_end") else {}
        told = partial(_tell, console, method)
        call = {**model.call_arguments, **watched}
        try:
            tuned = h2cache.tune(pipe, prompts, method, goal, seed=seed, trials=trials, on_trial=told, **call)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
    fields = " ".join(f"method.{field}={_text(value)}" for field, value in _changed(tuned.config, method).items())
    console.print(f"\nbest: {_line(tuned.best, method)}\nuse it with: {fields or 'the method as it is'}")


def _tell(console: Console, method: CacheConfig, trial: Trial) -> None:
    console.print(_line(trial, method))


def _line(trial: Trial, method: CacheConfig) -> str:
    fields = ", ".join(f"{field} = {_text(value)}" for field, value in _changed(trial.config, method).items())
    return (
        f"{fields or 'as it is'}: {trial.psnr:.2f} dB, {trial.speedup:.2f} times fewer blocks, "
        f"{trial.wall_speedup:.2f} times the speed"
    )


def _text(value: Any) -> str:
    """A number without the last digits of its binary form: 0.3, not 0.30000000000000004."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _changed(config: CacheConfig, method: CacheConfig) -> Mapping[str, Any]:
    """The fields in which a setting differs from the method that it was made from."""
    before = asdict(method)
    return {field: value for field, value in asdict(config).items() if value != before[field]}
