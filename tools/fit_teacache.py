"""Fits a model's TeaCache polynomial from uncached runs: `python -m tools.fit_teacache model=flux-mini`.

TeaCache (arXiv 2411.19108) guesses how much the work of the blocks changes from one step to the next by a polynomial of
how much their input does. Two neighbouring steps give one point of it, both relative L1 changes in float32:

    x  of the image tokens as the timestep modulates them before the first block (`Adapter.modulated`)
    y  of the residual that all blocks add to the image tokens: output of the last block minus input of the first one

x is what TeaCache probes and y is what it reuses. The paper speaks of the model's output; the authors cache the
residual because that is alike from step to step (their answer in issue 19 of ali-vilab/TeaCache). As they do (issue 2)
we fit to all pairs, even the last of a run, which TeaCache never asks about. They took degree 4; here it is the lowest
whose error on prompts left out of the fit cannot be told from the least.

It works for each pipeline that takes a prompt and whose transformer has an adapter. Guidance gives points of both
branches, whether they are two calls a step or one doubled batch: TeaCache decides about each of them with the same
polynomial. The transformers of a pipeline with two are fitted each for itself.

The result is the model's file in configs/teacache: the polynomial, a threshold for it, and in comments how both were
found. A second transformer has a file of its own, `<model>-transformer_2.yaml`. TeaCache extrapolates to changes beyond
those seen; the comments say how far the polynomial stays positive.
"""

import math
import platform
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from diffusers import DiffusionPipeline
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from numpy.polynomial import Polynomial
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

import h2cache
from h2cache.adapters import transformers_of
from h2cache.baselines import TeaCacheConfig
from h2cache.eval.errors import UserError
from h2cache.eval.files import CONFIGS, atomic_files, check_writable
from h2cache.eval.models.pipelines import ModelConfig, describe_machine, load_pipeline, takes
from h2cache.policy.pfs import deviation, relative_l1
from h2cache.runtime.interception import interception_of
from tools.calibration_prompts import calibration_prompts

SPEEDUPS = (1.5, 2.0, 3.0)  # how many times fewer steps are computed at the thresholds that are proposed
DEFAULT_SPEEDUP = 2.0
THRESHOLDS = tuple(digits * 10.0**power for power in range(-5, 1) for digits in range(10, 100))  # two digits each
UNCACHED = TeaCacheConfig(threshold=-1.0, coefficients=(1.0, 0.0))  # skips nothing, and its trace has each step's x

Branch = tuple[int, str, int]  # number of the run, branch of guidance, sample of the batch
Changes = Mapping[Branch, list[tuple[float, float]]]  # (x, y) of each step but the first


@dataclass(frozen=True)
class Settings:
    """The fields of configs/fit_teacache.yaml, checked."""

    model: ModelConfig
    images: int
    prompts_file: Path | None
    max_degree: int
    seed: int
    out: Path

    def __post_init__(self) -> None:
        for field, least in (("images", 2), ("max_degree", 1), ("seed", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{field}={value} is not allowed: it must be a whole number from {least}")
        steps = self.model.num_inference_steps
        if steps < 3:
            raise UserError(f"model.num_inference_steps={steps} is not allowed: with less than 3 nothing is decided")
        if (self.images - 1) * (steps - 1) <= self.max_degree:
            raise UserError(f"max_degree={self.max_degree} is too high for {self.images} images of {steps} steps")


@dataclass(frozen=True)
class Fit:
    """A polynomial, highest power first, and the held-out error (root mean square) of degree 1, 2, ..."""

    coefficients: tuple[float, ...]
    errors: tuple[float, ...]


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="fit_teacache")
def main(cfg: DictConfig) -> None:
    composed = HydraConfig.get()
    name = composed.runtime.choices["model"]
    others = [override for override in composed.overrides.task if not override.startswith("model=")]
    command = shlex.join(["python", "-m", "tools.fit_teacache", f"model={name}", *others])
    try:
        print(run(_settings(cfg, name), name, command), end="")
    except UserError as error:
        sys.exit(f"fit_teacache: error: {error}")


def _settings(cfg: DictConfig, name: str) -> Settings:
    prompts_file, out = (Path(path).expanduser() if path else None for path in (cfg.prompts_file, cfg.out))
    try:
        model = instantiate(cfg.model, _convert_="all")
    except InstantiationException as error:
        raise UserError(f"model={name}: {error.__cause__ or error}") from error
    return Settings(model, cfg.images, prompts_file, cfg.max_degree, cfg.seed, out or CONFIGS / f"teacache/{name}.yaml")


def run(settings: Settings, name: str, command: str) -> str:
    """Draw, fit and write `settings.out`, and a file beside it for a second transformer; returns what was written."""
    check_writable([settings.out])
    prompts = calibration_prompts(settings.prompts_file, settings.images, settings.seed, name)
    pipe = load_pipeline(settings.model)
    names, outs = transformer_names(pipe, name, settings.out)
    check_writable(outs)
    source = settings.prompts_file.name if settings.prompts_file else f"captions, seed {settings.seed}"
    machine = describe_machine(settings.model)
    texts = []
    for part, (x, y) in zip(names, calibrate(pipe, prompts, settings.seed, settings.model.call_arguments), strict=True):
        branches = f"{x.shape[1]} branches of guidance, " if x.shape[1] > 1 else ""
        made = f"{len(prompts)} prompts ({source}), {x.shape[2] + 1} steps each, {branches}{machine}"
        texts.append(render(part, command, made, x, y, fit_polynomial(x, y, settings.max_degree)))
    with atomic_files(outs) as files:
        for file, text in zip(files, texts, strict=True):
            file.write_text(text, encoding="utf-8")
    return "".join(texts)


def transformer_names(pipe: DiffusionPipeline, name: str, out: Path) -> tuple[list[str], list[Path]]:
    """What the transformers of the model `name` are called, and the file of each. UserError where TeaCache cannot
    watch them."""
    try:
        h2cache.apply(pipe, UNCACHED).remove()
    except (TypeError, ValueError) as error:
        raise UserError(f"model={name}: {error}") from error
    if not takes(pipe, "prompt"):
        raise UserError(f"model={name}: a {type(pipe).__name__} takes no prompt, and this calibrates with prompts")
    others = [f"transformer_{number}" for number in range(2, len(transformers_of(pipe)) + 1)]
    files = [out.with_name(f"{out.stem}-{other}{out.suffix}") for other in others]
    return [name, *(f"{name}, {other}" for other in others)], [out, *files]


def calibrate(
    pipe: DiffusionPipeline, prompts: Sequence[str], seed: int, call_arguments: dict[str, Any]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each transformer x and y, both (prompts, branches, steps - 1), of one uncached image a prompt; image i has the
    noise of seed + i. Arguments that the pipeline does not take are left out."""
    given = {name: value for name, value in call_arguments.items() if takes(pipe, name)}
    recordings = []
    for i, prompt in enumerate(track(prompts, "drawing", console=Console(stderr=True), transient=True)):
        with ExitStack() as stack:
            recording = [stack.enter_context(recorded(transformer)) for transformer in transformers_of(pipe)]
            noise = torch.Generator("cpu").manual_seed(seed + i)
            pipe(prompt=prompt, generator=noise, output_type="latent", **given)
        recordings.append(recording)
    return [stacked(of_transformer) for of_transformer in zip(*recordings, strict=True)]


def stacked(recordings: Sequence[Changes]) -> tuple[np.ndarray, np.ndarray]:
    """x and y, both (prompts, branches, steps - 1). UserError where the prompts or the branches differ in steps."""
    steps = [[len(changes) + 1 for changes in recording.values() if changes] for recording in recordings]
    if len({tuple(sorted(branches)) for branches in steps}) != 1 or len(set(steps[0])) != 1:
        seen = ", ".join(map(str, sorted({count for branches in steps for count in branches}))) or "less than 2"
        raise UserError(
            f"a transformer was called for {seen} steps: a fit needs the same number of steps, from 2, in every prompt "
            "and in both branches of guidance; try another model.num_inference_steps"
        )
    x, y = np.moveaxis(np.array([[pairs for pairs in recording.values() if pairs] for recording in recordings]), -1, 0)
    return x, y


@contextmanager
def recorded(transformer: torch.nn.Module) -> Iterator[Changes]:
    """Yields the (x, y) of every run inside of the context, by run, branch of guidance and sample.

    Each call of the transformer after the first of its branch appends one for each sample. The engine says x, and which
    calls belong together; hooks on the first and the last block see y.
    """
    with h2cache.apply(transformer, UNCACHED) as handle, ExitStack() as hooks:
        recorder = Recorder(transformer, handle.trace)
        (first, *_), (*_, last) = recorder.blocks, recorder.blocks
        for hook in (
            transformer.register_forward_pre_hook(recorder.before_model, with_kwargs=True),
            first.register_forward_pre_hook(recorder.before_blocks, with_kwargs=True),
            last.register_forward_hook(recorder.after_blocks),
        ):
            hooks.callback(hook.remove)
        yield recorder.changes


class Recorder:
    """What hooks on a transformer that an engine watches note of its runs."""

    def __init__(self, transformer: torch.nn.Module, trace: h2cache.Trace):
        self.changes: dict[Branch, list[tuple[float, float]]] = {}
        self._trace = trace
        self._adapter = interception_of(transformer).owner.adapter
        listed = [(role, block) for role, blocks in self._adapter.blocks(transformer).items() for block in blocks]
        self.blocks = [block for _, block in listed]
        self._first, self._last = (self._adapter.block_call(*listed[index]) for index in (0, -1))
        self._residuals: dict[Branch, torch.Tensor] = {}  # of the last step, (1, N, D) float32
        self._steps: Counter[Branch] = Counter()

    def before_model(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._text_tokens = self._adapter.model_call(transformer, args, kwargs).text_tokens

    def before_blocks(self, block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        streams = self._first.read(self._first.bind(args, kwargs), self._text_tokens)
        self._entered = streams[0].to(torch.float32, copy=True)

    def after_blocks(self, block: torch.nn.Module, args: tuple, output: Any) -> None:
        residuals = self._last.parse(output, self._text_tokens)[0].float() - self._entered
        rows = [row for row in self._trace if row.step == self._steps[row.run, row.context, row.sample]]
        for row, residual in zip(rows, residuals.split(1), strict=True):
            branch = row.run, row.context, row.sample
            changes = self.changes.setdefault(branch, [])
            if row.step:
                x = math.nan if row.diff is None else row.diff
                changes.append((x, relative_l1([deviation(self._residuals[branch], residual).tolist()])))
            self._residuals[branch] = residual
            self._steps[branch] += 1


def fit_polynomial(x: np.ndarray, y: np.ndarray, max_degree: int) -> Fit:
    """The least-squares polynomial through all pairs, x and y (prompts, ..., steps - 1), of the degree that held-out
    error chooses: the lowest whose mean square is above the least by no more than the standard error of the difference.

    A whole prompt is held out at a time; steps of one run are too alike to stand in for a new run. UserError if a
    change is not finite, or if they are too few for `max_degree`.
    """
    for name, changes in (("input", x), ("residual", y)):
        for prompt, *branch, step in np.argwhere(~np.isfinite(changes)):
            raise UserError(
                f"prompt {prompt}, steps {step} to {step + 1}: the change of the {name} is "
                f"{changes[prompt, *branch, step]} and cannot be fitted; look at that image, or try model.dtype=float32"
            )
    if (found := len(np.unique(x))) <= max_degree + 1:
        raise UserError(f"max_degree={max_degree} is too high for {found} different changes of the input")
    squares = np.array([held_out_squares(x, y, degree) for degree in range(1, max_degree + 1)])
    excess = squares - squares[squares.mean(axis=1).argmin()]
    close = excess.mean(axis=1) <= excess.std(axis=1, ddof=1) / np.sqrt(len(x))
    return Fit(least_squares(x, y, 1 + int(close.argmax())), tuple(np.sqrt(squares.mean(axis=1)).tolist()))


def held_out_squares(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """For each prompt the mean square of what a fit to the other prompts gets wrong, shape (prompts,)."""
    errors = []
    for i in range(len(x)):
        coefficients = least_squares(np.delete(x, i, axis=0), np.delete(y, i, axis=0), degree)
        errors.append(np.polyval(coefficients, x[i]) - y[i])
    return np.square(errors).reshape(len(x), -1).mean(axis=1)


def least_squares(x: np.ndarray, y: np.ndarray, degree: int) -> tuple[float, ...]:
    """Coefficients, highest power first, rounded to the nine digits that are written."""
    powers = Polynomial.fit(x.ravel(), y.ravel(), degree).convert().coef  # from the well-conditioned domain [-1, 1]
    return tuple(float(f"{c:.8e}") for c in np.pad(powers, (0, degree + 1 - len(powers)))[::-1])


def computed_steps(rescaled: Sequence[float], threshold: float) -> int:
    """How many steps TeaCache computes of a run whose rescaled changes p(x), from each step to the next, are given.

    The first step and the last always; between them, those that bring the sum since the last computed one to
    `threshold`.
    """
    computed, total = 2, 0.0
    for change in rescaled[:-1]:  # the last is into the last step, which is not decided about
        total += change
        if total >= threshold:
            computed, total = computed + 1, 0.0
    return computed


def choose_thresholds(x: np.ndarray, coefficients: Sequence[float]) -> dict[float, tuple[float, float]]:
    """For each of SPEEDUPS the threshold of two digits that comes nearest, and how many times fewer steps it computes.

    Simulated on uncached runs, x (..., steps - 1); a cached run's own changes differ a little.
    """
    rescaled = np.polyval(coefficients, x).reshape(-1, x.shape[-1]).tolist()
    steps = x.size + len(rescaled)
    reached = {t: steps / sum(computed_steps(run, t) for run in rescaled) for t in THRESHOLDS}
    chosen = {wanted: min(THRESHOLDS, key=lambda t: abs(np.log(reached[t] / wanted))) for wanted in SPEEDUPS}
    return {wanted: (threshold, reached[threshold]) for wanted, threshold in chosen.items()}


def render(name: str, command: str, made: str, x: np.ndarray, y: np.ndarray, fit: Fit) -> str:
    """The model's file in configs/teacache."""
    thresholds = choose_thresholds(x, fit.coefficients)
    reached = [f"{speedup:.2f}x fewer at threshold {t:.2g}" for t, speedup in thresholds.values()]
    errors = [f"{d}: {error:.4f} ({1 - error**2 / y.var():.3f})" for d, error in enumerate(fit.errors, start=1)]
    low, high, end = positive_range(x, fit.coefficients)
    libraries = ", ".join(f"{library} {version(library)}" for library in ("torch", "diffusers"))
    paragraphs = (
        f"The TeaCache polynomial of {name}, highest power first, with a threshold for it. Written by",
        f"    {command}",
        f"from {x.size} pairs of neighbouring steps: {made}, {libraries}, Python {platform.python_version()}.",
        f"Changes seen: of the modulated input {x.min():.4f} to {x.max():.4f}, of the residual {y.min():.4f} to "
        f"{y.max():.4f}. TeaCache extrapolates: from 0 to {end:.4f} the polynomial is positive between {low:.4f} and "
        f"{high:.4f}, and a change that it makes negative counts against computing.",
        f"Held-out error, root mean square (and share of the variance explained), by degree: {', '.join(errors)}.",
        f"Steps computed, simulated on the same runs: {', '.join(reached)}.",
    )
    comment = "\n".join(textwrap.fill(p, 120, initial_indent="# ", subsequent_indent="# ") for p in paragraphs)
    coefficients = "".join(f"  - {c:.8e}\n" for c in fit.coefficients)
    return f"{comment}\nthreshold: {thresholds[DEFAULT_SPEEDUP][0]:.2g}\ncoefficients:\n{coefficients}"


def positive_range(x: np.ndarray, coefficients: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, end): around the median of x the polynomial is positive from low to high, as far as 0 and end, which
    is twice the largest x."""
    end, middle = 2 * float(x.max()), float(np.median(x))
    grid = np.linspace(0, end, 2001)
    negative = grid[np.polyval(coefficients, grid) <= 0]
    return max(negative[negative < middle], default=0.0), min(negative[negative >= middle], default=end), end


if __name__ == "__main__":
    main()
