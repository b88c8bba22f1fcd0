"""diffusers' `WanTransformer3DModel`: Wan 2.1 and 2.2."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, modulated_by_table, modules_named
from .block_call import BlockInterface

BLOCK = BlockInterface(streams=("hidden_states",), returns=None, per_sample=("encoder_hidden_states", "temb"))


class WanAdapter(Adapter):
    """Wan, text or image to video: one list of blocks on the video tokens alone.

    - The text, and before it the image's embeddings where there are any, is only read, by cross-attention: no stream.
    - Guidance is two calls a step.
    - The A14B models are two transformers, each of which is called for a part of the steps.
    - The embeddings of an image are no name of a run: a caller may keep them, as those of the prompt.
    - TI2V gives a timestep per token: 0 for those of a given first frame, and `temb` is (B, N, 6, D).
    """

    family = "Wan"
    classes = ("WanTransformer3DModel",)
    block_lists = (BlockList("blocks", interface=BLOCK),)

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        hidden_states, temb = arguments["hidden_states"], arguments["temb"].float()
        modulation = temb if temb.ndim == 4 else temb.unsqueeze(1)
        return modulated_by_table(block, hidden_states.float(), modulation).type_as(hidden_states)

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn1", "attn2", image_mlp="ffn")
