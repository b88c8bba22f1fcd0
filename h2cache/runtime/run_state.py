"""What is remembered between the steps of one run: by branch of guidance, by stage, by sample."""

import logging
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..policy.clusters import ClusterMemory
from ..policy.forecasts import Features, Forecast
from ..policy.rules import RuleState
from ..policy.stages import Stage
from .once import Once, versions_of

logger = logging.getLogger("h2cache")


@dataclass
class SampleMemory(RuleState):
    """One stage of one sample.

    Fields beside `RuleState`'s:
        pending_finite_check: (1,), finite if every probe was that became a reference without being compared; None when
            that is known.
        terms: the residual of the last computed step and its differences, order + 1 at most, each a tuple of
            (1, tokens, D) in the model's dtype.
        computed_step: when they were computed.
        products: what a forecast can learn from the last computed step, and how many steps it was ahead; None once
            `fitted` has learned it.
    """

    pending_finite_check: Tensor | None = None
    terms: list[Features] = field(default_factory=list)
    computed_step: int = 0
    products: tuple[Tensor, int] | None = None
    fitted: Forecast | None = None
    _writes: int = 0  # to the tensors above, when they were kept

    def forget(self) -> None:
        """Start afresh: the next call computes."""
        self.reference, self.pending_finite_check, self.terms, self._writes = None, None, [], 0

    def seal(self) -> None:
        """From here on nobody should write to what is kept."""
        self._writes = sum(versions_of(self.tensors()))

    def was_written_to(self) -> bool:
        """Whether somebody wrote to a kept tensor. Tensors of inference mode do not tell."""
        return self._writes != sum(versions_of(self.tensors()))

    def remember_unmeasured(self, probe: Tensor) -> None:
        """Take as reference a probe that nothing was compared with; the next read tells whether it was finite."""
        magnitude = probe.abs().mean().reshape(1)
        pending = self.pending_finite_check
        self.pending_finite_check = magnitude if pending is None else pending + magnitude
        self.reference = probe

    def tensors(self) -> Iterator[Tensor]:
        """The features; scalars are not counted."""
        if self.reference is not None:
            yield self.reference
        for term in self.terms:
            yield from term


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


class InPlaceGuard:
    """What is known about models that write into tensors which the cache keeps.

    Writes are seen by a tensor's version, or by a block that returns the memory that it was given. Not seen is a kernel
    that counts no version, writes into its input and returns other memory.
    """

    def __init__(self) -> None:
        self.copies = False  # such a model has been seen: what is kept is copied first

    def keep(self, tensors: Iterable[Tensor]) -> Features:
        """The tensors, in memory of their own where the model may write to them and nobody could tell."""
        return tuple(tensor.clone() if self.copies or tensor.is_inference() else tensor for tensor in tensors)

    def found_in_place_writer(self, memories: Iterable[SampleMemory] = ()) -> None:
        """Forget `memories`. From now on keep copies; say so once."""
        for memory in memories:
            memory.forget()
        if not self.copies:
            self.copies = True
            logger.warning(
                "the model writes in place to tensors that the cache keeps: what they hold is computed anew, and from "
                "now on copies are kept, which takes some time and memory"
            )


@dataclass
class Context:
    """One branch of a run (conditional or unconditional): its own steps and its own memory, by stage and sample."""

    name: str
    embeddings: tuple[weakref.ref, ...]
    step: int = 0
    timed: bool = False  # whether any call's timestep is known yet
    stages: dict[str, list[SampleMemory]] = field(default_factory=dict)
    modules: dict[int, list[Features]] = field(default_factory=dict)  # terms of outputs, (B, ...), by module
    module_writes: dict[int, int] = field(default_factory=dict)  # to these, when they were kept
    empty_outputs: dict[int, Any] = field(default_factory=dict)  # in the place of those that feed a module, of size 0
    clusters: ClusterMemory | None = None
    once: Once = field(default_factory=Once)  # what depends on the branch, but not on the step
    _timesteps: tuple[Timestep, ...] = ()  # of the two calls before
    _last_input: tuple[weakref.ref, float | None] | None = None

    def knows(self, embeddings: tuple[Tensor, ...]) -> bool:
        """Whether these very tensors name this context."""
        if len(embeddings) != len(self.embeddings):
            return False
        return all(ref() is tensor for ref, tensor in zip(self.embeddings, embeddings, strict=True))

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
        self.stages, self.modules, self.once = {}, {}, Once()
        self.clusters = None

    def stage(self, name: str, batch: int) -> list[SampleMemory]:
        if name not in self.stages:
            self.stages[name] = [SampleMemory() for _ in range(batch)]
        return self.stages[name]

    def keep_module(self, key: int, terms: list[Features]) -> None:
        """Remember the terms of a module's outputs. From here on nobody should write to them."""
        self.modules[key] = terms
        self.module_writes[key] = writes_to(terms)

    def check_modules(self, keys: Iterable[int], guard: InPlaceGuard) -> None:
        """Forget what is remembered of these modules, if somebody wrote to any of it."""
        known = [key for key in keys if key in self.modules]
        if any(writes_to(self.modules[key]) != self.module_writes[key] for key in known):
            guard.found_in_place_writer()
            for key in known:
                del self.modules[key]

    def has_stand_in(self, stage: Stage, memory: SampleMemory, guard: InPlaceGuard) -> bool:
        """Whether there is anything sound to stand in for what the stage skips."""
        if stage.keeps_residuals:
            return bool(memory.terms)
        self.check_modules(list(self.modules), guard)
        return bool(self.modules)

    def memories(self) -> Iterator[SampleMemory]:
        for samples in self.stages.values():
            yield from samples

    def tensors(self) -> Iterator[Tensor]:
        for memory in self.memories():
            yield from memory.tensors()
        for terms in self.modules.values():
            for outputs in terms:
                yield from outputs
        if self.clusters is not None:
            yield from self.clusters.tensors()
        yield from self.once.tensors()


def writes_to(terms: list[Features]) -> int:
    return sum(versions_of(tensor for term in terms for tensor in term))
