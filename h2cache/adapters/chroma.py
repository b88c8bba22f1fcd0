"""diffusers' `ChromaTransformer2DModel`."""

from typing import Any

from torch import Tensor, nn

from .flux import FluxAdapter


class ChromaAdapter(FluxAdapter):
    """Chroma: the blocks of older FLUX.1, whose single ones take and return one tensor, [text; image].

    - The modulation comes ready from one network for all blocks: `temb` is (B, 12, D) for a double block, of which the
      first six are the image's, and (B, 3, D) for a single one.
    - `attention_mask` is (B, text + image).
    - No guidance embedding: guidance is two calls a step.
    """

    family = "Chroma"
    classes = ("ChromaTransformer2DModel",)
    branch_arguments = ("encoder_hidden_states",)
    polynomial_family = None

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        return block.norm1(arguments["hidden_states"], emb=arguments["temb"][:, :6])[0]
