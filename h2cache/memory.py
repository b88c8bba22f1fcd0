"""What is remembered between the steps of one run, and when a run begins and ends.

A run is one pass of a denoising loop. Every diffusers pipeline makes its image position ids once a run and hands the
same tensor object to every call, so that object names the run: a call belongs to the run whose `img_ids` it carries.
The memory hangs on a weak reference to it and is freed the moment that the pipeline lets go of it, also when it ends
by an exception. Inside a run the prompt embeddings name the context in the same way, which keeps the two branches of
true classifier-free guidance apart whether or not the pipeline opens diffusers' `cache_context`.
"""

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from .clusters import ClusterMemory
from .conditions import Conditions
from .forecasts import Features, Forecast
from .once import Once


@dataclass
class SampleMemory:
    """One stage of one sample.

    `reference`: the probe of the last computed step (of the last step, for a rule that follows), (1, tokens',
    channels') float32. `doubt`: shape (1,), finite if every probe was that came to be remembered without being
    compared; None when that is known. `terms`: the residual of the last computed step and its differences, order + 1 at
    most, each (1, N, D) and (1, M, D) in the model's dtype. `accumulated`: what a rule has summed up since then.
    `products`: what a forecast can learn from the last computed step, with the steps before it that it had to forecast
    over; None once `fitted` has learned it.
    """

    reference: Tensor | None = None
    doubt: Tensor | None = None
    terms: list[Features] = field(default_factory=list)
    computed_step: int = 0
    consecutive_hits: int = 0
    accumulated: float = 0.0
    products: tuple[Tensor, int] | None = None
    fitted: Forecast | None = None

    def forget(self) -> None:
        """Start afresh: the next call computes."""
        self.reference, self.doubt, self.terms = None, None, []

    def remember_unseen(self, probe: Tensor) -> None:
        """Take as reference a probe that nothing was compared with; the next read tells whether it was finite."""
        magnitude = probe.abs().mean().reshape(1)
        self.doubt = magnitude if self.doubt is None else self.doubt + magnitude
        self.reference = probe

    def tensors(self) -> Iterator[Tensor]:
        """The features; scalars are not counted."""
        if self.reference is not None:
            yield self.reference
        for term in self.terms:
            yield from term


@dataclass(eq=False)
class Moment:
    """The timestep of a call: a number once it was read, till then where it was given, which may be an accelerator.

    As a float it is in the model's unit of 0 to 1000, `scale` times the unit of the call. Only a run that ends before
    it measured anything leaves its timesteps unread, a few bytes a step.
    """

    value: float | Tensor
    scale: float

    def __float__(self) -> float:
        return float(self.value) * self.scale


def on_host(tensor: Tensor) -> bool:
    """Whether a tensor can be read without waiting for an accelerator."""
    return tensor.device.type == "cpu"


@dataclass
class Context:
    """One branch of a run (conditional or unconditional): its own steps and its own memory, by stage and sample."""

    name: str
    embeddings: tuple[weakref.ref, ...]
    step: int = 0
    timed: bool = False  # whether any call's timestep is known yet
    stages: dict[str, list[SampleMemory]] = field(default_factory=dict)
    modules: dict[int, list[Features]] = field(default_factory=dict)  # terms of outputs, (B, ...), by module
    outputs: Tensor | None = None  # the last that the model returned, newest first, (K, B, ...)
    forecasts: dict[int, Tensor] = field(default_factory=dict)  # of what it would return, (B, ...), by step
    clusters: ClusterMemory | None = None
    once: Once = field(default_factory=Once)  # what depends on the branch, but not on the step
    _moments: tuple[Moment, ...] = ()  # of the two calls before
    _last_input: tuple[weakref.ref, float | None] | None = None

    def knows(self, embeddings: tuple[Tensor, ...]) -> bool:
        """Whether these very tensors name this context."""
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

    def ends_with(self, now: Moment) -> bool:
        """Whether the step at `now` is the last of its run, as far as the timesteps of three steps tell.

        Denoising loops space their noise levels evenly down to zero and then shift them: with n steps to go
        `1/t = a / n + b`, a and b fixed by spacing and shift. The differences of 1/t between three steps cancel both;
        their quotient is (n + 2) / n: 3 at the last step, 2 before it. Timesteps that low precision rounds onto each
        other, near the first step, say nothing; neither do a run of two steps or a schedule that is spaced otherwise.
        """
        if len(self._moments) < 2:
            return False
        first, second, third = map(float, (*self._moments, now))
        if not first > second > 1.03 * third > 0:
            return False
        return (1 / third - 1 / second) / (1 / second - 1 / first) > 2.5

    def close(self, moment: Moment) -> None:
        """End the step at `moment`."""
        self.step += 1
        self._moments = (*self._moments, moment)[-2:]

    def stage(self, name: str, batch: int) -> list[SampleMemory]:
        if name not in self.stages:
            self.stages[name] = [SampleMemory() for _ in range(batch)]
        return self.stages[name]

    def memories(self) -> Iterator[SampleMemory]:
        for samples in self.stages.values():
            yield from samples

    def tensors(self) -> Iterator[Tensor]:
        for memory in self.memories():
            yield from memory.tensors()
        for terms in self.modules.values():
            for outputs in terms:
                yield from outputs
        if self.outputs is not None:
            yield self.outputs
        yield from self.forecasts.values()
        if self.clusters is not None:
            yield from self.clusters.tensors()
        yield from self.once.tensors()


CONTEXT_NAMES = ("cond", "uncond")


@dataclass
class Run:
    """One pass of a denoising loop: its number in the trace, the conditions that its first call met, its contexts."""

    number: int
    img_ids: weakref.ref
    shape: tuple
    stages: tuple
    conditions: Conditions
    contexts: list[Context] = field(default_factory=list)
    contexts_seen: int = 0
    first_timestep: float | None = None
    last_timestep: float | None = None
    unread: list[Moment] = field(default_factory=list)
    once: Once = field(default_factory=Once)

    def starts_over(self, context: Context, timestep: float, exact: bool) -> bool:
        """Whether a call at `timestep` cannot belong to this run: denoising never goes up, nor back to its first step.

        A later timestep may come twice, as with schedulers that evaluate a step twice. `exact` is False for timesteps
        of low precision, which may round the second step onto the first and say nothing when they are equal.
        """
        if self.first_timestep is None or self.last_timestep is None:
            return False
        if timestep > self.last_timestep:
            return True
        return exact and context.timed and timestep == self.first_timestep

    def note_timestep(self, context: Context, timestep: float) -> None:
        if self.first_timestep is None:
            self.first_timestep = timestep
        self.last_timestep = timestep
        context.timed = True

    def context(self, embeddings: tuple[Tensor, ...], hidden_states: Tensor, timestep: float | None) -> Context:
        """The context of a call: "cond", "uncond", "context-2", ... in order of appearance."""
        known = [context for context in self.contexts if context.knows(embeddings)]
        for context in known:
            if not context.has_seen(hidden_states, timestep):
                return context
        if len(known) == len(CONTEXT_NAMES):
            return known[0]  # guidance has two branches: this is the first one's call, made again
        # A branch whose embeddings are gone can never be called again.
        self.contexts = [c for c in self.contexts if all(ref() is not None for ref in c.embeddings)]
        number = self.contexts_seen
        self.contexts_seen += 1
        name = CONTEXT_NAMES[number] if number < len(CONTEXT_NAMES) else f"context-{number}"
        self.contexts.append(Context(name, tuple(weakref.ref(tensor) for tensor in embeddings)))
        return self.contexts[-1]

    def tensors(self) -> Iterator[Tensor]:
        for context in self.contexts:
            yield from context.tensors()
        yield from self.once.tensors()


class Runs:
    """The runs in progress. Safe to use from several threads: each run is only ever touched by its own caller."""

    def __init__(self) -> None:
        self._by_ids: dict[int, Run] = {}
        self._lock = threading.Lock()
        self._begun = 0

    def find(self, img_ids: Tensor, shape: tuple) -> Run | None:
        """The run that carries `img_ids`, if there is one of this shape."""
        run = self._by_ids.get(id(img_ids))
        return run if run is not None and run.shape == shape else None

    def begin(self, img_ids: Tensor, shape: tuple, stages: tuple, conditions: Conditions) -> Run:
        """A new, empty run in place of any that carried `img_ids`."""
        key = id(img_ids)
        forget = self._by_ids.pop
        with self._lock:
            number, self._begun = self._begun, self._begun + 1
        # The callback holds the dictionary's method only, so that a dropped engine is not kept alive by a tensor.
        run = Run(number, weakref.ref(img_ids, lambda _: forget(key, None)), shape, stages, conditions)
        self._by_ids[key] = run
        return run

    def discard(self, run: Run) -> None:
        for key, known in list(self._by_ids.items()):
            if known is run:
                self._by_ids.pop(key, None)

    def clear(self) -> None:
        self._by_ids.clear()

    def held_bytes(self) -> int:
        """Bytes of device memory that the runs in progress hold; a storage that two tensors share counts once."""
        storages = {}
        for run in list(self._by_ids.values()):
            for tensor in run.tensors():
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes()  # not the address, which is zero on the meta device
        return sum(storages.values())
