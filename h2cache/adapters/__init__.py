"""Adapters: the only code that knows a transformer's class.

An adapter says where the blocks are, how a block is called, and which arguments of the model's call name the run. It
never copies a forward. `h2cache.register_adapter` adds one from outside; docs/models.md shows how.
"""

from torch import nn

from .base import Adapter, BlockList, BlockModules, Role
from .block_call import BlockInterface
from .chroma import ChromaAdapter
from .cogvideox import CogVideoXAdapter
from .dit import DiTAdapter
from .flux import FluxAdapter
from .flux2 import Flux2Adapter
from .hunyuan_image import HunyuanImageAdapter
from .hunyuan_video import HunyuanVideoAdapter
from .hunyuan_video15 import HunyuanVideo15Adapter
from .ltx import LTXAdapter
from .lumina2 import Lumina2Adapter
from .nunchaku import NunchakuFluxV1, NunchakuFluxV2, NunchakuQwenImage, NunchakuZImage
from .pixart import PixArtAdapter
from .qwen_image import QwenImageAdapter
from .sana import SanaAdapter
from .sd3 import SD3Adapter
from .wan import WanAdapter
from .z_image import ZImageAdapter

__all__ = [
    "Adapter",
    "BlockInterface",
    "BlockList",
    "BlockModules",
    "Role",
    "adapter_of",
    "register_adapter",
    "transformers_of",
]

# A class before its base: nunchaku's transformers are subclasses of diffusers'.
BUILT_IN: tuple[type[Adapter], ...] = (
    NunchakuFluxV1,
    NunchakuFluxV2,
    NunchakuQwenImage,
    NunchakuZImage,
    ChromaAdapter,
    CogVideoXAdapter,
    DiTAdapter,
    FluxAdapter,
    Flux2Adapter,
    HunyuanImageAdapter,
    HunyuanVideoAdapter,
    HunyuanVideo15Adapter,
    LTXAdapter,
    Lumina2Adapter,
    PixArtAdapter,
    QwenImageAdapter,
    SanaAdapter,
    SD3Adapter,
    WanAdapter,
    ZImageAdapter,
)


class Registry:
    """The adapters that `h2cache.register_adapter` added, the newest first."""

    added: tuple[type[Adapter], ...] = ()


def register_adapter(adapter: type[Adapter]) -> type[Adapter]:
    """Let `h2cache.apply` serve a further family of transformers. Also a class decorator.

    Args:
        adapter: a subclass of `h2cache.adapters.Adapter`. It is asked before the built-in ones, and before those that
            were registered earlier; registering it again changes nothing.

    Returns:
        The same class.

    Raises:
        TypeError: for anything but such a subclass, or one that names no family.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise TypeError(f"h2cache.register_adapter got {adapter!r}: pass a subclass of h2cache.adapters.Adapter")
    if not getattr(adapter, "family", ""):
        raise TypeError(f"{adapter.__name__} names no family: give it a class attribute `family`, for messages")
    Registry.added = (adapter, *(known for known in Registry.added if known is not adapter))
    return adapter


def transformers_of(target: object) -> list[object]:
    """A transformer itself, or those of a pipeline, which may have two, each for a part of the steps."""
    if isinstance(target, nn.Module):
        return [target]
    parts = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
    return [part for part in parts if part is not None] or [target]


def adapter_of(transformer: object, pipeline: object = None) -> Adapter:
    """An adapter for `transformer`, made for this application of a cache.

    Args:
        transformer: any object.
        pipeline: what it was found in, for the message; the transformer itself or None where it was in nothing.

    Raises:
        TypeError: where no adapter knows it, naming what is supported.
    """
    kinds = (*Registry.added, *BUILT_IN)
    for adapter in (kind() for kind in kinds):
        if adapter.supports(transformer):
            return adapter
    supported = ", ".join(dict.fromkeys(kind.family for kind in kinds))
    given = type(transformer).__name__
    if pipeline is not None and pipeline is not transformer:
        given = f"{type(pipeline).__name__} with a {given}"
    raise TypeError(
        f"h2cache.apply got a {given}: it knows the blocks of {supported}, and "
        "diffusers pipelines with such a transformer. For a U-Net or an unknown class use fewer steps of a better "
        "solver, such as diffusers' UniPCMultistepScheduler; docs/models.md shows how to add a family with "
        "h2cache.register_adapter"
    )
