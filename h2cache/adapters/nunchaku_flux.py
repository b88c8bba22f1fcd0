"""nunchaku's quantized Flux: the C++ core of its first generation (V1) and the Python blocks of its second (V2).

Both classes are recognised by their name and module, so that nothing here imports nunchaku.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..stages import Stage
from ..streams import BlockCall, parameter_names
from .base import BlockModules, Lead, Passage
from .diffusers_flux import DiffusersFlux, onload
from .nunchaku_layers import Identity, LayerCall, Rotary, layers

HOME = "nunchaku.models.transformers"
TILE = 256  # tokens that the kernels take at a time, and to a multiple of which rotary embeddings are padded


def is_class_of_nunchaku(module: object, name: str) -> bool:
    """Whether `module` is an instance of nunchaku's class `name` or of a subclass."""
    return any(kind.__name__ == name and kind.__module__.startswith(HOME) for kind in type(module).__mro__)


class NunchakuFluxV2(DiffusersFlux):
    """`NunchakuFluxTransformer2DModelV2`: diffusers' transformer with blocks of its own, called as older diffusers'.

    A single block's MLP is one fused kernel that takes the weights of its layers and calls neither of them.
    """

    supported = "nunchaku's NunchakuFluxTransformer2DModelV2"

    def supports(self, module: object) -> bool:
        return is_class_of_nunchaku(module, "NunchakuFluxTransformer2DModelV2")

    def check(self, stages: Sequence[Stage]) -> None:
        refuse_modules(stages, self.supported, "fuses the MLP of a block into one kernel")


class NunchakuFluxV1(DiffusersFlux):
    """`NunchakuFluxTransformer2dModel`: all blocks in one C++ core, behind `transformer_blocks[0]`.

    The core runs single layers on demand, which is what the blocks here are (`nunchaku_layers.py`). Calls of the module
    in front of it are led through them, and the core is only asked for what is computed; where nothing has to be seen
    in between, for all layers behind the first at once.
    """

    supported = "nunchaku's NunchakuFluxTransformer2dModel"

    def __init__(self) -> None:
        self._core: Any = None
        self._groups: dict[str, list[nn.Module]] = {}

    def supports(self, module: object) -> bool:
        return is_class_of_nunchaku(module, "NunchakuFluxTransformer2dModel")

    def check(self, stages: Sequence[Stage]) -> None:
        refuse_modules(stages, self.supported, "runs its blocks in one C++ core")

    def groups(self, transformer: nn.Module) -> dict[str, list[nn.Module]]:
        front = front_of(transformer)
        counts = layer_counts(transformer)
        if self._core is not front.m or counts != tuple(map(len, self._groups.values())):
            self._core, self._groups = front.m, layers(front.m, *counts)
        return self._groups

    def block_call(self, block: nn.Module) -> BlockCall:
        return LayerCall(block, onload)

    def modules(self, block: nn.Module) -> BlockModules:
        return BlockModules(forecast=())

    def led(self, transformer: nn.Module) -> dict[nn.Module, Lead]:
        front = front_of(transformer)
        return {front: partial(self._lead, front)}

    def _lead(self, front: nn.Module, passage: Passage, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the module in front of the core, block by block; it returns (text, image).

        A caller that ran the first layer itself, or that adds ControlNet's samples as well as PuLID's, in an order that
        blocks do not have, is let through.
        """
        given = dict(zip(parameter_names(front), args, strict=False)) | kwargs
        identity = identity_of(front, given)
        additions = self._additions(given, front)
        if given.get("skip_first_layer") or (identity is not None and any(additions.values())):
            return proceed(*args, **kwargs)
        image = given["hidden_states"]
        here, back = {"dtype": front.dtype, "device": front.device}, {"dtype": image.dtype, "device": image.device}
        streams = {name: given[name].to(**here) for name in ("encoder_hidden_states", "hidden_states")}
        common = {
            "temb": given["temb"].to(**here),
            "rotary": self._rotary(front, passage, given),
            "identity": identity,
        }
        if passage.undivided and len(self._groups["single"]):
            first, last = self._groups["double"][0], self._groups["single"][-1]
            text, image = first(**streams, **common)
            text, image = last(hidden_states=image, encoder_hidden_states=text, **common, rest=True)
        else:
            text, image = self._block_by_block(streams, additions, common)
        return text.to(**back), image.to(**back)

    def _block_by_block(
        self, streams: dict[str, Tensor], additions: dict[str, list[Tensor]], common: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        text, image = streams["encoder_hidden_states"], streams["hidden_states"]
        for kind, blocks in self._groups.items():
            samples = additions[kind]
            interval = ceil(len(blocks) / len(samples)) if samples else 1
            for index, block in enumerate(blocks):
                text, image = block(hidden_states=image, encoder_hidden_states=text, **common)
                if samples:
                    image = image + samples[index // interval]
        return text, image

    def _additions(self, given: dict[str, Any], front: nn.Module) -> dict[str, list[Tensor]]:
        """ControlNet's samples for the two kinds of blocks, as the core would add them."""
        names = {"double": "controlnet_block_samples", "single": "controlnet_single_block_samples"}
        return {
            kind: [sample.to(dtype=front.dtype, device=front.device) for sample in given.get(name) or ()]
            for kind, name in names.items()
        }

    def _rotary(self, front: nn.Module, passage: Passage, given: dict[str, Any]) -> Rotary:
        """Packed once for all steps of the run that have as many text tokens, as long as its position ids stay."""
        text_tokens = given["encoder_hidden_states"].shape[1]

        def pack() -> Rotary:
            table = given["image_rotary_emb"].to(front.device)[0]  # (1, M+N, head_dim / 2, 1, 2)
            parts = table[:, text_tokens:], table[:, :text_tokens], table
            return Rotary(*(front.pack_rotemb(padded(part)) for part in parts))

        return passage.once(text_tokens, (passage.denoising.img_ids, passage.denoising.txt_ids), pack)


def front_of(transformer: nn.Module) -> nn.Module:
    """The module in front of V1's core. TypeError where another cache has taken its place."""
    front = transformer.transformer_blocks[0] if len(transformer.transformer_blocks) else None
    if not hasattr(front, "m"):
        raise TypeError(
            "the blocks of this NunchakuFluxTransformer2dModel are not nunchaku's own: load its weights, and take off "
            "other caches, such as nunchaku's, before h2cache.apply"
        )
    return front


def layer_counts(transformer: nn.Module) -> tuple[int, int]:
    """How many double and single layers the core has. ValueError where config and weights disagree."""
    counts = transformer.config.num_layers, transformer.config.num_single_layers
    weights = getattr(transformer, "_quantized_part_sd", None) or ()
    names = [name.split(".") for name in weights]
    loaded = tuple(
        len({name[1] for name in names if name[0] == kind})
        for kind in ("transformer_blocks", "single_transformer_blocks")
    )
    if any(loaded) and loaded != counts:
        raise ValueError(
            f"the transformer's config names {counts[0]} double and {counts[1]} single blocks, but weights of "
            f"{loaded[0]} and {loaded[1]} were loaded: load a checkpoint whose config belongs to its weights"
        )
    return counts


def identity_of(front: nn.Module, given: dict[str, Any]) -> Identity | None:
    embeddings = given.get("id_embeddings")
    return None if embeddings is None else Identity(front.pulid_ca, embeddings, given["id_weight"])


def padded(table: Tensor) -> Tensor:
    """A rotary table (1, tokens, head_dim / 2, 1, 2) with zeros behind, up to a multiple of the tile."""
    return F.pad(table, (0, 0, 0, 0, 0, 0, 0, -table.shape[1] % TILE))


def refuse_modules(stages: Sequence[Stage], model: str, reason: str) -> None:
    """ValueError for a method that skips modules inside blocks, naming what is there instead."""
    for stage in stages:
        if stage.clusters is not None:
            raise ValueError(
                f"{model} {reason}, so that no cluster can refresh it (ClusCa): use H2CacheConfig, BlockCacheConfig or "
                'TeaCacheConfig, or TaylorSeerConfig or HiCacheConfig with granularity="stage"'
            )
        if stage.modules:
            raise ValueError(
                f"{model} {reason}, so that the modules inside a block cannot be skipped one by one: use "
                'granularity="stage"'
            )
