"""diffusers' `HunyuanImageTransformer2DModel`."""

from torch import nn

from .base import Adapter, BlockList, BlockModules, Role, double_or_single
from .block_call import BlockInterface

BLOCK = BlockInterface(returns=(0, 1), per_sample=("temb", "attention_mask"))


class HunyuanImageAdapter(Adapter):
    """HunyuanImage 2.1 and its refiner: double blocks (structure), then single blocks (detail).

    - Every block takes both streams by position and returns them image first; single blocks join them inside, image
      first.
    - The text is refined with the timestep before the blocks, so that it is another at each step.
    - `attention_mask` is (B, 1, 1, image + text).
    - Guidance is two calls a step, in the order of the pipeline's guider; distilled models have one.
    """

    family = "HunyuanImage"
    classes = ("HunyuanImageTransformer2DModel",)
    block_lists = (
        BlockList("transformer_blocks", Role.STRUCTURE, BLOCK),
        BlockList("single_transformer_blocks", Role.DETAIL, BLOCK),
    )
    branch_arguments = ("encoder_hidden_states", "encoder_hidden_states_2")

    def modules(self, block: nn.Module) -> BlockModules:
        return double_or_single(block)
