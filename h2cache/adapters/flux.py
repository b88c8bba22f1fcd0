"""FLUX.1: diffusers' `FluxTransformer2DModel`, its subclasses and quantized forms whose blocks are called alike."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, Role, double_or_single
from .block_call import BlockCall, BlockInterface, JoinedBlockCall, parameter_names

# The classes whose tables depend on the position ids alone; nunchaku's are V1's and V2's.
ROTARY = (("diffusers", "FluxPosEmbed"), ("nunchaku", "EmbedND"), ("nunchaku", "NunchakuFluxPosEmbed"))
PER_SAMPLE = ("temb", "joint_attention_kwargs", "attention_mask")
JOINT = BlockInterface(per_sample=PER_SAMPLE)
JOINED = BlockInterface(streams=("hidden_states",), returns=None, per_sample=PER_SAMPLE, joined=True)


class FluxAdapter(Adapter):
    """Double blocks in `transformer_blocks` (structure), single blocks in `single_transformer_blocks` (detail)."""

    family = "FLUX.1"
    classes = ("FluxTransformer2DModel",)
    block_lists = (
        BlockList("transformer_blocks", Role.STRUCTURE, JOINT),
        BlockList("single_transformer_blocks", Role.DETAIL, JOINT),
    )
    run_arguments = ("img_ids",)
    branch_arguments: tuple[str, ...] = ("encoder_hidden_states", "pooled_projections")
    text_argument = "encoder_hidden_states"
    control_arguments = ("controlnet_block_samples", "controlnet_single_block_samples")
    timestep_scale = 1000.0
    polynomial_family: str | None = "FLUX.1"  # nunchaku's subclasses have the same weights, quantized

    def block_call(self, role: Role, block: nn.Module) -> BlockCall:
        # Single blocks take both streams in today's diffusers, and one joined tensor in older and quantized ones.
        if "encoder_hidden_states" in parameter_names(block):
            return BlockCall(block, JOINT)
        return JoinedBlockCall(block, JOINED)

    def modules(self, block: nn.Module) -> BlockModules:
        return double_or_single(block)

    def position_modules(self, transformer: nn.Module) -> Sequence[nn.Module]:
        # By class, for there are embeddings that take this one's place and follow the timestep.
        positions = getattr(transformer, "pos_embed", None)
        kind = type(positions)
        return [positions] if (kind.__module__.partition(".")[0], kind.__name__) in ROTARY else []

    def position_ids(self, given: dict[str, Any]) -> tuple[Tensor | None, ...]:
        return given["img_ids"], given.get("txt_ids")
