"""diffusers' `SanaTransformer2DModel`: Sana and Sana-Sprint."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, ModelCall, modulated_by_table, modules_named
from .block_call import BlockInterface
from .pixart import PER_SAMPLE

BLOCK = BlockInterface(streams=("hidden_states",), returns=None, per_sample=PER_SAMPLE)


class SanaAdapter(Adapter):
    """Sana: one list of blocks on the image tokens alone, called by position.

    - The text is only read, by cross-attention: no stream.
    - Self-attention is linear, and the MLP is convolutional: it takes and returns (B, D, height, width).
    - A block's `timestep` is the modulation, (B, 6 D), to which each block adds its own table.
    - Guidance is a doubled batch.
    - Where text encoder and transformer differ in type the pipeline casts the embeddings anew at every step. The
      prompt's mask stays, and names the run.
    """

    family = "Sana"
    classes = ("SanaTransformer2DModel",)
    block_lists = (BlockList("transformer_blocks", interface=BLOCK),)
    branch_arguments = ("encoder_hidden_states", "encoder_attention_mask")
    control_arguments = ("controlnet_block_samples",)

    def describe(self, given: dict[str, Any]) -> ModelCall:
        call = super().describe(given)
        return call._replace(branch=call.branch[-1:])  # the embeddings only where there is no mask

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        hidden_states, modulation = arguments["hidden_states"], arguments["timestep"].unflatten(1, (1, 6, -1))
        return modulated_by_table(block, hidden_states, modulation).type_as(hidden_states)

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn1", "attn2", "ff")
