"""The first generation (V1): every block inside one core."""

import copy
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..._C import QuantizedFluxModel
from ..embeddings import pack_rotemb, rotary_table
from ..utils import pad_tensor

SVD_RANK = 32


class NunchakuFluxTransformerBlocks(nn.Module):
    """The one module in `transformer_blocks`: the core, and what has to be done before and after it."""

    def __init__(self, m: QuantizedFluxModel, device: str | torch.device):
        super().__init__()
        self.m = m
        self.dtype = torch.bfloat16 if m.isBF16() else torch.float16
        self.device = device

    pack_rotemb = staticmethod(pack_rotemb)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: Tensor,
        id_embeddings=None,
        id_weight=None,
        joint_attention_kwargs=None,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
        skip_first_layer=False,
    ) -> tuple[Tensor, Tensor]:
        text_tokens, image_tokens = encoder_hidden_states.shape[1], hidden_states.shape[1]
        self.id_embeddings, self.id_weight, self.pulid_ca_idx = id_embeddings, id_weight, 0
        if id_embeddings is not None:
            self.set_pulid_residual_callback()
        before = {"dtype": hidden_states.dtype, "device": hidden_states.device}
        image, text, temb = (
            tensor.to(dtype=self.dtype, device=self.device) for tensor in (hidden_states, encoder_hidden_states, temb)
        )
        double, single = (
            stacked(samples, self.device) for samples in (controlnet_block_samples, controlnet_single_block_samples)
        )
        parts = rotary_parts(image_rotary_emb.to(self.device), text_tokens, image_tokens)
        packed = [self.pack_rotemb(part) for part in parts]
        joined = self.m.forward(image, text, temb, *packed, double, single, skip_first_layer)
        if id_embeddings is not None:
            self.reset_pulid_residual_callback()
        joined = joined.to(**before)
        return joined[:, :text_tokens], joined[:, text_tokens:]

    def set_pulid_residual_callback(self) -> None:
        used = [self.pulid_ca_idx]

        def callback(image: Tensor) -> Tensor:
            residual = self.id_weight * self.pulid_ca[used[0]](self.id_embeddings, image)
            used[0] += 1
            return residual

        self.callback_holder = callback
        self.m.set_residual_callback(callback)

    def reset_pulid_residual_callback(self) -> None:
        self.callback_holder = None
        self.m.set_residual_callback(None)

    def norm1(self, hidden_states: Tensor, emb: Tensor, idx: int = 0) -> tuple[Tensor, ...]:
        return self.m.norm_one_forward(idx, hidden_states, emb)

    def __del__(self):
        self.m.reset()


def rotary_parts(table: Tensor, text_tokens: int, image_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of image, text and both in a table (1, 1, M+N, head_dim / 2, 1, 2), each padded to a multiple of 256."""
    if table.shape[:3] != (1, 1, text_tokens + image_tokens) or table.ndim != 6:
        raise AssertionError(f"rotary embeddings of shape {tuple(table.shape)}")
    table = table[0]
    parts = table[:, text_tokens:], table[:, :text_tokens], table
    return tuple(pad_tensor(part, 256, 1) for part in parts)


def stacked(samples: list[Tensor] | None, device: str | torch.device) -> Tensor | None:
    """ControlNet's samples as the core takes them."""
    return torch.stack(samples).to(device) if samples else None


class EmbedND(nn.Module):
    """V1's module of rotary embeddings."""

    def __init__(self, dim: int, theta: int, axes_dim: list[int]):
        super().__init__()
        self.dim, self.theta, self.axes_dim = dim, theta, axes_dim

    def forward(self, ids: Tensor) -> Tensor:
        return rotary_table(ids, self.theta, self.axes_dim)


class NunchakuFluxTransformer2dModel(FluxTransformer2DModel):
    """V1. Made from a diffusers Flux by `standing_for`, where the real one is made by `from_pretrained`."""

    @classmethod
    def standing_for(
        cls, flux: FluxTransformer2DModel, torch_dtype: torch.dtype = torch.bfloat16, offload: bool = False
    ) -> "NunchakuFluxTransformer2dModel":
        flux = copy.deepcopy(flux).to(torch_dtype)
        made = cls.from_config(flux.config).to(torch_dtype)
        double, single = list(flux.transformer_blocks), list(flux.single_transformer_blocks)
        core = QuantizedFluxModel(double, single, torch_dtype is torch.bfloat16, offload)
        made.inject_quantized_module(core, "cpu")
        around = {name: value for name, value in flux.state_dict().items() if "transformer_blocks." not in name}
        made.load_state_dict(around)
        made._unquantized_part_sd = around
        made._unquantized_part_loras = {}
        made._quantized_part_sd = {
            f"{kind}.{index}.qkv_proj.qweight": torch.empty(0, device="meta")
            for kind, blocks in (("transformer_blocks", double), ("single_transformer_blocks", single))
            for index in range(len(blocks))
        }
        return made.eval()

    def inject_quantized_module(self, m: QuantizedFluxModel, device: str | torch.device = "cuda"):
        axes = list(self.config.axes_dims_rope)  # nunchaku has FLUX.1's own here, 16, 56, 56
        self.pos_embed = EmbedND(dim=self.inner_dim, theta=10000, axes_dim=axes)
        self.transformer_blocks = nn.ModuleList([NunchakuFluxTransformerBlocks(m, device)])
        self.single_transformer_blocks = nn.ModuleList([])
        return self

    def set_attention_impl(self, impl: str) -> None:
        self.transformer_blocks[0].m.setAttentionImpl(impl)

    def update_lora_params(self, path_or_state_dict: dict[str, Tensor]) -> None:
        """A LoRA in diffusers' names (`<module>.lora_A.weight`, `.lora_B.weight`), in place of any before."""
        inside = {name: value for name, value in path_or_state_dict.items() if "transformer_blocks." in name}
        self._unquantized_part_loras = {name: value for name, value in path_or_state_dict.items() if name not in inside}
        self._update_unquantized_part_lora_params(1)
        self.transformer_blocks[0].m.loadDict(inside, True)

    def set_lora_strength(self, strength: float = 1) -> None:
        self.transformer_blocks[0].m.setLoraScale(SVD_RANK, strength)
        self._update_unquantized_part_lora_params(strength)

    def reset_lora(self) -> None:
        self.update_lora_params({})

    def _update_unquantized_part_lora_params(self, strength: float) -> None:
        weights = dict(self._unquantized_part_sd)
        for name, down in self._unquantized_part_loras.items():
            module, found, _ = name.partition(".lora_A.")
            if found:
                up = self._unquantized_part_loras[f"{module}.lora_B.weight"]
                weight = weights[f"{module}.weight"]
                weights[f"{module}.weight"] = weight + (strength * (up @ down)).to(weight.dtype)
        self.load_state_dict(weights)

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
        id_embeddings=None,
        id_weight=None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The last two arguments are those of nunchaku's PuLID pipeline, which puts a forward with them in place."""
        project_ip_adapter(self, joint_attention_kwargs)
        image, temb, text, table = embedded(
            self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance
        )
        identity = {} if id_embeddings is None else {"id_embeddings": id_embeddings, "id_weight": id_weight}
        text, image = self.transformer_blocks[0](
            hidden_states=image,
            encoder_hidden_states=text,
            temb=temb,
            image_rotary_emb=table,
            **identity,
            joint_attention_kwargs=joint_attention_kwargs,
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
        )
        image = torch.cat([text, image], dim=1)[:, text.shape[1] :]
        output = self.proj_out(self.norm_out(image, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def project_ip_adapter(model: FluxTransformer2DModel, joint_attention_kwargs: dict[str, Any] | None) -> None:
    """Put the projected embeddings of an IP-Adapter's image in their place. Changes the caller's dictionary."""
    if joint_attention_kwargs is not None and "ip_adapter_image_embeds" in joint_attention_kwargs:
        embeds = joint_attention_kwargs.pop("ip_adapter_image_embeds")
        joint_attention_kwargs["ip_hidden_states"] = model.encoder_hid_proj(embeds)


def embedded(
    model: FluxTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What both generations do before their blocks: image tokens, modulation, text tokens, rotary table."""
    image = model.x_embedder(hidden_states)
    moments = [1000 * moment.to(image.dtype) for moment in (timestep, guidance) if moment is not None]
    temb = model.time_text_embed(*moments, pooled_projections)
    text = model.context_embedder(encoder_hidden_states)
    txt_ids, img_ids = (ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids))
    return image, temb, text, model.pos_embed(torch.cat([txt_ids, img_ids]))
