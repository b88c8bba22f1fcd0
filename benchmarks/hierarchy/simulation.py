"""Runs of two-stage plans on recorded prompts. Weights are fitted on some prompts, and replayed on others.

As in h2cache.plans.simulate the weights are fitted in the state that the cached run has come to, and runs share
the steps that their plans begin with alike.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from h2cache.plans import Trajectories
from h2cache.plans.weights import combine, fit_weights

from .plans import Level, Levels
from .stages import Residual, combined, evaluate

HISTORY = 3  # what a forecast looks back on; both as in h2cache.calibrate
RIDGE = 1e-4
Weights = tuple[float, ...]


@dataclass(frozen=True)
class StepWeights:
    """Of one step: over a stage's earlier residuals, where it is not computed, and over outputs; newest first."""

    structure: Weights = ()
    detail: Weights = ()
    output: Weights = ()


@dataclass(frozen=True)
class State:
    """Before a step: the latents; outputs and residuals that were computed, newest first; the weights until here."""

    latents: Tensor
    outputs: tuple[Tensor, ...] = ()
    structures: tuple[Residual, ...] = ()
    details: tuple[Residual, ...] = ()
    weights: Mapping[int, StepWeights] = field(default_factory=dict)


class Weigher(Protocol):
    """Where the weights of a step come from."""

    def output(self, step: int, state: State, outputs: Sequence[Tensor]) -> Weights:
        """Over `outputs`."""

    def residuals(self, step: int, state: State, level: Level, structure: Residual | None) -> tuple[Weights, Weights]:
        """Over earlier residuals of structure and of detail; () for a stage that is computed. `structure` is the
        computed one at a step that computes it alone."""


@dataclass(frozen=True)
class Fitted:
    """Weights are fitted on these runs, as calibration fits them.

    Outputs are fitted to the one that leads back onto the uncached run, and so are residuals from which it is not far
    to the output: what each remembered residual would make of the model's head is fitted, not the residual. Where the
    detail stage lies in between, structure is fitted to its true residual at the cached latents. All that this computes
    is calibration, which no plan pays for.
    """

    runs: Trajectories

    def output(self, step: int, state: State, outputs: Sequence[Tensor]) -> Weights:
        return fit_weights(outputs, self.runs.needed(step, state.latents), RIDGE)

    def residuals(self, step: int, state: State, level: Level, structure: Residual | None) -> tuple[Weights, Weights]:
        if level is Level.EVERYTHING:
            return (), ()
        if level is Level.DETAIL:
            true = evaluate(self.runs, step, state.latents, detail=state.details[0]).structure
            return fit_weights([each.flat() for each in state.structures], true.flat(), RIDGE), ()
        if level is Level.STRUCTURE:
            return (), self._before_the_head(step, state, (structure,))[1]
        return self._before_the_head(step, state, state.structures)

    def _before_the_head(self, step: int, state: State, structures: Sequence[Residual]) -> tuple[Weights, Weights]:
        """One residual at a time is exchanged for an older one; weights are those of the outputs that this makes."""
        newest, *older = state.details
        tried = [(each, newest) for each in structures] + [(structures[0], each) for each in older]
        outputs = [evaluate(self.runs, step, state.latents, *pair).output for pair in tried]
        weights = self.output(step, state, outputs)
        changes = weights[1 : len(structures)], weights[len(structures) :]
        return tuple((1 - sum(change), *change) for change in changes)


@dataclass(frozen=True)
class Given:
    """Weights that were fitted elsewhere."""

    weights: Mapping[int, StepWeights]

    def output(self, step: int, state: State, outputs: Sequence[Tensor]) -> Weights:
        return self.weights[step].output

    def residuals(self, step: int, state: State, level: Level, structure: Residual | None) -> tuple[Weights, Weights]:
        return self.weights[step].structure, self.weights[step].detail


class Simulation:
    """Runs plans on recorded prompts, which are all in one batch. `corrected`: as `Family` has it."""

    def __init__(self, runs: Trajectories, weigher: Weigher, corrected: Collection[Level] = ()):
        self.runs = runs
        self.weigher = weigher
        self.corrected = corrected
        self._levels: Levels = ()
        self._states: list[State] = [State(runs.latents[0])]  # before each step of the last plan

    def run(self, levels: Levels) -> State:
        """The end of a run."""
        shared = 0
        while shared < len(self._levels) and levels[shared] is self._levels[shared]:
            shared += 1
        states = self._states[: shared + 1]
        for step in range(shared, self.runs.steps):
            states.append(self._after(states[-1], step, levels[step]))
        self._levels, self._states = levels, states
        return states[-1]

    def decibels(self, levels: Levels) -> Tensor:
        """(prompts,): PSNR of the final images against the uncached ones."""
        return self.runs.decibels(self.run(levels).latents)

    def _after(self, state: State, step: int, level: Level) -> State:
        return self._run_model(state, step, level) if level.runs else self._forecast(state, step)

    def _forecast(self, state: State, step: int) -> State:
        weights = self.weigher.output(step, state, state.outputs)
        return self._advanced(state, step, combine(weights, state.outputs), StepWeights(output=weights))

    def _run_model(self, state: State, step: int, level: Level) -> State:
        structure = detail = None
        if level is Level.STRUCTURE:
            structure = evaluate(self.runs, step, state.latents, detail=state.details[0]).structure
        of_structure, of_detail = self.weigher.residuals(step, state, level, structure)
        if of_structure:
            structure = combined(of_structure, state.structures)
        if of_detail:
            detail = combined(of_detail, state.details)
        made = evaluate(self.runs, step, state.latents, structure, detail)
        output, of_outputs = made.output, ()
        if level in self.corrected and state.outputs:
            outputs = (made.output, *state.outputs)
            of_outputs = self.weigher.output(step, state, outputs)
            output = combine(of_outputs, outputs)
        # On a forecast structure the output that was corrected is the better one to remember, else the one that was
        # computed: found by trying both.
        remembered = made.output if level.structure else output
        remembering = replace(
            state,
            outputs=(remembered, *state.outputs)[:HISTORY],
            structures=(made.structure, *state.structures)[:HISTORY] if level.structure else state.structures,
            details=(made.detail, *state.details)[:HISTORY] if level.detail else state.details,
        )
        return self._advanced(remembering, step, output, StepWeights(of_structure, of_detail, of_outputs))

    def _advanced(self, state: State, step: int, output: Tensor, weights: StepWeights) -> State:
        latents = self.runs.advance(step, state.latents, output)
        return replace(state, latents=latents, weights={**state.weights, step: weights})
