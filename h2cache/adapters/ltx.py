"""diffusers' `LTXVideoTransformer3DModel`."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, modulated_by_table, modules_named
from .block_call import BlockInterface

BLOCK = BlockInterface(
    streams=("hidden_states",),
    returns=None,
    per_sample=("encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask"),
)


class LTXAdapter(Adapter):
    """LTX-Video, text or image to video: one list of blocks on the video tokens alone.

    - The text is only read, by cross-attention: no stream.
    - Guidance is a doubled batch.
    - The rotary table has a batch dimension.
    - With an image the model gets a timestep per token: smaller, or 0, for those that are given.
    - What scales the positions is made for each run: a tuple of numbers, or the positions themselves.
    """

    family = "LTX-Video"
    classes = ("LTXVideoTransformer3DModel",)
    block_lists = (BlockList("transformer_blocks", interface=BLOCK),)
    run_arguments = ("video_coords", "rope_interpolation_scale")

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        return modulated_by_table(block, arguments["hidden_states"], arguments["temb"].unflatten(2, (6, -1)))

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn1", "attn2", image_mlp="ff")
