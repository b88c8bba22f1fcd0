"""nunchaku's own caches, as they show on a transformer.

All of them put another forward on it, which may lie below that of an IP-Adapter or of a hook.
"""

from collections.abc import Callable, Iterator

from torch import nn

TEACACHE, CACHES = "nunchaku.caching.teacache", "nunchaku.caching."  # the modules that these forwards are from
FORGET = "transformer._is_cached = False"  # nunchaku leaves this on what was cached once


def removal_of_nunchaku_cache(transformer: nn.Module) -> str | None:
    """The code that removes one of nunchaku's caches from the transformer; None where there is none."""
    for forward in forwards_on(transformer):
        module = getattr(forward, "__globals__", {}).get("__name__", "")
        if module == TEACACHE:
            return "leaving the block of `with TeaCache(...)`"
        if module.startswith(CACHES):
            return f"transformer.forward = transformer._original_forward and {FORGET}"
    if vars(transformer).get("_is_cached") and is_inside_ip_adapter(transformer):
        return f"transformer.transformer_blocks[0].update_residual_diff_threshold(False, -1, -1) and {FORGET}"
    return None


def forwards_on(transformer: nn.Module) -> Iterator[Callable]:
    """What was put in the place of the class's forward on this instance, the outermost first."""
    forward = vars(transformer).get("forward")
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None)


def is_inside_ip_adapter(transformer: nn.Module) -> bool:
    """Whether an IP-Adapter has taken over a cache that had run on the transformer."""
    front = next(iter(transformer._modules.get("transformer_blocks") or ()), None)
    return getattr(front, "residual_diff_threshold_multi", 0) > 0
