"""Modules that return the same at every step of a run: Flux makes its rotary table anew at each of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .call import Call


def answer_once(
    call: Call, module: torch.nn.Module, proceed: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """What the module returned when it first ran in this branch of the run, for the same position ids."""
    ids = call.denoising.img_ids, call.denoising.txt_ids
    if ids[1] is None or not is_bare(module):
        return proceed(*args, **kwargs)

    def make() -> tuple[Tensor, ...]:
        made = proceed(*args, **kwargs)
        return made if isinstance(made, tuple) else (made,)

    # What was made in inference mode cannot be used where gradients are wanted.
    made = call.context.once((module, torch.is_inference_mode_enabled()), ids, make)
    return made if len(made) > 1 else made[0]


def is_bare(module: torch.nn.Module) -> bool:
    """Whether nothing that may watch or change its calls was hung on a module."""
    return not (module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))
