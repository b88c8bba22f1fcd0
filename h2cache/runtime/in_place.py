"""Models that write in place to tensors that the cache keeps.

A write is seen by a tensor's version, or by a block that returns the memory that it was given. Not seen is a kernel
that counts no version, writes into its input and returns other memory.
"""

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, Self

from torch import Tensor

from ..policy.forecasts import Features

logger = logging.getLogger("h2cache")


def versions_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """How often each was written to; inference tensors do not count it."""
    return tuple([0 if tensor.is_inference() else tensor._version for tensor in tensors])


class Watched(NamedTuple):
    """Tensors that nobody should write to, and how often each was written to before."""

    tensors: tuple[Tensor, ...] = ()
    versions: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Self:
        """`tensors`, from now on."""
        tensors = tuple(tensors)
        return cls(tensors, versions_of(tensors))

    def written_to(self, returned: Iterable[Tensor] = ()) -> bool:
        """Whether somebody wrote to them, as a block did that was given them and `returned` the same memory.

        Addresses are compared, for a kernel that counts no version may make a tensor of its own there. Nothing lies
        anywhere on the meta device.
        """
        for left, given in zip(returned, self.tensors, strict=False):
            if left.data_ptr() == given.data_ptr() and not left.is_meta:
                return True
        return versions_of(self.tensors) != self.versions


@dataclass
class Memory:
    """What a forecast is made of: for a stage of one sample, or for a module of all samples.

    Fields:
        terms: the last computed features and their differences, order + 1 at most, in the model's dtype.
    """

    terms: list[Features] = field(default_factory=list)
    _watched: Watched = field(default_factory=Watched)

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept; scalars are not counted."""
        return chain.from_iterable(self.terms)

    def seal(self) -> None:
        """From here on nobody should write to what is kept."""
        self._watched = Watched.of(self.tensors())

    def was_written_to(self) -> bool:
        """Whether somebody did. Tensors of inference mode do not tell."""
        return self._watched.written_to()

    def forget(self) -> None:
        """Start afresh: the next call computes."""
        self.terms, self._watched = [], Watched()


class InPlaceGuard:
    """What is known about a model: whether it writes to what is kept."""

    def __init__(self) -> None:
        self.copies = False  # it was seen to: what is kept is copied first

    def keep(self, tensors: Iterable[Tensor]) -> Features:
        """The tensors, in memory of their own where the model may write to them and nobody could tell."""
        return tuple([tensor.clone() if self.copies or tensor.is_inference() else tensor for tensor in tensors])

    def check(self, memories: Collection[Memory]) -> None:
        """Forget `memories` if somebody wrote to any of them."""
        for memory in memories:
            if memory.was_written_to():
                return self.found_in_place_writer(memories)

    def found_in_place_writer(self, memories: Iterable[Memory] = ()) -> None:
        """Forget `memories`. From now on keep copies; say so once."""
        for memory in memories:
            memory.forget()
        if not self.copies:
            self.copies = True
            logger.warning(
                "the model writes in place to tensors that the cache keeps: what they hold is computed anew, and from "
                "now on copies are kept, which takes some time and memory"
            )
