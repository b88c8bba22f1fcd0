"""Which steps to compute: simulated annealing, then hill climbing, against the error of the final image."""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Steps = tuple[int, ...]
Candidate = tuple[Any, ...]  # what an ascent chooses between: steps, or what each step does
HEADS = (1, 2, 3, 4, 5, 6)  # of the first schedules: how many steps in a row they begin with
POWERS = (1.0, 1.2, 1.4, 1.7)  # and how they go on: 1 is even, more is denser early on


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

    def starts(self) -> list[Steps]:
        """Smooth schedules to begin with. At most half of their steps are the head."""
        heads = [head for head in HEADS if head == 1 or 2 * head <= self.count]
        shapes = itertools.product(heads, POWERS)
        return list(dict.fromkeys(spread(self.steps, self.count, *shape) for shape in shapes))

    def start(self) -> Steps:
        """The best of `starts`."""
        return max(self.starts(), key=self.score)

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


def spread(steps: int, count: int, head: int, power: float) -> Steps:
    """`count` of `steps` steps: the first `head` (1 to `count`) in a row, the k-th of the rest at its part
    (k / rest) ** power of what is left, pushed on where two would meet. The rest ends with the last step but one: its
    output is nearest to what the last step needs, and the weights there still lead back to the uncached image as far
    as any can (docs/frontier.md has the measurement)."""
    chosen, rest, last = list(range(head)), count - head, max(steps - 2, count - 1)
    for index in range(1, rest + 1):
        wanted = head - 1 + round((index / rest) ** power * (last - head + 1))
        chosen.append(min(max(wanted, chosen[-1] + 1), last - rest + index))
    return tuple(chosen)
