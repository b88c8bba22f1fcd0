"""diffusers' `QwenImageTransformer2DModel`, and nunchaku's quantized subclass of it."""

from typing import Any

from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, Role, modules_named
from .block_call import BlockInterface

BLOCK = BlockInterface(
    per_sample=("encoder_hidden_states_mask", "temb", "joint_attention_kwargs", "modulate_index"),
)


class QwenImageAdapter(Adapter):
    """Qwen-Image, text to image, edit and layered: one list of double blocks.

    - Guidance is two calls a step.
    - `img_shapes`, a list, is made for each run and handed to both branches.
    - Edit: the tokens of the given images follow those that are denoised, in `hidden_states`.
    - With `zero_cond_t` (Edit 2511) given tokens are modulated by timestep 0: `temb` is (2 B, D), the batch at the
      timestep and then at 0; `modulate_index` is (B, N), 1 for given tokens; the text takes the first half.
    - nunchaku's blocks interleave the six parameters of the modulation, and with `offload` the model runs copies of
      its blocks.
    """

    family = "Qwen-Image"
    classes = ("QwenImageTransformer2DModel",)
    block_lists = (BlockList("transformer_blocks", interface=BLOCK),)
    run_arguments = ("img_shapes",)
    control_arguments = ("controlnet_block_samples",)
    timestep_scale = 1000.0

    def blocks(self, transformer: nn.Module) -> dict[Role, list[nn.Module]]:
        if getattr(transformer, "offload", False):
            raise ValueError(
                "nunchaku's Qwen-Image runs copies of its blocks when it offloads them, which a cache does not see: "
                "call transformer.set_offload(False)"
            )
        return super().blocks(transformer)

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        parameters, index = block.img_mod(arguments["temb"]), arguments.get("modulate_index")
        if hasattr(block, "scale_shift"):  # nunchaku's
            parameters = parameters.unflatten(1, (-1, 6)).mT.flatten(1)
        of_attention = parameters.chunk(2, dim=-1)[0]
        normed = block.img_norm1(arguments["hidden_states"])
        return block._modulate(normed, of_attention, *(() if index is None else (index,)))[0]

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attn", image_mlp="img_mlp", text_mlp="txt_mlp")
