"""`calibrate`: from prompts and a budget, or a promised quality, to a plan."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from .closed_form import even_steps
from .path_cost import PathCosts
from .plan import Plan
from .polish import evaluations, polish
from .promise import AtLeast, Promise, certified, promisable
from .search import Steps, climb
from .simulate import Simulation
from .trajectories import Trajectories, record

REFERENCES = ("uncached", "converged")
PARTS = 2  # that each step is divided into, for the converged reference
BUDGETS = (2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)  # that a promise is looked for with

OnProgress = Callable[[int, int, float], None]


class Calibration:
    """Runs of a pipeline that were recorded once, and from which a plan for any budget is made.

    A plan costs at most `evaluations(budget)` calls of the model on one image beyond the recording, which costs
    `recording`. The pipeline is left as it was.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        steps: int = 50,
        *,
        reference: str = "uncached",
        seed: int = 0,
        history: int = 5,
        ridge: float = 1e-4,
        tries: int = 30,
        few: int = 8,
        rounds: int = 12,
        batch_size: int = 8,
        **call_arguments: Any,
    ):
        """Record the pipeline on the prompts; see `calibrate`."""
        _check(0, tries=tries, rounds=rounds)
        _check(1, prompts=len(prompts), steps=steps, history=history, few=few, batch_size=batch_size)
        if reference not in REFERENCES:
            raise ValueError(f"h2cache.calibrate got reference = {reference!r}: must be one of {', '.join(REFERENCES)}")
        self.history, self.ridge, self.reference, self.seed = history, ridge, reference, seed
        self.tries, self.few, self.rounds, self.batch_size = (
            tries,
            min(few, len(prompts), batch_size),
            rounds,
            batch_size,
        )
        parts = PARTS if reference == "converged" else 1
        self.runs = record(pipe, prompts, steps, seed, batch_size, parts=parts, **call_arguments)
        self.recording = len(prompts) * steps * parts

    def evaluations(self, budget: float) -> int:
        """What a plan costs at most, in calls of the model on one image."""
        search = {name: getattr(self, name) for name in ("tries", "few", "rounds", "batch_size")}
        return evaluations_of_a_plan(computed_steps(budget, self.runs.steps), sum(self.runs.sizes), **search)

    @property
    def noted(self) -> dict[str, Any]:
        """What the notes of its plans say about it."""
        return {"reference": self.reference, "prompts": sum(self.runs.sizes), "seed": self.seed}

    @cached_property
    def costs(self) -> PathCosts:
        """Of the schedules, over all prompts, each of which has the same weight."""
        grams = self.runs.grams
        gram = (grams / grams[:, -1:, -1:].clamp_min(torch.finfo(torch.float64).tiny)).mean(0)
        return PathCosts(gram.numpy(), self.runs.sigmas, self.ridge)

    def plan(self, budget: float, on_progress: OnProgress = lambda done, total, best: None) -> Plan:
        """The plan that computes at most one step in `budget`; see `calibrate`."""
        count, steps = computed_steps(budget, self.runs.steps), self.runs.steps
        start = self.costs.cheapest(count).get(count) or even_steps(steps, count)
        quick = Simulation(self.runs.first(self.few), self.history, self.ridge)
        tried: list[float] = []

        def score(computed: Steps) -> float:
            tried.append(quick.score(computed))
            on_progress(len(tried), 1 + self.tries, max(tried))
            return tried[-1]

        schedule = climb(start, steps, score, self.costs.of, self.tries)
        whole = Simulation(self.runs, self.history, self.ridge)
        weights = polish(self.runs, schedule, whole.run(schedule).weights, self.history, self.rounds)
        plan = Plan(self.runs.conditions, schedule, weights, {"budget": budget, **self.noted})
        reached = self.runs.decibels(whole.follow(plan).latents).mean().item()
        return replace(plan, notes={**plan.notes, "psnr": round(reached, 2)})

    @torch.no_grad()
    def images(self, plan: Plan, runs: Trajectories) -> torch.Tensor:
        """What `plan` draws on recorded prompts."""
        return runs.decode(Simulation(runs, self.history, self.ridge).follow(plan).latents)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    budget: float | None = None,
    steps: int = 50,
    *,
    quality: AtLeast | None = None,
    on_progress: OnProgress = lambda done, total, best: None,
    **settings: Any,
) -> Plan:
    """The plan that computes at most one step in `budget` and keeps the images nearest to the reference's.

    For several budgets, record once: `h2cache.plans.Calibration(pipe, prompts, steps, ...).plan(budget)`.

    Args:
        prompts: to calibrate on; do not measure on them afterwards. Where a quality is asked for, every other one is
            held back, to certify on.
        budget: how many times fewer steps; None where `quality` is given.
        steps: of a run.
        quality: the fastest plan is returned for which the held-back prompts certify it, of budgets from 2 to 8.
        on_progress: called with the number of schedules tried, of how many, and the best PSNR in dB yet.
        settings: the following, and all others the pipeline's arguments, height and width among them.

            reference: what images are to be near to: "uncached" (default), those of a run of `steps` steps, or
            "converged", which all solvers approach: a run of twice as many with a better solver.
            seed: prompt i has the noise of seed + i.
            history, ridge: outputs that the weights are for, and what keeps them small.
            tries, few: how many schedules next to the cheapest are tried, and on how many prompts, at most one batch.
            rounds: of the weights' polish, each on one batch; the last batch says when it was best. 0: none, for models
            that have no gradient.
            batch_size: prompts in one call of the model.

    Raises:
        ValueError: where something is out of range, the pipeline cannot be calibrated, or no plan can promise the
            quality; it says what the slowest can.
    """
    if quality is not None and budget is None:
        return _promising(pipe, list(prompts), steps, quality, on_progress, settings)
    if quality is not None or budget is None:
        raise ValueError("h2cache.calibrate needs budget= or quality=, one of them")
    computed_steps(budget, steps)
    return Calibration(pipe, prompts, steps, **settings).plan(budget, on_progress)


def _promising(
    pipe: Any, prompts: list[str], steps: int, quality: AtLeast, on_progress: OnProgress, settings: dict[str, Any]
) -> Plan:
    """The fastest plan that is certified, with its promise."""
    own, held = prompts[::2], prompts[1::2]
    if len(held) < quality.prompts_needed:
        raise ValueError(
            f"h2cache.calibrate got {len(prompts)} prompts: to promise {quality.fraction:.0%} with "
            f"{quality.confidence:.0%} confidence takes {2 * quality.prompts_needed} or more, half of them held back"
        )
    calibration = Calibration(pipe, own, steps, **settings)
    fresh = {**settings, "seed": settings.get("seed", 0) + len(own), "tries": 0, "rounds": 0}
    reference = Calibration(pipe, held, steps, **fresh).runs
    plans: list[Plan] = []
    scores: list[list[float]] = []
    for budget in (each for each in BUDGETS if each <= steps):
        plan = calibration.plan(budget, on_progress)
        images = calibration.images(plan, reference)
        plans, scores = [*plans, plan], [*scores, quality.scores(images, reference.images)]
        if certified(quality, scores) != len(plans) - 1:
            break
    index = certified(quality, scores)
    if index is None:
        best = promisable(scores[0], quality.fraction, quality.confidence)
        raise ValueError(
            f"no plan can promise a {quality.name} of {quality.level:g}: the slowest, {len(plans[0].computed)} of "
            f"{steps} steps, can promise {best:.4g} on {quality.fraction:.0%} of the images with "
            f"{quality.confidence:.0%} confidence"
        )
    below = sum(not score >= quality.level for score in scores[index])
    promise = Promise(
        quality.name, quality.level, quality.fraction, quality.confidence, calibration.reference, len(held), below
    )
    return plans[index].promising(promise)


def computed_steps(budget: float, steps: int) -> int:
    """How many of `steps` steps a budget leaves. ValueError where it is out of range."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 1 <= budget <= steps:
        raise ValueError(f"h2cache.calibrate got budget = {budget!r}: must be a number from 1 to the {steps} steps")
    return int(steps / budget + 1e-9)


def evaluations_of_a_plan(computed: int, prompts: int, *, tries: int, few: int, rounds: int, batch_size: int) -> int:
    """What a plan costs at most beyond the recording, in calls of the model on one image."""
    sizes = [min(batch_size, prompts - start) for start in range(0, prompts, batch_size)]
    tried = computed * min(few, sizes[0]) * (1 + tries)
    return tried + 2 * computed * prompts + evaluations(computed, sizes, rounds)


def _check(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"h2cache.calibrate got {name} = {value!r}: must be an integer >= {least}")
