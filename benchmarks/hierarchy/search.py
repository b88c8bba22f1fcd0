"""The search over two-stage plans at equal work."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from h2cache.plans.search import Ascent

from .plans import Family, Level, Levels, Work

NEAR = 8  # steps: a change is paid for this near, where it can be
DRAWS = 50  # of a move, until one leads somewhere


@dataclass
class PlanSearch(Ascent):
    """Within one family, among the plans that have a partial step where it knows any: none costs more than the budget,
    or leaves more of it than it began with if another step could compute more."""

    family: Family
    work: Work
    score: "Counted"
    seed: int
    hottest: float = 0.5
    coldest: float = 0.05

    def moved(self, current: Levels, chance: random.Random) -> Levels | None:
        """Half of the moves exchange the levels of two near steps; of the others, half change one and pay for it, and
        half carry a partial step elsewhere."""
        partial = (self._exchanged, self._changed, self._relocated) if self.family.partial else ()
        moves = (self._exchanged, *partial)
        for _ in range(DRAWS):
            candidate = chance.choice(moves)(current, chance)
            if candidate not in (None, current) and self.family.has(candidate):
                return candidate
        return None

    def converted(self, plan: Levels, count: int) -> list[Levels]:
        """Plans of the family near to a one-stage plan: of its steps, one computes a stage alone, and what that saves
        is spent nearby. At most `count` of them, drawn from all such changes."""
        chance = random.Random(self.seed)
        changes = [(step, level) for step in self._computing(plan) for level in self.family.partial]
        drawn = chance.sample(changes, min(count, len(changes)))
        return list(dict.fromkeys(self._paid(with_level(plan, *change), change[0], chance) for change in drawn))

    def neighbours(self, current: Levels) -> Iterator[Levels]:
        """Late steps first, since those are the cheapest to try: each computing step one earlier or later, and each
        pair that follows one another exchanged."""
        computing = self._computing(current)
        for step in reversed(computing):
            for other in (step - 1, step + 1):
                if 0 < other < len(current) and current[other] is self.family.idle:
                    yield swapped(current, step, other)
        for step, other in reversed(list(pairwise(computing))):
            if current[step] is not current[other]:
                yield swapped(current, step, other)

    def _computing(self, levels: Levels) -> list[int]:
        """Without the first step, which computes everything always."""
        return [step for step in range(1, len(levels)) if levels[step] is not self.family.idle]

    def _exchanged(self, current: Levels, chance: random.Random) -> Levels | None:
        computing = self._computing(current)
        if not computing:
            return None
        step = chance.choice(computing)
        other = step + chance.choice((-3, -2, -1, -1, 1, 1, 2, 3))
        return swapped(current, step, other) if 0 < other < len(current) else None

    def _relocated(self, current: Levels, chance: random.Random) -> Levels | None:
        """A partial step changes places with any other."""
        partial = [step for step in range(len(current)) if current[step] in self.family.partial]
        return swapped(current, chance.choice(partial), chance.randrange(1, len(current))) if partial else None

    def _changed(self, current: Levels, chance: random.Random) -> Levels | None:
        step = chance.randrange(1, len(current))
        level = chance.choice([each for each in self.family.levels if each is not current[step]])
        return self._paid(with_level(current, step, level), step, chance)

    def _paid(self, levels: Levels, step: int, chance: random.Random) -> Levels | None:
        """What `step` costs too much is saved at others, and what is left is spent at others; None where it cannot."""
        while self.work.left(levels) < 0:
            cheaper = self._changes(levels, step, -self.work.budget, -1)
            if not cheaper:
                return None
            levels = with_level(levels, *chance.choice(cheaper))
        while dearer := self._changes(levels, step, 1, self.work.left(levels)):
            levels = with_level(levels, *chance.choice(dearer))
        return levels

    def _changes(self, levels: Levels, around: int, least: int, most: int) -> list[tuple[int, Level]]:
        """Of one other step, that cost from `least` to `most`; near to `around` where there are any."""
        changes = [
            (step, level)
            for step in range(1, len(levels))
            for level in self.family.levels
            if step != around and least <= self.work.of(level) - self.work.of(levels[step]) <= most
        ]
        return [change for change in changes if abs(change[0] - around) <= NEAR] or changes


@dataclass
class Counted:
    """A score that is simulated once for each plan; `asked` counts the plans, simulated anew or known."""

    simulate: Callable[[Levels], float]
    asked: int = 0
    known: dict[Levels, float] = field(default_factory=dict)

    def __call__(self, levels: Levels) -> float:
        if levels not in self.known:
            self.known[levels] = self.simulate(levels)
        self.asked += 1
        return self.known[levels]


def searched(search: PlanSearch, starts: Sequence[Sequence[Levels]], rounds: int) -> Levels:
    """The best plan that `rounds` scores find: two thirds of them annealing from the best of each group of starts, the
    others climbing from the best of all. A group may be empty. `search.score` is a new `Counted`."""
    score = search.score
    chosen = [max(group, key=score) for group in starts if group]
    annealing = max(rounds * 2 // 3 - score.asked, 0) // len(chosen)
    ends = [search.anneal(start, annealing) for start in chosen]
    best = max(ends, key=score)
    return search.climb(best, max(rounds - score.asked - 1, 0))


def swapped(levels: Levels, step: int, other: int) -> Levels:
    return with_level(with_level(levels, step, levels[other]), other, levels[step])


def with_level(levels: Levels, step: int, level: Level) -> Levels:
    return (*levels[:step], level, *levels[step + 1 :])
