"""diffusers' `DiTTransformer2DModel`: DiT-XL/2."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, modules_named
from .block_call import BlockInterface

BLOCK = BlockInterface(streams=("hidden_states",), returns=None, per_sample=("timestep", "class_labels"))


class DiTAdapter(Adapter):
    """DiT: one list of blocks on the image tokens; class labels in the place of a text.

    - Each block embeds timestep and label itself, and takes both as they are, (B,).
    - Guidance is a doubled batch, labels first.
    - The output has the channels of the noise and those of its variance.
    """

    family = "DiT"
    classes = ("DiTTransformer2DModel",)
    block_lists = (BlockList("transformer_blocks", interface=BLOCK),)
    branch_arguments = ("class_labels",)

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        hidden_states = arguments["hidden_states"]
        return block.norm1(
            hidden_states, arguments["timestep"], arguments["class_labels"], hidden_dtype=hidden_states.dtype
        )[0]

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn1", image_mlp="ff")
