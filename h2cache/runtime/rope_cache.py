"""What need not be made anew at every step: rotary tables, as the model makes them and packed.

Flux makes its table at every step, from position ids that stay the same. It is made once a run where that is certain.
Others put embeddings in this one's place that follow the timestep, change its constants or its forward, or watch it:
then it runs at every step, as it would without a cache.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as hooks_of_all

from .in_place import versions_of
from .interception import interception_of

if TYPE_CHECKING:
    from .layout import Call


class Prepared(NamedTuple):
    """Tensors that were made once for all steps of a run, and the state of those that they were made from."""

    sources: list[weakref.ref]
    versions: tuple[int, ...]  # of the sources and of the tensors
    tensors: tuple[Tensor, ...]

    def serves(self, sources: Sequence[Tensor]) -> bool:
        """Whether these are the sources, and nobody wrote to them or to what was made of them."""
        same = all([ref() is source for ref, source in zip(self.sources, sources, strict=True)])
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
        if any([source.is_inference() for source in sources]):
            return make()
        known = self._known.get(key)
        if known is None or not known.serves(sources):
            references, versions, made = list(map(weakref.ref, sources)), versions_of(sources), make()
            known = self._known[key] = Prepared(references, versions + versions_of(made), made)
        return known.tensors

    def tensors(self) -> Iterator[Tensor]:
        for prepared in self._known.values():
            yield from prepared.tensors


def answer_once(
    module: torch.nn.Module, call: "Call", original_forward: Callable, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """What the module returned, a tensor or several, when it first ran in this branch of the run for these position ids
    and with these constants."""
    ids = [each for each in call.model_call.position_ids if each is not None]
    if not ids or len(ids) < len(call.model_call.position_ids) or not is_bare(module):
        return original_forward(*args, **kwargs)

    def make() -> tuple[Tensor, ...]:
        made = original_forward(*args, **kwargs)
        return made if isinstance(made, tuple) else (made,)

    # What was made in inference mode cannot be used where gradients are wanted.
    key = module, module.theta, tuple(module.axes_dim), torch.is_inference_mode_enabled()
    made = call.context.once(key, ids, make)
    return made if len(made) > 1 else made[0]


def is_bare(module: torch.nn.Module) -> bool:
    """Whether a module runs its class's own forward, uncompiled, and nobody has hung anything on its calls."""
    own = "forward" not in vars(module) and type(module).forward.__module__ == type(module).__module__
    hooks = module._forward_pre_hooks or module._forward_hooks
    everywhere = hooks_of_all._global_forward_pre_hooks or hooks_of_all._global_forward_hooks
    return own and not hooks and not everywhere and not interception_of(module)
