"""diffusers' `PixArtTransformer2DModel`: PixArt-alpha and -sigma."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, modulated_by_table, modules_named
from .block_call import BlockInterface

PER_SAMPLE = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep")
BLOCK = BlockInterface(streams=("hidden_states",), returns=None, per_sample=(*PER_SAMPLE, "cross_attention_kwargs"))


class PixArtAdapter(Adapter):
    """PixArt-alpha and -sigma: one list of blocks on the image tokens alone.

    - The text is only read, by cross-attention: no stream.
    - A block's `timestep` is the modulation, (B, 6 D), to which each block adds its own table.
    - Guidance is a doubled batch.
    """

    family = "PixArt"
    classes = ("PixArtTransformer2DModel",)
    block_lists = (BlockList("transformer_blocks", interface=BLOCK),)

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        return modulated_by_table(block, arguments["hidden_states"], arguments["timestep"].unflatten(1, (1, 6, -1)))

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn1", "attn2", image_mlp="ff")
