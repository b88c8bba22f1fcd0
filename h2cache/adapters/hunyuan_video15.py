"""diffusers' `HunyuanVideo15Transformer3DModel`."""

from torch import nn

from .base import Adapter, BlockList, BlockModules, modules_named
from .block_call import BlockInterface

BLOCK = BlockInterface(returns=(0, 1), per_sample=("temb", "attention_mask"))


class HunyuanVideo15Adapter(Adapter):
    """HunyuanVideo-1.5, text or image to video: one list of double blocks, which return (H, E).

    - E holds the tokens of the image, of the glyphs and of the prompt, in each sample the valid ones first.
    - The text is refined with the timestep before the first block: it differs from step to step.
    - `image_embeds` is made for each run, also where there is no image (zeros), and is the same in both branches.
    """

    family = "HunyuanVideo-1.5"
    classes = ("HunyuanVideo15Transformer3DModel",)
    block_lists = (BlockList("transformer_blocks", interface=BLOCK),)
    run_arguments = ("image_embeds",)
    branch_arguments = ("encoder_hidden_states", "encoder_hidden_states_2")

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn", image_mlp="ff", text_mlp="ff_context")
