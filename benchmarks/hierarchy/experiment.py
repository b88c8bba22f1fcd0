"""From recorded runs to the best plan of each family, measured on prompts of which the search saw none."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.count import WorkCounter
from h2cache import Plan
from h2cache.plans import Trajectories

from .plans import ALL_CORRECTED, ONE_STAGE, TWO_STAGES, Family, Level, Levels, Work
from .search import Counted, PlanSearch, searched
from .simulation import Fitted, Given, Simulation
from .stages import evaluate

CONVERTED = 5  # of the rounds, one in so many goes into the start that is near to the one-stage plan


@dataclass(frozen=True)
class Prompts:
    """search: every candidate is scored on them; fit: the winners' weights are fitted on them, the search's among
    them; held_out: the winners are measured on them."""

    search: Trajectories
    fit: Trajectories
    held_out: Trajectories


@dataclass(frozen=True)
class Found:
    """The best plan of a family. fit, held_out: PSNR in dB, (prompts,). asked: plans that this search scored."""

    family: Family
    levels: Levels
    work: int
    asked: int
    fit: np.ndarray
    held_out: np.ndarray


def work_of_stages(runs: Trajectories, budget: float) -> Work:
    """Counted at the linear layers and attentions while each stage runs alone; a run may cost 1 / budget of all."""
    alone = runs.first(1)
    latents = alone.latents[0]
    made = evaluate(alone, 0, latents)
    with WorkCounter(runs.model) as counter:
        evaluate(alone, 0, latents, detail=made.detail)
        structure = counter.multiply_adds
        counter.reset()
        evaluate(alone, 0, latents, structure=made.structure)
        detail = counter.multiply_adds
    return Work(structure, detail, int(runs.steps / budget + 1e-9) * (structure + detail))


@dataclass
class Experiment:
    """The searches at one budget, one after another, since the later ones start from what the first one found."""

    prompts: Prompts
    work: Work
    rounds: int
    seed: int
    tell: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        self._known: dict[frozenset[Level], tuple[Simulation, dict[Levels, float]]] = {}

    def run(self, calibrated: Sequence[int] | None) -> Iterator[Found]:
        """The one-stage plan first, of twice as many rounds; the others start from what its first half found, and from
        hand-made plans. `calibrated`: computed steps of a plan to start from, too."""
        steps = self.prompts.search.steps
        known = [] if calibrated is None else [ONE_STAGE.whole(steps, calibrated)]
        begun = self._search(ONE_STAGE, self.seed)
        first = searched(begun, [known + ONE_STAGE.handmade(steps, self.work)], self.rounds)
        ended = self._search(ONE_STAGE, self.seed + 1)
        yield self._measured(ONE_STAGE, searched(ended, [[first]], self.rounds), begun.score.asked + ended.score.asked)
        computed = [step for step, level in enumerate(first) if level is Level.EVERYTHING]
        for family in (*TWO_STAGES, *ALL_CORRECTED):
            search, near = self._search(family, self.seed + 1), family.whole(steps, computed)
            if family.partial:
                starts = [search.converted(near, max(self.rounds // CONVERTED, 1)), family.handmade(steps, self.work)]
            else:
                starts = [[near]]
            best = searched(search, starts, self.rounds)
            yield self._measured(family, best, search.score.asked)

    def _search(self, family: Family, seed: int) -> PlanSearch:
        """Families that correct the same outputs share what was simulated."""
        if family.corrected not in self._known:
            runs = self.prompts.search
            self._known[family.corrected] = Simulation(runs, Fitted(runs), family.corrected), {}
        simulation, known = self._known[family.corrected]
        score = Counted(lambda levels: simulation.decibels(levels).mean().item(), known=known)
        return PlanSearch(family, self.work, score, seed)

    def _measured(self, family: Family, levels: Levels, asked: int) -> Found:
        fitting = Simulation(self.prompts.fit, Fitted(self.prompts.fit), family.corrected)
        fit = fitting.decibels(levels)
        given = Given(fitting.run(levels).weights)
        held_out = Simulation(self.prompts.held_out, given, family.corrected).decibels(levels)
        spent = self.work.budget - self.work.left(levels)
        self.tell(f"{family.name}: {fit.mean().item():.2f} dB, held-out {held_out.mean().item():.2f} dB")
        return Found(family, levels, spent, asked, fit.numpy(), held_out.numpy())


def computed_steps(file: Path, steps: int, count: int) -> tuple[int, ...] | None:
    """Of the plan in `file`; None where there is none for as many steps and as much work."""
    if not file.exists():
        return None
    plan = Plan.load(file)
    return plan.computed if (plan.steps, len(plan.computed)) == (steps, count) else None
