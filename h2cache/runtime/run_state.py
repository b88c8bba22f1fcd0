"""What is remembered between the steps of one run: by branch of guidance, by stage, by sample."""

import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from ..policy.clusters import ClusterMemory
from ..policy.forecasts import Forecast
from ..policy.rules import RuleState
from ..policy.stages import Stage
from .in_place import InPlaceGuard, Memory
from .rope_cache import Once


@dataclass
class SampleMemory(RuleState, Memory):
    """One stage of one sample; each of the terms of its residual is a tuple of (1, tokens, D).

    Fields beside `RuleState`'s and `Memory`'s:
        pending_finite_check: (1,), finite if every probe was that became a reference without being compared; None when
            that is known.
        computed_step: when the terms were computed.
        products: what a forecast can learn from the last computed step, and how many steps it was ahead; None once
            `fitted` has learned it.
    """

    pending_finite_check: Tensor | None = None
    computed_step: int = 0
    products: tuple[Tensor, int] | None = None
    fitted: Forecast | None = None

    def tensors(self) -> Iterator[Tensor]:
        return chain(() if self.reference is None else (self.reference,), super().tensors())

    def forget(self) -> None:
        super().forget()
        self.reference, self.pending_finite_check = None, None

    def remember_unmeasured(self, probe: Tensor) -> None:
        """Take as reference a probe that nothing was compared with; the next read tells whether it was finite."""
        magnitude = probe.abs().mean().reshape(1)
        pending = self.pending_finite_check
        self.pending_finite_check = magnitude if pending is None else pending + magnitude
        self.reference = probe


@dataclass(eq=False)
class Timestep:
    """The timestep of a call: a number once it was read, till then where it was given, which may be an accelerator.

    As a float it is in the unit of 0 to 1000, `scale` times the unit of the call.
    """

    value: float | Tensor
    scale: float
    exact: bool  # False for low precision, which may round the second step onto the first

    def __float__(self) -> float:
        return float(self.value) * self.scale


@dataclass
class Context:
    """One branch of a run (conditional or unconditional): its own steps and its own memory, by stage and sample."""

    name: str
    embeddings: tuple[weakref.ref, ...]
    step: int = 0
    timed: bool = False  # whether any call's timestep is known yet
    stages: dict[str, list[SampleMemory]] = field(default_factory=dict)
    modules: defaultdict[int, Memory] = field(default_factory=lambda: defaultdict(Memory))  # of their outputs, (B, ...)
    empty_outputs: dict[int, Any] = field(default_factory=dict)  # in the place of those that feed a module, of size 0
    clusters: ClusterMemory | None = None
    once: Once = field(default_factory=Once)  # what depends on the branch, but not on the step
    _timesteps: tuple[Timestep, ...] = ()  # of the two calls before
    _last_input: tuple[weakref.ref, float | None] | None = None

    def knows(self, embeddings: tuple[Tensor, ...]) -> bool:
        """Whether these very tensors name this context."""
        return [id(ref()) for ref in self.embeddings] == [id(tensor) for tensor in embeddings]

    def has_seen(self, hidden_states: Tensor, timestep: float | None) -> bool:
        """Whether the last call had this very input at this timestep: then this call is of another branch.

        It tells branches apart that were given the same embeddings. Nothing is concluded from a timestep that is not
        known (None).
        """
        if self._last_input is None or timestep is None:
            return False
        last_hidden_states, last_timestep = self._last_input
        return last_hidden_states() is hidden_states and last_timestep == timestep

    def note_input(self, hidden_states: Tensor, timestep: float | None) -> None:
        self._last_input = weakref.ref(hidden_states), timestep

    def is_last_step(self, now: Timestep) -> bool:
        """Whether the step at `now` is the last of its run, as far as the timesteps of three steps tell.

        Denoising loops space their noise levels evenly down to zero and then shift them: with n steps to go
        `1/t = a / n + b`, a and b fixed by spacing and shift. The differences of 1/t between three steps cancel both;
        their quotient is (n + 2) / n: 3 at the last step, 2 before it. Timesteps that low precision rounds onto each
        other, near the first step, say nothing; neither do a run of two steps or a schedule that is spaced otherwise.
        """
        if len(self._timesteps) < 2:
            return False
        first, second, third = map(float, (*self._timesteps, now))
        if not first > second > 1.03 * third > 0:
            return False
        return (1 / third - 1 / second) / (1 / second - 1 / first) > 2.5

    def close(self, timestep: Timestep) -> None:
        """End the step at `timestep`."""
        self.step += 1
        self._timesteps = (*self._timesteps, timestep)[-2:]

    def clear(self) -> None:
        """Let go of every tensor; a further step computes."""
        self.stages, self.once, self.clusters = {}, Once(), None
        self.modules.clear()

    def stage(self, name: str, batch: int) -> list[SampleMemory]:
        if name not in self.stages:
            self.stages[name] = [SampleMemory() for _ in range(batch)]
        return self.stages[name]

    def has_stand_in(self, stage: Stage, memory: SampleMemory, guard: InPlaceGuard) -> bool:
        """Whether there is anything sound to stand in for what the stage skips."""
        if stage.keeps_residuals:
            return bool(memory.terms)
        guard.check(self.modules.values())
        return any(module.terms for module in self.modules.values())

    def memories(self) -> Iterator[SampleMemory]:
        for samples in self.stages.values():
            yield from samples

    def tensors(self) -> Iterator[Tensor]:
        for memory in (*self.memories(), *self.modules.values()):
            yield from memory.tensors()
        if self.clusters is not None:
            yield from self.clusters.tensors()
        yield from self.once.tensors()
