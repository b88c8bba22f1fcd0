"""diffusers' `Lumina2Transformer2DModel`."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, modules_named
from .block_call import BlockInterface

BLOCK = BlockInterface(
    streams=("hidden_states",), returns=None, per_sample=("attention_mask", "image_rotary_emb", "temb")
)


class Lumina2Adapter(Adapter):
    """Lumina Image 2: one list, `layers`, on one tensor [text; image; padding]; the refiners before it always run.

    - The text has as many tokens as the prompt, in each sample another number: text and image are one stream here.
    - In a batch of prompts of different lengths the padding counts in the probes, so that decisions can differ from
      those of a sample alone.
    - The model's timestep rises from 0 to 1.
    - Guidance is two calls a step; after `cfg_trunc_ratio` of the steps it is one.
    """

    family = "Lumina 2"
    classes = ("Lumina2Transformer2DModel",)
    block_lists = (BlockList("layers", interface=BLOCK),)
    timestep_scale = 1000.0

    def timestep(self, given: dict[str, Any]) -> Tensor:
        return 1 - given["timestep"].reshape(-1)

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        return block.norm1(arguments["hidden_states"], arguments["temb"])[0]

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn", image_mlp="feed_forward")
