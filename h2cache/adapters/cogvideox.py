"""diffusers' `CogVideoXTransformer3DModel`."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, modules_named
from .block_call import BlockInterface

BLOCK = BlockInterface(returns=(0, 1), per_sample=("temb",))


class CogVideoXAdapter(Adapter):
    """CogVideoX 1.0 and 1.5, text, image or video to video: one list of blocks, which return (H, E).

    - Guidance is a doubled batch.
    - The model predicts v, and its timesteps are whole numbers; its DPM solver adds noise at each step.
    - One MLP takes [text; image], joined along the tokens: it is neither an image nor a text MLP.
    - The rotary table is made for each run by the pipeline; the 2B model has none.
    """

    family = "CogVideoX"
    classes = ("CogVideoXTransformer3DModel",)
    block_lists = (BlockList("transformer_blocks", interface=BLOCK),)
    run_arguments = ("image_rotary_emb",)

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        names = ("hidden_states", "encoder_hidden_states", "temb")
        return block.norm1(*(arguments[name] for name in names))[0]

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn1", "ff")
