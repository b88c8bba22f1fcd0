"""What makes a host wait for a device, counted on the CPU.

Reading a device's value makes the host wait for everything queued there. Timesteps that live on the CPU cost no wait;
most tests have them claim to live elsewhere, as in pipelines.
"""

from typing import Any

import pytest
import torch
from loops import denoise
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import h2cache
from h2cache import CacheConfig, Decision
from h2cache.adapters.base import Adapter, ModelCall

MEASURED_NOTHING = (Decision.WARMUP, Decision.FORCED)


class Waits(TorchFunctionMode):
    """Counts the calls by which a host would wait for a device, apart from scalar reads (`ScalarReads` has those)."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("tolist", "cpu", "numpy"):
            self.count += 1
        elif name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            self.count += 1  # a list that goes up to a device: a copy that blocks until the stream has run dry
        return function(*args, **kwargs)


class ScalarReads(TorchDispatchMode):
    """Counts reads of one number (`item`, `float`, `if tensor`), and operations whose result's shape is such a read."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().partition(".")[0] in self.WAITING:
            self.count += 1
        return function(*args, **(kwargs or {}))


class Elsewhere(torch.Tensor):
    """A tensor that says it lives on an accelerator."""

    device = torch.device("cuda")


def hide_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine see timesteps as on an accelerator, while the model gets the plain ones.

    There it may not read one when a call begins, only together with the first probe.
    """
    original = Adapter.model_call

    def model_call(self: Adapter, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ModelCall:
        seen = original(self, transformer, args, kwargs)
        return seen._replace(timestep=seen.timestep.as_subclass(Elsewhere))

    monkeypatch.setattr(Adapter, "model_call", model_call)


def waits_by_step(transformer, config: CacheConfig | None, **run) -> tuple[list[int], h2cache.Handle | None]:
    """For each call of the model, how often the host would have waited in it."""
    handle = h2cache.apply(transformer, config) if config else None
    functions, scalars = Waits(), ScalarReads()
    counts, before = [], 0

    class Watch:
        """Stands for the transformer in the loop, and counts around its calls."""

        config, device = transformer.config, transformer.device

        def __call__(self, **call):
            nonlocal before
            with functions, scalars:
                output = transformer(**call)
            counts.append(functions.count + scalars.count - before)
            before += counts[-1]
            return output

    try:
        denoise(Watch(), **run)
    finally:
        if handle:
            handle.remove()
    return counts, handle
