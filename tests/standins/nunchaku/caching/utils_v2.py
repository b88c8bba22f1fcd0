"""First-block cache of V2: a forward in place of the transformer's. Drops ControlNet's samples, as nunchaku's does."""

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..models.embeddings import pack_rotemb
from ..models.transformers.transformer_flux import embedded, project_ip_adapter, rotary_parts
from .fbcache import Streams, check_and_apply_cache


def cached_forward_v2(
    self: nn.Module,
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
    """With a threshold below zero, the forward that was there before. Else a cache context is needed."""
    if self.residual_diff_threshold_multi < 0:
        return self._original_forward(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            joint_attention_kwargs=joint_attention_kwargs,
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            return_dict=return_dict,
            controlnet_blocks_repeat=controlnet_blocks_repeat,
        )
    project_ip_adapter(self, joint_attention_kwargs)
    image, temb, text, table = embedded(
        self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance
    )
    tokens = text.shape[1]
    rotary_image, rotary_text, rotary_single = map(pack_rotemb, rotary_parts(table, tokens, image.shape[1]))
    common = {"temb": temb, "joint_attention_kwargs": joint_attention_kwargs}

    def double(blocks: nn.ModuleList, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Streams:
        image, text = hidden_states, encoder_hidden_states
        for block in blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                image_rotary_emb=(rotary_image, rotary_text),
                **common,
            )
        return {"hidden_states": image.contiguous(), "encoder_hidden_states": text.contiguous()}

    def single(blocks: nn.ModuleList, hidden_states: Tensor) -> Streams:
        for block in blocks:
            hidden_states = block(hidden_states=hidden_states, image_rotary_emb=rotary_single, **common)
        return {"hidden_states": hidden_states.contiguous()}

    def rest(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Streams:
        streams = double(self.transformer_blocks[1:], hidden_states, encoder_hidden_states)
        if self.use_double_fb_cache:
            return streams
        joined = single(self.single_transformer_blocks, _joined(streams))["hidden_states"]
        return {
            "hidden_states": joined[:, tokens:].contiguous(),
            "encoder_hidden_states": joined[:, :tokens].contiguous(),
        }

    first = double(self.transformer_blocks[:1], image, text)
    streams = check_and_apply_cache(
        first_residual=first["hidden_states"] - image,
        streams=first,
        threshold=self.residual_diff_threshold_multi,
        mode="multi",
        call_remaining_fn=rest,
    )
    image = streams["hidden_states"]
    if self.use_double_fb_cache:
        joined = _joined(streams)
        first = single(self.single_transformer_blocks[:1], joined)
        joined = check_and_apply_cache(
            first_residual=first["hidden_states"] - joined,
            streams=first,
            threshold=self.residual_diff_threshold_single,
            mode="single",
            call_remaining_fn=lambda hidden_states: single(self.single_transformer_blocks[1:], hidden_states),
        )["hidden_states"]
        image = joined[:, tokens:]
    output = self.proj_out(self.norm_out(image, temb))
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _joined(streams: Streams) -> Tensor:
    return torch.cat([streams["encoder_hidden_states"], streams["hidden_states"]], dim=1)
