"""Adapters: the only code that knows a transformer's class.

An adapter says where the blocks are, how a block is called, and which arguments of the model's call name the run. It
never copies a forward. To support another transformer, write one and add it to `ADAPTERS`.
"""

import torch

from ..interception import is_compiled
from .base import Adapter, BlockModules, Denoising, Lead, Passage
from .diffusers_flux import DiffusersFlux
from .nunchaku_flux import NunchakuFluxV1, NunchakuFluxV2

__all__ = ["Adapter", "BlockModules", "Denoising", "Lead", "Passage", "find_adapter"]

# nunchaku's transformers are subclasses of diffusers'.
ADAPTERS: tuple[type[Adapter], ...] = (NunchakuFluxV1, NunchakuFluxV2, DiffusersFlux)


def find_adapter(target: object) -> tuple[torch.nn.Module, Adapter]:
    """The transformer in `target` (a pipeline or the transformer itself) and its adapter.

    TypeError for anything else, naming what is supported.
    """
    transformer = target if isinstance(target, torch.nn.Module) else getattr(target, "transformer", None)
    if hasattr(transformer, "_orig_mod") or is_compiled(transformer):
        raise TypeError(
            "h2cache.apply got a transformer that was compiled as a whole, which would compile the cache's decisions "
            "away: pass the plain transformer and compile its blocks with transformer.compile_repeated_blocks()"
        )
    for adapter in (kind() for kind in ADAPTERS):
        if adapter.supports(transformer):
            return transformer, adapter
    supported = ", ".join(adapter.supported for adapter in ADAPTERS)
    raise TypeError(
        f"h2cache.apply got a {type(target).__name__}: it supports {supported}, or a diffusers pipeline with such a "
        "transformer"
    )
