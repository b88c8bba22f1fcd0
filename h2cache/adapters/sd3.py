"""diffusers' `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5."""

from typing import Any

from torch import nn

from .base import Adapter, BlockList, BlockModules, ModelCall, Role, modules_named
from .block_call import BlockCall, BlockInterface, plain

PER_SAMPLE = ("temb", "joint_attention_kwargs")
BLOCK = BlockInterface(per_sample=PER_SAMPLE)
LAST = BlockInterface(returns=(None, 0), per_sample=PER_SAMPLE)


class SD3Adapter(Adapter):
    """Stable Diffusion 3 and 3.5: one list of joint blocks.

    - The last block only reads the text, and returns None in its place.
    - The first blocks of 3.5 medium have a second attention, of the image to itself.
    - Guidance is a doubled batch.
    - ControlNet samples are added after every block but the last.
    - Skip-layer guidance leaves blocks out of a call, so that a stage may have no beginning or no end.
    """

    family = "Stable Diffusion 3"
    classes = ("SD3Transformer2DModel",)
    block_lists = (BlockList("transformer_blocks", interface=BLOCK),)
    branch_arguments = ("encoder_hidden_states", "pooled_projections")
    control_arguments = ("block_controlnet_hidden_states",)

    def block_call(self, role: Role, block: nn.Module) -> BlockCall:
        return BlockCall(block, LAST if plain(block).context_pre_only else BLOCK)

    def describe(self, given: dict[str, Any]) -> ModelCall:
        if given.get("skip_layers"):
            raise ValueError(
                "skip_layers leaves blocks out that a cache counts on: call the pipeline without skip_guidance_layers, "
                "or remove the cache"
            )
        return super().describe(given)

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn", "attn2", image_mlp="ff", text_mlp="ff_context")
