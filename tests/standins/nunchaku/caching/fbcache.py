"""First-block cache: what is kept during a pipeline's call, and the decision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

Streams = dict[str, Tensor]

_current_cache_context: "CacheContext | None" = None


@dataclass
class CacheContext:
    """Tensors by name, for one run."""

    buffers: dict[str, Tensor] = field(default_factory=dict)


def create_cache_context() -> CacheContext:
    return CacheContext()


def get_current_cache_context() -> CacheContext | None:
    return _current_cache_context


@contextmanager
def cache_context(context: CacheContext) -> Iterator[None]:
    """While open, every cached transformer keeps its tensors in `context`."""
    global _current_cache_context
    before, _current_cache_context = _current_cache_context, context
    try:
        yield
    finally:
        _current_cache_context = before


def _buffers() -> dict[str, Tensor]:
    if _current_cache_context is None:
        raise AssertionError("cache_context must be set before")
    return _current_cache_context.buffers


def check_and_apply_cache(
    *, first_residual: Tensor, streams: Streams, threshold: float, mode: str, call_remaining_fn: Callable[..., Streams]
) -> Streams:
    """The streams behind the remaining blocks of `mode`, "multi" or "single": with kept residuals, or computed.

    A hit is a relative L1 difference of the first block's residual below `threshold`.
    """
    buffers = _buffers()
    previous = buffers.get(f"first_{mode}_hidden_states_residual")
    if previous is not None and (previous - first_residual).abs().mean() / previous.abs().mean() < threshold:
        return {name: (stream + buffers[f"{mode}_{name}_residual"]).contiguous() for name, stream in streams.items()}
    buffers[f"first_{mode}_hidden_states_residual"] = first_residual
    computed = call_remaining_fn(**streams)
    for name, stream in streams.items():
        buffers[f"{mode}_{name}_residual"] = computed[name] - stream
    return computed
