"""When a run begins and ends, and which run and branch a call belongs to.

A run is one pass of a denoising loop. Its calls are told from others' by objects that the pipeline hands to each of
them (`ModelCall.run`), or else by the embeddings of the prompt. The memory hangs on weak references to these, and is
freed when the pipeline lets go of them, also when it ends by an exception. Inside a run the embeddings name the
context, which keeps the branches of classifier-free guidance apart whether or not the pipeline opens diffusers'
`cache_context`.

Embeddings that the caller keeps may name the next run as well. Then the timesteps tell the two apart: their places in
the scheduler's table where they are views of it (`TablePlace`), else their values.
"""

import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from torch import Tensor

from ..adapters.base import ModelCall
from .run_state import Context, Timestep

logger = logging.getLogger("h2cache")

CONTEXT_NAMES = ("cond", "uncond")
FALLING_RUNS = 4  # as many runs of one step in a row, at falling timesteps, are a loop that is not recognised


class TablePlace(NamedTuple):
    """Where a timestep stands in the scheduler's table, if it is a view of one: known without reading a device.

    Fields:
        timestep: kept, which keeps the table, so that no later one can be mistaken for it.
        table: tells one table from another.
        entry, size: the place, and the number of entries of the table.
    """

    timestep: Tensor
    table: int
    entry: int
    size: int

    @classmethod
    def of(cls, timestep: Tensor) -> Self | None:
        """None for a tensor of its own, and for a view that holds more than one entry."""
        if timestep.is_inference() or not timestep._is_view() or (timestep.numel() > 1 and timestep.stride(0)):
            return None
        table = timestep.untyped_storage()
        size = table.nbytes() // timestep.element_size()
        return cls(timestep, table._cdata, timestep.storage_offset(), size) if size > 1 else None


@dataclass(eq=False)
class Run:
    """One pass of a denoising loop: its number in the trace, and its contexts."""

    number: int
    kind: tuple  # what all its calls have in common: shapes, and how its memory is laid out
    has_own_name: bool = True  # something that was made for the run names it, and not the embeddings alone
    objects: tuple[object, ...] = ()  # that name the run and are no tensors; held, so that no other gets their ids
    names: list[weakref.ref] = field(default_factory=list)  # the tensors that name it
    contexts: list[Context] = field(default_factory=list)
    contexts_seen: int = 0
    first_timestep: float | None = None
    last_timestep: float | None = None
    place: TablePlace | None = None  # of the last call
    follows_table: bool = False  # two steps had their timesteps from one table
    unread: list[Timestep] = field(default_factory=list)

    def goes_on_at(self, place: TablePlace | None) -> bool | None:
        """Whether a call with this place can belong to the run; None where the places do not tell."""
        if self.place is None or place is None:
            return None
        if place.entry < self.place.entry:
            return False
        return True if place.table == self.place.table else None

    def note_place(self, place: TablePlace | None) -> None:
        if place is not None and self.place is not None:
            self.follows_table |= place.table == self.place.table and place.entry > self.place.entry
        self.place = place

    @property
    def at_end_of_table(self) -> bool:
        """Whether the last call had the last timestep of the scheduler's table."""
        return self.follows_table and self.place is not None and self.place.entry == self.place.size - 1

    def is_over(self, context: Context, timestep: float, exact: bool) -> bool:
        """Whether a call at `timestep` cannot belong to this run: denoising never goes up, nor back to its first step.

        A later timestep may come twice, as with schedulers that evaluate a step twice. Equal timesteps say nothing
        where they are not `exact`.
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


class Runs:
    """The runs in progress. Safe to use from several threads: each run is only ever touched by its own caller."""

    def __init__(self) -> None:
        self._by_name: dict[int, Run] = {}  # by the id of a tensor that names it
        self._thread = threading.local()  # what is known of this thread's last call
        self._warned = False

    def find(self, call: ModelCall, kind: tuple, place: TablePlace | None) -> Run | None:
        """The run in progress that a call belongs to, as far as is known without reading a device.

        Args:
            call: what the model was given.
            kind: what all calls of a run have in common.
            place: of the timestep in the scheduler's table, if it is in one.
        """
        name = name_of(call)
        run = None if any([each is name for each in call.run]) else self._of_same_input(call)
        if run is None:
            run = self._by_name.get(id(name))
        if run is None or run.kind != kind or ids(run.objects) != ids(objects_of(call)):
            return None
        if not call.run and run.goes_on_at(place) is False:
            return None  # the caller kept the embeddings of the run before
        return run

    def _of_same_input(self, call: ModelCall) -> Run | None:
        """The run of this thread's last call, if that had the same input: this one is another branch of guidance."""
        last = getattr(self._thread, "last", None)
        if last is None:
            return None
        last_input, last_run = last
        run = last_run() if last_input() is call.hidden_states else None
        if run is not None:
            self._name(run, call)
        return run

    def note_call(self, call: ModelCall, run: Run) -> None:
        """Remember, for the next call on this thread, what this one was given."""
        self._thread.last = weakref.ref(call.hidden_states), weakref.ref(run)

    def begin(self, call: ModelCall, number: int, kind: tuple) -> Run:
        """A new, empty run in place of the one that had this name."""
        run = Run(number, kind, bool(call.run), objects_of(call))
        self._name(run, call)
        return run

    def _name(self, run: Run, call: ModelCall) -> None:
        """Let the tensor that names the run in `call` lead to `run` for as long as it lives."""
        name = name_of(call)
        key, known = id(name), self._by_name
        if known.get(key) is not run:
            # The callback holds the dictionary only, so that a dropped engine is not kept alive by a tensor.
            run.names.append(weakref.ref(name, lambda _: known.pop(key, None)))
            known[key] = run

    def note_timestep(self, run: Run, timestep: float) -> None:
        """Say once where every step of a loop begins a run of its own, so that nothing can ever be skipped."""
        number, first, only, falling = getattr(self._thread, "first_steps", (run.number, timestep, False, 0))
        if run.number == number:
            self._thread.first_steps = number, first, only and run.first_timestep is None, falling
            return
        falling = falling + 1 if only and timestep < first else 0
        self._thread.first_steps = run.number, timestep, True, falling
        if falling >= FALLING_RUNS and not self._warned:
            self._warned = True
            logger.warning(
                "every call of the model seems to begin a new run, so that nothing is skipped: hand the same prompt "
                "embeddings (Flux: the same img_ids) to all calls of a denoising loop"
            )

    def discard(self, run: Run) -> None:
        for key, known in list(self._by_name.items()):
            if known is run:
                self._by_name.pop(key, None)

    def clear(self) -> None:
        self._by_name.clear()

    def held_bytes(self) -> int:
        """Bytes of device memory that the runs in progress hold; a storage that two tensors share counts once."""
        storages = {}
        for run in list(self._by_name.values()):
            for tensor in run.tensors():
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes()  # not the address, which is zero on the meta device
        return sum(storages.values())


def name_of(call: ModelCall) -> Tensor:
    """The tensor whose life is the run's: one that was made for it, or else the embeddings of the branch."""
    return next(each for each in (*call.run, *call.branch) if isinstance(each, Tensor))


def objects_of(call: ModelCall) -> tuple[object, ...]:
    """What else names the run, such as a list, which no weak reference can be made to."""
    return tuple(each for each in call.run if not isinstance(each, Tensor))


def ids(objects: tuple[object, ...]) -> list[int]:
    """Equal for the very same objects."""
    return [id(each) for each in objects]
