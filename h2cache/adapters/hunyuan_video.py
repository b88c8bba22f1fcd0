"""diffusers' `HunyuanVideoTransformer3DModel`: text to video, and image to video in both its ways."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, Role, double_or_single
from .block_call import BlockInterface, parameter_names

BLOCK = BlockInterface(returns=(0, 1), per_sample=("temb", "attention_mask", "token_replace_emb"))


class HunyuanVideoAdapter(Adapter):
    """HunyuanVideo: blocks in `transformer_blocks` (double) and `single_transformer_blocks` (single).

    - The model gives the blocks their arguments by position, and both kinds return (H, E).
    - The text is refined with the timestep before the first block: it differs from step to step.
    - The model of the `token_replace` kind embeds a second timestep, 0, for the tokens of the first frame:
      `token_replace_emb`, of which those are the first `num_tokens`. Other blocks ignore both.
    - An attention of a single block returns two tensors, (image, text), though it only feeds `proj_out`.
    - `guidance` is made for each run, and is the same in both branches of guidance; None for some models.
    """

    family = "HunyuanVideo"
    classes = ("HunyuanVideoTransformer3DModel",)
    block_lists = (
        BlockList("transformer_blocks", Role.STRUCTURE, BLOCK),
        BlockList("single_transformer_blocks", Role.DETAIL, BLOCK),
    )
    run_arguments = ("guidance",)
    branch_arguments = ("encoder_hidden_states", "pooled_projections")

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        if "token_replace_emb" not in parameter_names(block):
            return super().modulated(block, arguments)
        names = ("hidden_states", "temb", "token_replace_emb", "num_tokens")
        return block.norm1(*(arguments[name] for name in names))[0]

    def modules(self, block: nn.Module) -> BlockModules:
        return double_or_single(block)
