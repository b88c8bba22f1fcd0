"""nunchaku's TeaCache: a context manager with a forward of its own."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..models.transformers.transformer_flux import embedded, project_ip_adapter

COEFFICIENTS = (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)


def make_teacache_forward(num_steps: int = 50, rel_l1_thresh: float = 0.6, skip_steps: int = 0) -> Callable:
    """A forward that counts its calls on the model and skips all blocks while the estimated change is small."""

    def teacache_forward(
        self: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | Tensor:
        """Without `return_dict`, the bare tensor, as nunchaku's: a pipeline that takes [0] of it has one image."""
        kwargs = None if joint_attention_kwargs is None else dict(joint_attention_kwargs)
        project_ip_adapter(self, kwargs)
        image, temb, text, table = embedded(
            self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance
        )
        computes = _computes(self, image, temb, num_steps, rel_l1_thresh)
        self.cnt = (self.cnt + 1) % num_steps
        if self.cnt > skip_steps and not computes:
            image = image + self.previous_residual
        else:
            common = {"temb": temb, "image_rotary_emb": table, "joint_attention_kwargs": kwargs}
            samples = controlnet_block_samples, controlnet_single_block_samples
            computed = _all_blocks(self, image, text, common, *samples, controlnet_blocks_repeat)
            if self.cnt > skip_steps:
                self.previous_residual = computed - image
            image = computed
        output = self.proj_out(self.norm_out(image, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else output

    return teacache_forward


def _computes(model: nn.Module, image: Tensor, temb: Tensor, num_steps: int, threshold: float) -> bool:
    modulated = model.transformer_blocks[0].norm1(image.clone(), emb=temb.clone())[0]
    previous, model.previous_modulated_input = model.previous_modulated_input, modulated
    if model.cnt not in (0, num_steps - 1):
        change = ((modulated - previous).abs().mean() / previous.abs().mean()).item()
        model.accumulated_rel_l1_distance += np.poly1d(COEFFICIENTS)(change)
        if model.accumulated_rel_l1_distance < threshold:
            return False
    model.accumulated_rel_l1_distance = 0
    return True


def _all_blocks(
    model: nn.Module,
    image: Tensor,
    text: Tensor,
    common: dict[str, Any],
    double_samples: list[Tensor] | None,
    single_samples: list[Tensor] | None,
    repeat: bool,
) -> Tensor:
    """Blocks as diffusers calls them. ControlNet's samples are added here: V1's one module gets the first."""
    blocks = model.transformer_blocks
    for index, block in enumerate(blocks):
        text, image = block(hidden_states=image, encoder_hidden_states=text, **common)
        if double_samples is not None:
            number = len(double_samples)
            image = image + double_samples[index % number if repeat else index // -(-len(blocks) // number)]
    joined, tokens = torch.cat([text, image], dim=1), text.shape[1]
    blocks = model.single_transformer_blocks
    for index, block in enumerate(blocks):
        joined = block(hidden_states=joined, **common)
        if single_samples is not None:
            joined[:, tokens:] += single_samples[index // -(-len(blocks) // len(single_samples))]
    return joined[:, tokens:]


class TeaCache:
    """While open, the model's forward is replaced and four attributes are on the model.

    Behind it, what was the forward stays as an attribute of the instance.
    """

    def __init__(
        self,
        model: nn.Module,
        num_steps: int = 50,
        rel_l1_thresh: float = 0.6,
        skip_steps: int = 0,
        enabled: bool = True,
    ):
        self.model, self.enabled = model, enabled
        self.num_steps, self.rel_l1_thresh, self.skip_steps = num_steps, rel_l1_thresh, skip_steps
        self.previous_model_forward = model.forward

    def __enter__(self) -> "TeaCache":
        if self.enabled:
            forward = make_teacache_forward(self.num_steps, self.rel_l1_thresh, self.skip_steps)
            self.model.forward = MethodType(forward, self.model)
            self.model.cnt = 0
            self.model.accumulated_rel_l1_distance = 0
            self.model.previous_modulated_input = None
            self.model.previous_residual = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            self.model.forward = self.previous_model_forward
            del self.model.cnt
            del self.model.accumulated_rel_l1_distance
            del self.model.previous_modulated_input
            del self.model.previous_residual
