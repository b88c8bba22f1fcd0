"""The second generation (V2): Python blocks with fused linear layers."""

import copy
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from ...ops.fused import assert_rotary_rows, fused_gelu_mlp
from ..embeddings import NunchakuFluxPosEmbed, pack_rotemb, unpack_rotemb
from ..linear import AWQW4A16Linear, SVDQW4A4Linear
from .transformer_flux import embedded, project_ip_adapter, rotary_parts


class NunchakuFluxTransformerBlock(FluxTransformerBlock):
    """A double block on packed rotary embeddings (image, text)."""

    def __init__(self, block: FluxTransformerBlock):
        super(FluxTransformerBlock, self).__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        for norm in (self.norm1, self.norm1_context):
            norm.linear = AWQW4A16Linear.from_linear(norm.linear)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if joint_attention_kwargs:
            raise NotImplementedError("joint_attention_kwargs is not supported")
        check(self, hidden_states, encoder_hidden_states, temb)
        image = read(image_rotary_emb[0], hidden_states)
        text = read(image_rotary_emb[1], encoder_hidden_states)
        table = tuple(torch.cat(parts) for parts in zip(text, image, strict=True))
        return super().forward(hidden_states, encoder_hidden_states, temb, table)


class NunchakuFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """A single block on one tensor [text; image]. Its projection is split in two, and its MLP is one fused function."""

    def __init__(self, block: FluxSingleTransformerBlock):
        super(FluxSingleTransformerBlock, self).__init__()
        self.mlp_hidden_dim, self.norm, self.act_mlp = block.mlp_hidden_dim, block.norm, block.act_mlp
        self.norm.linear = AWQW4A16Linear.from_linear(self.norm.linear)
        self.mlp_fc1, self.attn = SVDQW4A4Linear.from_linear(block.proj_mlp), block.attn
        weight, bias = block.proj_out.weight, block.proj_out.bias
        attention, mlp = weight.split([len(weight), self.mlp_hidden_dim], dim=1)
        self.attn.to_out = SVDQW4A4Linear(attention, torch.zeros_like(bias))
        self.mlp_fc2 = SVDQW4A4Linear(mlp, bias)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        check(self, hidden_states, hidden_states, temb)
        table = read(image_rotary_emb, hidden_states)
        normed, gate = self.norm(hidden_states, emb=temb)
        mlp = fused_gelu_mlp(normed, self.mlp_fc1, self.mlp_fc2)
        attention = self.attn.to_out(self.attn(normed, image_rotary_emb=table, **(joint_attention_kwargs or {})))
        hidden_states = hidden_states + gate.unsqueeze(1) * (attention + mlp)
        return hidden_states.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else hidden_states


def read(rotary: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The (cosines, sines) that the projection of `tokens` (B, M, D) reads; one image at a time."""
    assert_rotary_rows(rotary, *tokens.shape[:2])
    return unpack_rotemb(rotary, tokens.shape[1])


def check(block: nn.Module, image: Tensor, text: Tensor, temb: Tensor) -> None:
    """What the kernels take for granted."""
    wanted = next(block.parameters()).dtype
    for tensor in (image, text, temb):
        if tensor.dtype is not wanted or not tensor.is_contiguous() or len(tensor) != len(image):
            raise ValueError(f"{tensor.dtype} of shape {tuple(tensor.shape)}: wanted contiguous {wanted}, one batch")


class NunchakuFluxTransformer2DModelV2(FluxTransformer2DModel):
    """V2. Made from a diffusers Flux by `standing_for`, where the real one is made by `from_pretrained`."""

    @classmethod
    def standing_for(
        cls, flux: FluxTransformer2DModel, torch_dtype: torch.dtype = torch.bfloat16
    ) -> "NunchakuFluxTransformer2DModelV2":
        made = cls.from_config(flux.config)
        made.load_state_dict(copy.deepcopy(flux.state_dict()))
        return made.to(torch_dtype)._patch_model().eval()

    def _patch_model(self):
        axes = list(self.pos_embed.axes_dim)
        self.pos_embed = NunchakuFluxPosEmbed(dim=self.inner_dim, theta=10000, axes_dim=axes)
        for index, block in enumerate(self.transformer_blocks):
            self.transformer_blocks[index] = NunchakuFluxTransformerBlock(block)
        for index, block in enumerate(self.single_transformer_blocks):
            self.single_transformer_blocks[index] = NunchakuFluxSingleTransformerBlock(block)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor = None,
        pooled_projections: Tensor = None,
        timestep: Tensor = None,
        img_ids: Tensor = None,
        txt_ids: Tensor = None,
        guidance: Tensor = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        project_ip_adapter(self, joint_attention_kwargs)
        image, temb, text, table = embedded(
            self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance
        )
        text_tokens = text.shape[1]
        parts = rotary_parts(table, text_tokens, image.shape[1])
        rotary_image, rotary_text, rotary_single = (pack_rotemb(part) for part in parts)
        for block in self.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=temb,
                image_rotary_emb=(rotary_image, rotary_text),
                joint_attention_kwargs=joint_attention_kwargs,
            )
            if controlnet_block_samples is not None:
                raise NotImplementedError("Controlnet is not supported for FluxTransformer2DModelV2 for now")
        joined = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            joined = block(
                hidden_states=joined,
                temb=temb,
                image_rotary_emb=rotary_single,
                joint_attention_kwargs=joint_attention_kwargs,
            )
            if controlnet_single_block_samples is not None:
                raise NotImplementedError("Controlnet is not supported for FluxTransformer2DModelV2 for now")
        output = self.proj_out(self.norm_out(joined[:, text_tokens:], temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
