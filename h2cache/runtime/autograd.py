"""What the engine does on its own account is no part of the caller's autograd graph."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def outside_graph(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` without gradients: as under `torch.no_grad()`, which is only entered where gradients are on."""

    @wraps(work)
    def ungraphed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return work(*args, **kwargs)
        with torch.no_grad():
            return work(*args, **kwargs)

    return ungraphed
