"""Cached runs without a pipeline: only computed steps call the model, and what two schedules share is run once."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .plan import Plan
from .trajectories import Trajectories
from .weights import combine, fit_weights


@dataclass(frozen=True)
class State:
    """Before a step: the latents, the last computed outputs (newest first), the weights of the steps before."""

    latents: Tensor
    history: tuple[Tensor, ...]
    weights: Mapping[int, tuple[float, ...]]


class Simulation:
    """Runs schedules on recorded prompts and fits the weights as it goes.

    Weights are on-policy: at each skipped step they are fitted, in the state that the cached run itself has come to, to
    the output that would lead back onto the uncached trajectory. So they take back, as far as earlier outputs can, the
    error that was made before.
    """

    def __init__(self, trajectories: Trajectories, history: int, ridge: float):
        self.trajectories = trajectories
        self.history = history
        self.ridge = ridge
        self._computed: tuple[int, ...] = ()
        self._states: list[State] = []  # before each step of the last schedule

    def run(self, computed: tuple[int, ...]) -> State:
        """The end of a run that computes these steps."""
        states = self._shared(computed)
        for step in range(len(states) - 1, self.trajectories.steps):
            states.append(self._step(states[-1], step, computed))
        self._computed, self._states = computed, states
        return states[-1]

    def _shared(self, computed: tuple[int, ...]) -> list[State]:
        """The states of the last schedule as far as this one is like it."""
        if not self._states:
            return [State(self.trajectories.latents[0], (), {})]
        # What a step does depends on whether the next one is computed.
        differing = set(computed) ^ set(self._computed)
        return self._states[: min(differing, default=self.trajectories.steps + 1)]

    def _step(self, state: State, step: int, computed: tuple[int, ...]) -> State:
        runs, history, weights = self.trajectories, state.history, state.weights
        if step in computed:
            history = (runs.compute(step, state.latents), *history)[: self.history]
        # Before the next output every step has weights, also a computed one, if there is anything to weigh.
        is_followed = step + 1 == runs.steps or step + 1 in computed
        output = history[0]
        if step not in computed or (is_followed and len(history) > 1):
            fitted = fit_weights(history, runs.needed(step, state.latents), self.ridge)
            output, weights = combine(fitted, history), {**weights, step: fitted}
        return State(runs.advance(step, state.latents, output), history, weights)

    def follow(self, plan: Plan) -> State:
        """The end of a run with a plan's own weights, on the reference's noise levels."""
        runs = self.trajectories
        state, history = State(runs.latents[0], (), plan.weights), ()
        for step in range(runs.steps):
            if step in plan.computed:
                history = (runs.compute(step, state.latents), *history)[: plan.history]
            output = combine(plan.weights.get(step, (1.0,)), history)
            state = State(runs.advance(step, state.latents, output), history, plan.weights)
        return state

    def score(self, computed: tuple[int, ...]) -> float:
        """PSNR in dB of the final images, mean over the prompts."""
        return self.trajectories.decibels(self.run(computed).latents).mean().item()
