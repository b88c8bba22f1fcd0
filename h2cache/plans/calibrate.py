"""`calibrate`: from prompts and a budget to a plan."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import Plan
from .search import Search, Steps
from .simulate import Simulation
from .trajectories import record

REFERENCES = ("uncached", "converged")
PARTS = 8  # of each step, in runs to the converged solution
FIT = "least distances"  # what scores in a checkpoint depend on beside what is asked


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    budget: float,
    steps: int,
    *,
    reference: str = "uncached",
    seed: int = 0,
    history: int = 3,
    ridge: float = 1e-4,
    annealing: int = 100,
    climbing: int = 40,
    annealing_prompts: int = 8,
    batch_size: int = 8,
    checkpoint: str | Path | None = None,
    on_progress: Callable[[int, int, float], None] = lambda done, total, best: None,
    **call_arguments: Any,
) -> Plan:
    """The plan that computes at most one step in `budget` and keeps the images nearest to the uncached ones.

    Args:
        prompts: to calibrate on; do not measure on them afterwards.
        steps: of a run. `call_arguments` are the pipeline's others, height and width among them.
        reference: what images are to be near to: "uncached", those of a run of `steps` steps, or "converged", those of
            eight times as many, which all solvers approach.
        seed: of the search; prompt i has the noise of seed + i.
        history, ridge: of the forecasts' weights.
        annealing, climbing: how many schedules are tried, at most, after up to 24 smooth ones to begin with; these and
            annealing on the first `annealing_prompts` only, as many as one call takes.
        batch_size: prompts in one call of the model.
        checkpoint: a file that keeps what was tried. A calibration that was killed goes on from there when it is asked
            the same again, and ends with the same plan.
        on_progress: called with the number of schedules tried, of how many, and the best PSNR in dB yet.

    ValueError where something is out of range or the pipeline cannot be calibrated. The pipeline is left as it was.
    """
    count = _count(budget, steps)
    _check(0, annealing=annealing, climbing=climbing)
    _check(1, prompts=len(prompts), history=history, annealing_prompts=annealing_prompts, batch_size=batch_size)
    if reference not in REFERENCES:
        raise ValueError(f"h2cache.calibrate got reference = {reference!r}: must be one of {', '.join(REFERENCES)}")
    asked = dict(
        prompts=list(prompts), count=count, steps=steps, seed=seed, history=history, ridge=ridge, **call_arguments
    )
    asked |= {"reference": reference} if reference == "converged" else {}
    parts = PARTS if reference == "converged" else 1
    few = min(annealing_prompts, len(prompts), batch_size)
    trajectories = record(pipe, prompts, steps, seed, batch_size, parts=parts, **call_arguments)
    store = Store.open(checkpoint, {**asked, "model": trajectories.conditions.model, "few": few, "fit": FIT})
    progress = Progress(on_progress)
    quick = Simulation(trajectories.first(few), history, ridge)
    whole = Simulation(trajectories, history, ridge)

    search = Search(steps, count, store.scorer("few", quick, progress), seed)
    progress.total = len(search.starts()) + 1 + annealing + 1 + climbing
    schedule = search.anneal(search.start(), annealing)
    search = Search(steps, count, store.scorer("all", whole, progress), seed)
    schedule = search.climb(schedule, climbing)

    end = whole.run(schedule)
    notes = {
        "budget": budget,
        "reference": reference,
        "prompts": len(prompts),
        "seed": seed,
        "psnr": round(trajectories.decibels(end.latents).mean().item(), 2),
    }
    return Plan(trajectories.conditions, schedule, end.weights, notes)


def _count(budget: float, steps: int) -> int:
    """How many steps may be computed."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 1 <= budget <= steps:
        raise ValueError(f"h2cache.calibrate got budget = {budget!r}: must be a number from 1 to the {steps} steps")
    return int(steps / budget + 1e-9)


def _check(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"h2cache.calibrate got {name} = {value!r}: must be an integer >= {least}")


@dataclass
class Progress:
    """Counts what was tried, of at most `total`."""

    tell: Callable[[int, int, float], None]
    total: int = 0
    done: int = 0
    best: float = float("-inf")

    def note(self, score: float) -> None:
        self.done, self.best = self.done + 1, max(self.best, score)
        self.tell(self.done, self.total, self.best)


class Store:
    """Scores that were paid for, in a file. A search that is repeated with them asks for the same and pays only for
    what is new: that is how it resumes."""

    def __init__(self, path: Path | None, request: str, known: dict[str, float]):
        self.path, self.request, self.known = path, request, known

    @classmethod
    def open(cls, path: str | Path | None, asked: dict[str, Any]) -> "Store":
        """What is known of a request; nothing, where the file is of another one or not there."""
        text = json.dumps(asked, sort_keys=True, default=str)
        request = hashlib.sha256(text.encode()).hexdigest()
        path = None if path is None else Path(path)
        if path is not None and path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["request"] == request:
                return cls(path, request, held["scores"])
        return cls(path, request, {})

    def scorer(self, kind: str, simulation: Simulation, progress: Progress) -> Callable[[Steps], float]:
        """The simulation's score of a schedule, asked once."""

        def score(computed: Steps) -> float:
            key = f"{kind} {' '.join(map(str, computed))}"
            if key not in self.known:
                self.known[key] = simulation.score(computed)
                self._save()
            progress.note(self.known[key])
            return self.known[key]

        return score

    def _save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps({"request": self.request, "scores": self.known}), encoding="utf-8")
        os.replace(draft, self.path)
