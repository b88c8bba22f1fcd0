"""Which steps to compute: simulated annealing, then hill climbing, against the error of the final image."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Steps = tuple[int, ...]
Candidate = tuple[Any, ...]  # what an ascent chooses between: steps, or what each step does
WARPS = (1.0, 1.3, 1.6, 2.0)  # of the first schedules: 1 is even, more computes the early steps more densely


class Ascent(ABC):
    """Looks for the candidate with the largest `score`, which is asked as rarely as possible. Everything follows from
    `seed`. Annealing goes from `hottest` to `coldest`, in the unit of the score."""

    score: Callable[[Candidate], float]
    seed: int
    hottest: float
    coldest: float

    @abstractmethod
    def moved(self, current: Candidate, chance: random.Random) -> Candidate | None:
        """A random neighbour; None where the draw leads nowhere."""

    @abstractmethod
    def neighbours(self, current: Candidate) -> Iterator[Candidate]:
        """What climbing tries, in this order."""

    def anneal(self, current: Candidate, rounds: int) -> Candidate:
        """The best of what `rounds` random moves from `current` come upon."""
        chance = random.Random(self.seed)
        value = self.score(current)
        best, highest = current, value
        for turn in range(rounds):
            heat = self.hottest * (self.coldest / self.hottest) ** (turn / rounds)
            candidate = self.moved(current, chance)
            luck = chance.random()
            if candidate is None:
                continue
            tried = self.score(candidate)
            if tried >= value or luck < math.exp((tried - value) / heat):
                value, current = tried, candidate
                if value > highest:
                    best, highest = current, value
        return best

    def climb(self, current: Candidate, rounds: int) -> Candidate:
        """Take every better neighbour, until there is none or `rounds` have been asked."""
        asked, value = 0, self.score(current)
        improved = True
        while improved:
            improved = False
            for candidate in list(self.neighbours(current)):
                if asked == rounds:
                    return current
                asked += 1
                tried = self.score(candidate)
                if tried > value:
                    value, current, improved = tried, candidate, True
                    break
        return current


@dataclass
class Search(Ascent):
    """For `count` of `steps` steps; `score(computed)`."""

    steps: int
    count: int
    score: Callable[[Steps], float]
    seed: int
    hottest: float = 1.0
    coldest: float = 0.1

    def start(self) -> Steps:
        """The best of a few smooth schedules."""
        return max((warped(self.steps, self.count, power) for power in WARPS), key=self.score)

    def moved(self, current: Steps, chance: random.Random) -> Steps | None:
        """One computed step, not the first, moved by up to three; None where it meets another or leaves the run."""
        if len(current) == 1:
            return None
        index = chance.randrange(1, len(current))
        return self._replaced(current, index, chance.choice((-3, -2, -1, -1, 1, 1, 2, 3)))

    def _replaced(self, current: Steps, index: int, by: int) -> Steps | None:
        step = current[index] + by
        if not 0 < step < self.steps or step in current:
            return None
        return tuple(sorted((*current[:index], step, *current[index + 1 :])))

    def neighbours(self, current: Steps) -> Iterator[Steps]:
        """Late steps first, since those are the cheapest to try."""
        for index in range(len(current) - 1, 0, -1):
            for by in (-1, 1):
                candidate = self._replaced(current, index, by)
                if candidate is not None:
                    yield candidate


def warped(steps: int, count: int, power: float) -> Steps:
    """`count` steps from 0 on, the k-th at the part (k / count) ** power of the run, pushed on where two would meet."""
    chosen: list[int] = []
    for index in range(count):
        wanted = round((index / count) ** power * steps)
        earliest = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(wanted, earliest), steps - count + index))
    return tuple(chosen)
