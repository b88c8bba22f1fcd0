"""Caches of other libraries on the same transformer: two caches would stack, and neither would know."""

from collections.abc import Callable, Iterator

from torch import nn

# Of the files in diffusers.hooks, those that hold a cache end in this, or are this one.
DIFFUSERS_CACHES = ("_cache", "pyramid_attention_broadcast")
# The modules that the forwards of nunchaku's caches are from. They may lie below that of an IP-Adapter or of a hook.
NUNCHAKU_TEACACHE, NUNCHAKU_CACHES = "nunchaku.caching.teacache", "nunchaku.caching."
FORGET = "transformer._is_cached = False"  # nunchaku leaves this on what was cached once


def refuse_other_caches(transformer: nn.Module) -> None:
    """Raise RuntimeError, with the call that removes it, where another library's cache shows on the transformer.

    A few look-ups, for every call of the model.
    """
    removal = removal_of_nunchaku_cache(transformer)
    if removal is not None:
        refuse(transformer, "one of nunchaku's own caches", removal)
    known = vars(transformer)  # what is not there would be looked for in the model's configuration too
    if known.get("_cache_config") is not None:
        refuse(transformer, "diffusers' own cache enabled", "transformer.disable_cache()")
    if known.get("_is_cached"):
        manager = known.get("_context_manager")
        if type(manager).__module__.startswith("cache_dit."):
            enabled_on = "transformer" if getattr(manager, "persistent_context", False) else "pipe"
            refuse(transformer, "a cache of cache-dit", f"cache_dit.disable_cache({enabled_on})")
        refuse(transformer, "another library's cache", "loading the transformer anew")


def refuse_hooked_caches(transformer: nn.Module) -> None:
    """The same where a cache of diffusers was applied without `enable_cache`, which shows on its hooks alone.

    Looks at every module, once a run.
    """
    found, modules = [], [transformer]
    for module in modules:  # `transformer.modules()` makes a name for each, and takes eight times as long
        modules += [child for child in module._modules.values() if child is not None]  # a compiled one has no truth
        registry = vars(module).get("_diffusers_hook")
        for name, hook in registry.hooks.items() if registry is not None else ():
            if type(hook).__module__.startswith("diffusers.") and type(hook).__module__.endswith(DIFFUSERS_CACHES):
                found.append(name)
    if found:
        registry = "diffusers.hooks.HookRegistry.check_if_exists_or_initialize(transformer)"
        names = " and ".join(map(repr, dict.fromkeys(found)))
        refuse(transformer, "hooks of diffusers' own cache", f"{registry}.remove_hook(name) for {names}")


def refuse(transformer: nn.Module, what: str, removal: str) -> None:
    raise RuntimeError(
        f"{type(transformer).__name__} has {what}, and two caches do not work together: remove one, by {removal} or by "
        "handle.remove()"
    )


def removal_of_nunchaku_cache(transformer: nn.Module) -> str | None:
    """The code that removes one of nunchaku's caches from the transformer; None where there is none."""
    for forward in forwards_on(transformer):
        module = getattr(forward, "__globals__", {}).get("__name__", "")
        if module == NUNCHAKU_TEACACHE:
            return "leaving the block of `with TeaCache(...)`"
        if module.startswith(NUNCHAKU_CACHES):
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
