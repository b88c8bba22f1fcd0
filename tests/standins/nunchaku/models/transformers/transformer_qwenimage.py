"""Quantized Qwen-Image: diffusers' class with blocks of its own.

nunchaku 1.2 takes `txt_seq_lens`, and passes them to diffusers in a way that diffusers has had to 0.36. What is here
calls diffusers as nunchaku's repository does since: `txt_seq_lens` is ignored, the text's width counts.
"""

import copy
import inspect
import warnings
from math import ceil
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import (
    QwenImageTransformer2DModel,
    QwenImageTransformerBlock,
    apply_rotary_emb_qwen,
)
from torch import Tensor, nn

from ..attention import NunchakuFeedForward
from ..linear import AWQW4A16Linear, SVDQW4A4Linear
from ..utils import CPUOffloadManager, fuse_linears

MODULATION = {"chunks": 6, "from_one": (1, 4)}  # shift, scale, gate, twice


class NunchakuQwenAttention(nn.Module):
    """Attention on both streams. Query, key and value are one layer, `to_qkv`; `add_qkv_proj` for the text."""

    def __init__(self, other: Attention):
        super().__init__()
        self.heads, self.inner_dim = other.heads, other.inner_dim
        self.norm_q, self.norm_k = other.norm_q, other.norm_k
        self.norm_added_q, self.norm_added_k = other.norm_added_q, other.norm_added_k
        self.to_qkv = SVDQW4A4Linear.from_linear(fuse_linears([other.to_q, other.to_k, other.to_v]))
        self.to_out = other.to_out
        self.to_out[0] = SVDQW4A4Linear.from_linear(self.to_out[0])
        added = [other.add_q_proj, other.add_k_proj, other.add_v_proj]
        self.add_qkv_proj = SVDQW4A4Linear.from_linear(fuse_linears(added))
        self.to_add_out = SVDQW4A4Linear.from_linear(other.to_add_out)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(image, text). The text's mask is ignored, as in nunchaku."""
        image = self._heads(self.to_qkv(hidden_states))
        text = self._heads(self.add_qkv_proj(encoder_hidden_states))
        image[:2] = self.norm_q(image[0]), self.norm_k(image[1])
        text[:2] = self.norm_added_q(text[0]), self.norm_added_k(text[1])
        if image_rotary_emb is not None:
            of_image, of_text = image_rotary_emb
            image[:2] = [apply_rotary_emb_qwen(part, of_image, use_real=False) for part in image[:2]]
            text[:2] = [apply_rotary_emb_qwen(part, of_text, use_real=False) for part in text[:2]]
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(text, image, strict=True))
        joined = dispatch_attention_fn(query, key, value, attn_mask=attention_mask).flatten(2, 3).to(query.dtype)
        text, image = joined.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return self.to_out[1](self.to_out[0](image)), self.to_add_out(text)

    def _heads(self, fused: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (self.heads, -1)) for part in fused.chunk(3, dim=-1)]


class NunchakuQwenImageTransformerBlock(QwenImageTransformerBlock):
    """A block whose modulations come number by number, not kind by kind, and with one added to their scales."""

    def __init__(self, other: QwenImageTransformerBlock):
        super(QwenImageTransformerBlock, self).__init__()
        self.dim = other.dim
        self.img_mod, self.txt_mod = other.img_mod, other.txt_mod
        for modulation in (self.img_mod, self.txt_mod):
            modulation[1] = AWQW4A16Linear.from_linear(modulation[1], **MODULATION)
        self.img_norm1, self.img_norm2 = other.img_norm1, other.img_norm2
        self.txt_norm1, self.txt_norm2 = other.txt_norm1, other.txt_norm2
        self.attn = NunchakuQwenAttention(other.attn)
        self.img_mlp, self.txt_mlp = NunchakuFeedForward(other.img_mlp), NunchakuFeedForward(other.txt_mlp)
        self.scale_shift = 0

    def _modulate(self, x: Tensor, mod_params: Tensor) -> tuple[Tensor, Tensor]:
        """(modulated tokens, gate). `mod_params` is (B, 3 * D), kind by kind again."""
        shift, scale, gate = (part.unsqueeze(1) for part in mod_params.chunk(3, dim=-1))
        return x * scale + shift, gate

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(text, image). Takes no `modulate_index`, unlike diffusers' block."""
        image, text = hidden_states, encoder_hidden_states
        image_mod1, image_mod2 = kind_by_kind(self.img_mod(temb)).chunk(2, dim=-1)
        text_mod1, text_mod2 = kind_by_kind(self.txt_mod(temb)).chunk(2, dim=-1)
        image_normed, image_gate = self._modulate(self.img_norm1(image), image_mod1)
        text_normed, text_gate = self._modulate(self.txt_norm1(text), text_mod1)
        image_attention, text_attention = self.attn(
            hidden_states=image_normed,
            encoder_hidden_states=text_normed,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        image, text = image + image_gate * image_attention, text + text_gate * text_attention
        image_normed, image_gate = self._modulate(self.img_norm2(image), image_mod2)
        image = image + image_gate * self.img_mlp(image_normed)
        text_normed, text_gate = self._modulate(self.txt_norm2(text), text_mod2)
        text = text + text_gate * self.txt_mlp(text_normed)
        if image.dtype == torch.float16:
            image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
        return text, image


def kind_by_kind(modulation: Tensor) -> Tensor:
    """(B, D * 6), as the kernel gives it, to (B, 6 * D), as diffusers has it."""
    return modulation.unflatten(-1, (-1, 6)).transpose(1, 2).flatten(1)


class NunchakuQwenImageTransformer2DModel(QwenImageTransformer2DModel):
    """Made from a diffusers Qwen-Image by `standing_for`, where the real one is made by `from_pretrained`."""

    def __init__(self, *args, **kwargs):
        self.offload = kwargs.pop("offload", False)
        self.offload_manager: CPUOffloadManager | None = None
        self._is_initialized = False
        super().__init__(*args, **kwargs)

    @classmethod
    def standing_for(
        cls, model: QwenImageTransformer2DModel, torch_dtype: torch.dtype = torch.bfloat16
    ) -> "NunchakuQwenImageTransformer2DModel":
        names = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
        made = cls(**{name: value for name, value in model.config.items() if name in names})
        made.load_state_dict(copy.deepcopy(model.state_dict()))
        return made.to(torch_dtype)._patch_model().eval()

    def _patch_model(self):
        for index, block in enumerate(self.transformer_blocks):
            self.transformer_blocks[index] = NunchakuQwenImageTransformerBlock(block)
        self._is_initialized = True
        return self

    def set_offload(self, offload: bool, **kwargs: Any) -> None:
        """With offloading, all blocks but the first are run in buffers."""
        if offload != self.offload:
            self.offload = offload
            self.offload_manager = CPUOffloadManager(self.transformer_blocks, **kwargs) if offload else None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor = None,
        encoder_hidden_states_mask: Tensor = None,
        timestep: Tensor = None,
        img_shapes: list[tuple[int, int, int]] | None = None,
        txt_seq_lens: list[int] | None = None,
        guidance: Tensor = None,
        attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples=None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        image = self.img_in(hidden_states)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        moments = [timestep.to(image.dtype)] + ([] if guidance is None else [1000 * guidance.to(image.dtype)])
        temb = self.time_text_embed(*moments, image)
        rotary = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
        for index in range(len(self.transformer_blocks)):
            block = self.offload_manager.get_block(index) if self.offload else self.transformer_blocks[index]
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                temb=temb,
                image_rotary_emb=rotary,
                joint_attention_kwargs=attention_kwargs,
            )
            if controlnet_block_samples is not None:
                interval = ceil(len(self.transformer_blocks) / len(controlnet_block_samples))
                image = image + controlnet_block_samples[index // interval]
        output = self.proj_out(self.norm_out(image, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def to(self, *args, **kwargs):
        """Refuses another dtype, and stays where it is while it offloads."""
        if self._is_initialized and ("dtype" in kwargs or any(isinstance(given, torch.dtype) for given in args)):
            raise ValueError("Casting a quantized model to a new `dtype` is unsupported.")
        if self.offload and ("device" in kwargs or any(isinstance(given, str | torch.device) for given in args)):
            warnings.warn("Skipping moving the model to GPU as offload is enabled", UserWarning, stacklevel=2)
            return self
        return super().to(*args, **kwargs)
