"""Plans in which a step may compute one stage alone: what there is to choose, what it costs, where a search starts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from h2cache.plans.search import spread

SHAPES = ((1, 1.4), (3, 1.2))  # of the hand-made plans: two of those that calibration begins with
PARTS = (0.25, 0.5)  # of their computing steps that compute one stage alone


class Level(Enum):
    """What a step does: its sign, whether the model runs, and which stages are computed in it.

    A run of the model adds a forecast residual for a stage that it does not compute. NOTHING does not run the model:
    its output is forecast. RESIDUALS runs what lies around the blocks, with both residuals forecast.
    """

    NOTHING = (".", False, False, False)
    RESIDUALS = ("-", True, False, False)
    STRUCTURE = ("s", True, True, False)
    DETAIL = ("d", True, False, True)
    EVERYTHING = ("#", True, True, True)

    def __init__(self, sign: str, runs: bool, structure: bool, detail: bool):
        self.sign, self.runs, self.structure, self.detail = sign, runs, structure, detail


Levels = tuple[Level, ...]  # of each step of a run; the first is EVERYTHING


def drawn(levels: Levels) -> str:
    """One sign a step."""
    return "".join(level.sign for level in levels)


@dataclass(frozen=True)
class Work:
    """What each stage costs in one step, and what a run may cost, in multiply-adds of the blocks."""

    structure: int
    detail: int
    budget: int

    def of(self, level: Level) -> int:
        return level.structure * self.structure + level.detail * self.detail

    def left(self, levels: Iterable[Level]) -> int:
        """Of the budget; negative where it is overdrawn."""
        return self.budget - sum(map(self.of, levels))


@dataclass(frozen=True)
class Family:
    """The plans that a search may choose from.

    idle: what a step does that computes no block. partial: what a step may compute beside everything, and at least one
    step does. corrected: the levels whose output is combined with earlier outputs before it is used.
    """

    name: str
    idle: Level = Level.NOTHING
    partial: tuple[Level, ...] = ()
    corrected: frozenset[Level] = frozenset()

    @property
    def levels(self) -> tuple[Level, ...]:
        return (self.idle, *self.partial, Level.EVERYTHING)

    def has(self, levels: Levels) -> bool:
        """Whether a plan made of this family's levels is one of it."""
        return not self.partial or any(level in self.partial for level in levels)

    def whole(self, steps: int, computed: Sequence[int]) -> Levels:
        """Both stages computed at these steps, none at the others."""
        return tuple(Level.EVERYTHING if step in computed else self.idle for step in range(steps))

    def handmade(self, steps: int, work: Work) -> list[Levels]:
        """Smooth plans within the budget, some of whose computing steps, evenly spread, compute one stage alone."""
        mixes = [(level, part) for level in self.partial for part in PARTS] or [(self.idle, 0.0)]
        plans = [self._smooth(steps, work, *mix, *shape) for mix in mixes for shape in SHAPES]
        return [plan for plan in dict.fromkeys(plans) if self.has(plan)]

    def _smooth(self, steps: int, work: Work, level: Level, part: float, head: int, power: float) -> Levels:
        best = self.whole(steps, (0,))
        for count in range(2, steps + 1):
            levels = [self.idle] * steps
            for index, step in enumerate(spread(steps, count, min(head, count - 1), power)):
                alone = int(index * part) > int((index - 1) * part)
                levels[step] = level if index and alone else Level.EVERYTHING
            if work.left(levels) < 0:
                break
            best = tuple(levels)
        return best


ALONE = (Level.STRUCTURE, Level.DETAIL)
ONE_STAGE = Family("everything or nothing")
TWO_STAGES = (
    Family("or detail alone", partial=(Level.DETAIL,), corrected=frozenset(ALONE)),
    Family("or structure alone", partial=(Level.STRUCTURE,), corrected=frozenset(ALONE)),
    Family("or either alone", partial=ALONE, corrected=frozenset(ALONE)),
    Family("two-stage cache: no output is forecast", idle=Level.RESIDUALS, partial=ALONE),
)
CORRECTED = frozenset((*ALONE, Level.EVERYTHING))
ALL_CORRECTED = (
    Family("everything or nothing, computed outputs corrected", corrected=CORRECTED),
    Family("or either alone, computed outputs corrected", partial=ALONE, corrected=CORRECTED),
)
