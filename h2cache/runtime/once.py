"""What need not be made anew at every step: rotary tables, as the model makes them and packed."""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .in_place import versions_of


@dataclass(frozen=True, eq=False)
class Prepared:
    """Tensors that were made once for all steps of a run, and the state of those that they were made from."""

    sources: tuple[weakref.ref, ...]
    versions: tuple[int, ...]  # of the sources and of the tensors
    tensors: tuple[Tensor, ...]

    def serves(self, sources: Sequence[Tensor]) -> bool:
        """Whether these are the sources, and nobody wrote to them or to what was made of them."""
        same = all(ref() is source for ref, source in zip(self.sources, sources, strict=True))
        return same and self.versions == versions_of((*sources, *self.tensors))


class Once:
    """Prepared tensors by key."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Prepared] = {}

    def __call__(
        self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `make()` returned when it was first called for `key` and these very `sources`, not written to since.

        It is called at every step for sources of inference mode, which do not tell when they are written to.
        """
        if any(source.is_inference() for source in sources):
            return make()
        known = self._known.get(key)
        if known is None or not known.serves(sources):
            references, versions, made = tuple(map(weakref.ref, sources)), versions_of(sources), make()
            known = self._known[key] = Prepared(references, versions + versions_of(made), made)
        return known.tensors

    def tensors(self) -> Iterator[Tensor]:
        for prepared in self._known.values():
            yield from prepared.tensors
