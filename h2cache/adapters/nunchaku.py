"""nunchaku's quantized transformers: Flux, whose first generation (V1) is a C++ core and whose second (V2) has Python
blocks, Qwen-Image and Z-Image.

All classes are recognised by their name and module, so that nothing here imports nunchaku.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..policy.stages import ModuleStage, Stage
from .base import Adapter, BlockLoop, BlockModules, ModelCall, Role, RunBlocks
from .block_call import BlockCall, arguments_by_name, plain
from .flux import FluxAdapter
from .nunchaku_layers import Identity, ImagePrompt, LayerCall, Rotary, layers
from .qwen_image import QwenImageAdapter
from .z_image import ZImageAdapter

TILE = 256  # tokens that the kernels take at a time, and to a multiple of which rotary embeddings are padded
FRONT, IMAGE_ADAPTER = "NunchakuFluxTransformerBlocks", "IPA_TransformerBlocks"  # the modules in front of V1's core
SAMPLES = ((Role.STRUCTURE, "controlnet_block_samples"), (Role.DETAIL, "controlnet_single_block_samples"))


class NunchakuAdapter(Adapter):
    """A transformer with nunchaku's kernels.

    Class attributes:
        largest_batch: the number of samples that a call may have. With more the kernels end the process, which an error
            here prevents.
        hides_modules: why the modules inside a block cannot be skipped; empty where they can.
    """

    library = "nunchaku"
    largest_batch: int
    hides_modules = ""

    def check(self, stages: Sequence[Stage]) -> None:
        super().check(stages)
        for stage in stages:
            if not (self.hides_modules and isinstance(stage, ModuleStage)):
                continue
            if stage.clusters is None:
                refused, instead = "the modules inside a block cannot be skipped one by one", ""
            else:
                refused = "no cluster can refresh it (ClusCa)"
                instead = (
                    "H2CacheConfig, BlockCacheConfig or TeaCacheConfig, or TaylorSeerConfig or HiCacheConfig with "
                )
            raise ValueError(f'{self.family} {self.hides_modules}, so that {refused}: use {instead}granularity="stage"')

    def describe(self, given: dict[str, Any]) -> ModelCall:
        call = super().describe(given)
        if call.batch > self.largest_batch:
            raise ValueError(
                f"the kernels of {self.family} take a batch of at most {self.largest_batch}, not of {call.batch}: "
                "generate fewer images at a time, and without guidance where it doubles the batch"
            )
        return call


class NunchakuFluxV2(NunchakuAdapter, FluxAdapter):
    """`NunchakuFluxTransformer2DModelV2`: diffusers' transformer with blocks of its own, called as older diffusers'.

    A single block's MLP is one fused kernel that takes the weights of its layers and calls neither of them.
    """

    family = "nunchaku's FLUX.1 (NunchakuFluxTransformer2DModelV2)"
    classes = ("NunchakuFluxTransformer2DModelV2",)
    largest_batch = 1
    hides_modules = "fuses the MLP of a block into one kernel"


class NunchakuQwenImage(NunchakuAdapter, QwenImageAdapter):
    """`NunchakuQwenImageTransformer2DModel`: diffusers' transformer with blocks of its own."""

    family = "nunchaku's Qwen-Image (NunchakuQwenImageTransformer2DModel)"
    classes = ("NunchakuQwenImageTransformer2DModel",)
    largest_batch = 8


class NunchakuZImage(NunchakuAdapter, ZImageAdapter):
    """`NunchakuZImageTransformer2DModel`: diffusers' blocks with attention and MLPs of its own."""

    family = "nunchaku's Z-Image (NunchakuZImageTransformer2DModel)"
    classes = ("NunchakuZImageTransformer2DModel",)
    largest_batch = 1


class NunchakuFluxV1(NunchakuAdapter, FluxAdapter):
    """`NunchakuFluxTransformer2dModel`: all blocks in one C++ core, behind `transformer_blocks[0]`.

    The core runs single layers on demand, which is what the blocks here are (`nunchaku_layers.py`). Calls of the module
    in front of it are led through them, and the core is only asked for what is computed; where nothing has to be seen
    in between, for all layers behind the first at once.
    """

    family = "nunchaku's FLUX.1 (NunchakuFluxTransformer2dModel)"
    classes = ("NunchakuFluxTransformer2dModel",)
    largest_batch = 8
    hides_modules = "runs its blocks in one C++ core"

    def __init__(self) -> None:
        self._front: nn.Module | None = None
        self._lists: dict[Role, list[nn.Module]] = {}

    def blocks(self, transformer: nn.Module) -> dict[Role, list[nn.Module]]:
        front = front_of(transformer)
        counts = layer_counts(transformer)
        if self._front is not front or counts != tuple(map(len, self._lists.values())):
            double, single = layers(front.m, *counts)
            self._front, self._lists = front, {Role.STRUCTURE: double, Role.DETAIL: single}
        return self._lists

    def block_call(self, role: Role, block: nn.Module) -> BlockCall:
        return LayerCall(block)

    def modules(self, block: nn.Module) -> BlockModules:
        return BlockModules()

    def block_loops(self, transformer: nn.Module) -> dict[nn.Module, RunBlocks]:
        front = front_of(transformer)
        return {front: partial(self._run_blocks, front, transformer.config.num_attention_heads)}

    def _run_blocks(
        self,
        front: nn.Module,
        heads: int,
        loop: BlockLoop,
        original_forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """A call of the module in front of the core, block by block; it returns (text, image)."""
        given = arguments_by_name(front, args, kwargs)
        if left_to_nunchaku(front, given):
            return original_forward(*args, **kwargs)
        prompted = is_image_adapter(front)
        identity = None if prompted else identity_of(front, given)  # an IP-Adapter ignores it
        prompt = take_prompt(front, heads, given) if prompted else None
        image = given["hidden_states"]
        here, back = {"dtype": front.dtype, "device": front.device}, {"dtype": image.dtype, "device": image.device}
        streams = {name: given[name].to(**here) for name in ("encoder_hidden_states", "hidden_states")}
        common = {
            "temb": given["temb"].to(**here),
            "rotary": self._rotary(front, loop, given),
            "identity": identity,
            "prompt": prompt,
        }
        double, single = self._lists[Role.STRUCTURE], self._lists[Role.DETAIL]
        if loop.single_stage and len(single) and prompt is None:
            first, last = double[0], single[-1]
            text, image = first(**streams, **common)
            text, image = last(hidden_states=image, encoder_hidden_states=text, **common, rest=True)
        else:
            text, image = self._block_by_block(streams, additions_of(front, given), common)
        return text.to(**back), image.to(**back)

    def _block_by_block(
        self, streams: dict[str, Tensor], additions: dict[Role, list[Tensor]], common: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        text, image = streams["encoder_hidden_states"], streams["hidden_states"]
        for role, blocks in self._lists.items():
            samples = additions[role]
            interval = ceil(len(blocks) / len(samples)) if samples else 1
            for index, block in enumerate(blocks):
                text, image = block(hidden_states=image, encoder_hidden_states=text, **common)
                if samples:
                    image = image + samples[index // interval]
        return text, image

    def _rotary(self, front: nn.Module, loop: BlockLoop, given: dict[str, Any]) -> Rotary:
        """Packed once for all steps that are given the same table, which `runtime/rope_cache.py` sees to."""
        text_tokens, table = given["encoder_hidden_states"].shape[1], given["image_rotary_emb"]

        def pack() -> Rotary:
            rows = table.to(front.device)[0]  # (1, M+N, head_dim / 2, 1, 2)
            parts = rows[:, text_tokens:], rows[:, :text_tokens], rows
            return Rotary(*(front.pack_rotemb(padded(part)) for part in parts))

        return Rotary(*loop.once(text_tokens, (table,), pack))


def front_of(transformer: nn.Module) -> nn.Module:
    """The module in front of V1's core. TypeError where another cache has taken its place."""
    front = transformer.transformer_blocks[0] if len(transformer.transformer_blocks) else None
    if front is None or not (is_from_nunchaku(front, FRONT) or is_image_adapter(front)):
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


def is_from_nunchaku(module: nn.Module, name: str) -> bool:
    """Whether `module` is of nunchaku's class of this name, and of no subclass, which may do more than is known."""
    kind = type(plain(module))
    return kind.__name__ == name and kind.__module__.partition(".")[0] == "nunchaku"


def is_image_adapter(front: nn.Module) -> bool:
    """Whether an IP-Adapter stands in front of V1's core."""
    return is_from_nunchaku(front, IMAGE_ADAPTER)


def left_to_nunchaku(front: nn.Module, given: dict[str, Any]) -> bool:
    """Whether a call is let through: one that blocks cannot make up, or that nunchaku itself refuses.

    PuLID and IP-Adapter add to the tokens besides ControlNet's samples in an order that blocks do not have. An
    IP-Adapter wants an image prompt and takes one image at a time. A caller may have run the first layer itself.
    """
    with_samples = any(given.get(name) for _, name in SAMPLES)
    if is_image_adapter(front):
        return with_samples or given["hidden_states"].shape[0] > 1 or prompt_tokens(front, given) is None
    return bool(given.get("skip_first_layer")) or (with_samples and given.get("id_embeddings") is not None)


def prompt_tokens(front: nn.Module, given: dict[str, Any]) -> Sequence[Tensor] | None:
    """The image prompt of a call, in a list; None where there is none."""
    return (given.get("joint_attention_kwargs") or {}).get("ip_hidden_states", front.image_embeds)


def take_prompt(front: nn.Module, heads: int, given: dict[str, Any]) -> ImagePrompt:
    """What an IP-Adapter adds. Takes the prompt out of the caller's dictionary, as nunchaku does."""
    prompt = prompt_tokens(front, given)
    assert prompt is not None  # `left_to_nunchaku` lets other calls through
    tokens = prompt[0].to(dtype=front.dtype, device=front.device)
    (given.get("joint_attention_kwargs") or {}).pop("ip_hidden_states", None)
    return ImagePrompt(front.ip_k_projs, front.ip_v_projs, tokens, front.ip_adapter_scale, heads)


def additions_of(front: nn.Module, given: dict[str, Any]) -> dict[Role, list[Tensor]]:
    """ControlNet's samples for the two kinds of blocks, as the core would add them."""
    return {
        role: [sample.to(dtype=front.dtype, device=front.device) for sample in given.get(name) or ()]
        for role, name in SAMPLES
    }


def identity_of(front: nn.Module, given: dict[str, Any]) -> Identity | None:
    embeddings = given.get("id_embeddings")
    return None if embeddings is None else Identity(front.pulid_ca, embeddings, given["id_weight"])


def padded(table: Tensor) -> Tensor:
    """A rotary table (1, tokens, head_dim / 2, 1, 2) with zeros behind, up to a multiple of the tile."""
    return F.pad(table, (0, 0, 0, 0, 0, 0, 0, -table.shape[1] % TILE))
