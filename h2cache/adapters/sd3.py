"""diffusers' `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5."""

from typing import Any

from torch import nn

from .base import Adapter, BlockList, BlockModules, ModelCall, Role
from .block_call import BlockCall, BlockInterface, parameter_names, plain

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

    def model_call(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ModelCall:
        given = dict(zip(parameter_names(transformer), args, strict=False)) | kwargs
        if given.get("skip_layers"):
            raise ValueError(
                "skip_layers leaves blocks out that a cache counts on: call the pipeline without skip_guidance_layers, "
                "or remove the cache"
            )
        return super().model_call(transformer, (), given)

    def modules(self, block: nn.Module) -> BlockModules:
        inside = plain(block)
        modules = (inside.attn, inside.attn2, inside.ff, inside.ff_context)
        return BlockModules(
            forecast=tuple(module for module in modules if module is not None),
            image_mlp=inside.ff,
            text_mlp=inside.ff_context,
        )
