"""What need not be made anew at every step: rotary tables, as the model makes them and packed; a plan's weights."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prepared:
    """Tensors that were made once for all steps of a run, and the state of those that they were made from."""

    sources: tuple[weakref.ref, ...]
    versions: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    def serves(self, sources: Sequence[Tensor]) -> bool:
        same = all(ref() is source for ref, source in zip(self.sources, sources, strict=True))
        return same and self.versions == versions_of(sources)


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each was written to; inference tensors do not count it."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


class Once:
    """Prepared tensors by key."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Prepared] = {}

    def __call__(
        self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `make()` returned when it was first called for `key` and these very `sources`, not written to since."""
        known = self._known.get(key)
        if known is None or not known.serves(sources):
            references = tuple(weakref.ref(source) for source in sources)
            known = self._known[key] = Prepared(references, versions_of(sources), make())
        return known.tensors

    def tensors(self) -> Iterator[Tensor]:
        for prepared in self._known.values():
            yield from prepared.tensors
