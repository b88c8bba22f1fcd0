"""diffusers' `ChromaTransformer2DModel`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, Role
from .block_call import BlockInterface, plain

PER_SAMPLE = ("temb", "attention_mask", "joint_attention_kwargs")
DOUBLE = BlockInterface(per_sample=PER_SAMPLE)
SINGLE = BlockInterface(streams=("hidden_states",), returns=None, per_sample=PER_SAMPLE, joined=True)


class ChromaAdapter(Adapter):
    """Chroma: double blocks in `transformer_blocks` (structure), single ones in `single_transformer_blocks` (detail).

    - A single block takes and returns one tensor, [text; image].
    - The modulation comes ready from one network for all blocks: `temb` is (B, 12, D) for a double block, of which the
      first six are the image's, and (B, 3, D) for a single one.
    - `attention_mask` is (B, text + image).
    - No guidance embedding: guidance is two calls a step.
    """

    family = "Chroma"
    classes = ("ChromaTransformer2DModel",)
    block_lists = (
        BlockList("transformer_blocks", Role.STRUCTURE, DOUBLE),
        BlockList("single_transformer_blocks", Role.DETAIL, SINGLE),
    )
    run_arguments = ("img_ids",)
    text_argument = "encoder_hidden_states"
    control_arguments = ("controlnet_block_samples", "controlnet_single_block_samples")
    timestep_scale = 1000.0

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        return block.norm1(arguments["hidden_states"], emb=arguments["temb"][:, :6])[0]

    def modules(self, block: nn.Module) -> BlockModules:
        inside = plain(block)
        if hasattr(inside, "ff_context"):
            return BlockModules(
                forecast=(inside.attn, inside.ff, inside.ff_context), image_mlp=inside.ff, text_mlp=inside.ff_context
            )
        # A single block projects attention and MLP together.
        return BlockModules(forecast=(inside.proj_out,), upstream_only=(inside.attn, inside.proj_mlp))

    def position_modules(self, transformer: nn.Module) -> Sequence[nn.Module]:
        # By class, for there are embeddings that take this one's place and follow the timestep.
        positions = getattr(transformer, "pos_embed", None)
        kind = type(positions)
        known = kind.__name__ == "FluxPosEmbed" and kind.__module__.partition(".")[0] == "diffusers"
        return [positions] if known else []

    def position_ids(self, given: dict[str, Any]) -> tuple[Tensor | None, ...]:
        return given["img_ids"], given.get("txt_ids")
