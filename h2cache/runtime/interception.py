"""Calls of one module instance, seen from the outside.

`torch.nn.Module.__call__` first looks for `_compiled_call_impl`, the slot that `Module.compile` fills, and falls back
to `_call_impl`. An `Interception` sits in that slot of one instance, so it lies outside everything else that a module
may wear: forward and backward hooks, accelerate's and diffusers' replaced `forward`, PEFT's layers, compiled code.
What it wraps stays as it was, whatever is added or removed later and in whatever order; the decisions are never
traced by the compiler; and `Module.__getstate__` drops the slot, so pickling and copying a module never see it.
"""

from collections.abc import Callable
from typing import Any

import torch

SLOT = "_compiled_call_impl"


class Interception:
    """Routes the calls of `module` through `handler(proceed, args, kwargs)`; `proceed` is the original call."""

    def __init__(self, module: torch.nn.Module, handler: Callable[..., Any], owner: Any):
        self.module = module
        self.handler = handler
        self.owner = owner
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(self._compiled or self.module._call_impl, args, kwargs)

    def __bool__(self) -> bool:
        """Whether the module is compiled: others ask the slot this question (PEFT, before it swaps adapters)."""
        return self._compiled is not None

    def attach(self) -> None:
        """Take the slot. Idempotent; a `Module.compile` that came after the last `attach` is wrapped, not lost."""
        current = self.module.__dict__.get(SLOT)
        if current is not self:
            self._compiled = current
            self.module.__dict__[SLOT] = self

    def detach(self) -> None:
        """Give the slot back as it would be without us."""
        current = self.module.__dict__.get(SLOT)
        if current is not self:
            return  # compiled after the last call: the slot is already somebody else's
        if self._compiled is None:
            del self.module.__dict__[SLOT]
        else:
            self.module.__dict__[SLOT] = self._compiled


def is_compiled(module: object) -> bool:
    """Whether `Module.compile` was called on this very module."""
    slot = getattr(module, "__dict__", {}).get(SLOT)
    return slot is not None and not isinstance(slot, Interception)


def interception_of(module: torch.nn.Module) -> Interception | None:
    """The interception that `module` wears, if any."""
    current = module.__dict__.get(SLOT)
    return current if isinstance(current, Interception) else None
