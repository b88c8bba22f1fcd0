"""diffusers' `Flux2Transformer2DModel`: FLUX.2 dev and klein."""

import copy
from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, Role, modules_named
from .block_call import BlockCall, BlockInterface, JoinedBlockCall, Rows, select_rows

DOUBLE = BlockInterface(per_sample=("temb_mod_img", "temb_mod_txt", "joint_attention_kwargs"))
SINGLE = BlockInterface(
    streams=("hidden_states",), returns=None, per_sample=("temb_mod", "joint_attention_kwargs"), joined=True
)


class Flux2Adapter(Adapter):
    """FLUX.2: double blocks in `transformer_blocks` (structure), single ones in `single_transformer_blocks` (detail).

    - A single block takes and returns one tensor, [text; image], and modulates both with the image's `temb_mod`.
    - The modulation is made once for all blocks of a list, (B, 6 D) or (B, 3 D): the blocks hold only norms.
    - With reference images the pipeline joins the position ids anew at every step, so that they name no run; the
      embeddings are made for each run.
    - The rotary table is made by one module in two calls, for the image and for the text, so that one result cannot
      stand for both.
    - klein's `kv_cache`: the first step has the tokens of the reference images, and its blocks fill the cache, which is
      in `joint_attention_kwargs`. The other steps read it. As their shape is another, they are a run of their own.
    """

    family = "FLUX.2"
    classes = ("Flux2Transformer2DModel",)
    block_lists = (
        BlockList("transformer_blocks", Role.STRUCTURE, DOUBLE),
        BlockList("single_transformer_blocks", Role.DETAIL, SINGLE),
    )
    text_argument = "encoder_hidden_states"
    timestep_scale = 1000.0

    def block_call(self, role: Role, block: nn.Module) -> BlockCall:
        return Flux2BlockCall(block, DOUBLE) if role is Role.STRUCTURE else Flux2JoinedBlockCall(block, SINGLE)

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        modulation = arguments[
            "temb_mod_img"
        ]  # (B, 6 D), or (B, N, 6 D) where reference tokens have their own timestep
        shift, scale = (modulation if modulation.ndim == 3 else modulation.unsqueeze(1)).chunk(6, dim=-1)[:2]
        return (1 + scale) * block.norm1(arguments["hidden_states"]) + shift

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn", image_mlp="ff", text_mlp="ff_context")


class Flux2BlockCall(BlockCall):
    """A block's call, with the samples of the layer's `kv_cache` where there is one."""

    def select(self, arguments: dict[str, Any], rows: Rows, batch: int) -> dict[str, Any]:
        selected = super().select(arguments, rows, batch)
        attention = selected.get("joint_attention_kwargs") or {}
        layer = attention.get("kv_cache")
        if layer is None or layer.k_ref is None:
            return selected
        layer = copy.copy(layer)
        layer.k_ref, layer.v_ref = select_rows([layer.k_ref, layer.v_ref], rows, batch)
        return selected | {"joint_attention_kwargs": attention | {"kv_cache": layer}}


class Flux2JoinedBlockCall(Flux2BlockCall, JoinedBlockCall):
    """The same of a single block."""
