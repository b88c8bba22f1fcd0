"""Rotary tables, made once a run: Flux makes its table anew at every step, from position ids that stay the same.

Only where that is certain. Others put embeddings in this one's place that follow the timestep, change its constants or
its forward, or watch it: then it runs at every step, as it would without a cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as hooks_of_all

from .interception import interception_of
from .layout import InProgress


def not_shared(modules: Sequence[torch.nn.Module], owner: object) -> list[torch.nn.Module]:
    """Those that belong to no other transformer which has a cache: its engine would not know whose call it sees."""
    return [module for module in modules if getattr(interception_of(module), "owner", owner) is owner]


def answer_once(
    active: InProgress,
    module: torch.nn.Module,
    original_forward: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """What the module returned, a tensor or several, when it first ran in this branch of the run for these position ids
    and with these constants. `active.call` is the call of the model that it is part of, if there is one."""
    call = active.call
    ids = () if call is None else call.model_call.position_ids
    if call is None or not ids or any(each is None for each in ids) or not is_bare(module):
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
