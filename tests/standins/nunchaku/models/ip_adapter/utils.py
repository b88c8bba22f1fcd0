"""The module that an IP-Adapter puts in front of V1's core."""

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from ...caching.fbcache import Streams, check_and_apply_cache
from ...caching.utils import CoreArguments, FluxCachedTransformerBlocks


class IPA_TransformerBlocks(FluxCachedTransformerBlocks):
    """Runs double layers one by one and adds what each one's queries see of the adapter's image.

    It has `m` as the module that it replaces has; who takes `m` from here and runs layers, drops the adapter. With
    a batch it does not cache, and the queries of all images are read as one image's. `id_embeddings` are ignored.
    """

    def __init__(
        self,
        *,
        transformer: nn.Module,
        ip_adapter_scale: float = 1.0,
        return_hidden_states_first: bool = True,
        return_hidden_states_only: bool = False,
        verbose: bool = False,
        device: str | torch.device,
    ):
        super().__init__(
            transformer=transformer,
            use_double_fb_cache=False,
            residual_diff_threshold_multi=-1,
            residual_diff_threshold_single=-1,
            return_hidden_states_first=return_hidden_states_first,
            return_hidden_states_only=return_hidden_states_only,
            verbose=verbose,
        )
        self.ip_adapter_scale = ip_adapter_scale
        self.image_embeds: list[Tensor] | None = None
        config = transformer.config
        self._heads, self._widths = config.num_attention_heads, (config.joint_attention_dim, transformer.inner_dim)

    def load_ip_adapter_weights_per_layer(self, repo_id: str) -> None:
        """Projections of the image's tokens to keys and values, from the hub there; here random, by the name."""
        generator = torch.Generator().manual_seed(zlib.crc32(repo_id.encode()))
        self.ip_k_projs, self.ip_v_projs = nn.ModuleList(), nn.ModuleList()
        for projections in (self.ip_k_projs, self.ip_v_projs):
            for _ in range(self._double):
                linear = nn.Linear(*self._widths, device=self.device, dtype=self.dtype)
                for parameter in linear.parameters():
                    drawn = torch.randn(parameter.shape, generator=generator) / self._widths[0] ** 0.5
                    parameter.data.copy_(drawn)
                projections.append(linear)

    def set_ip_hidden_states(self, image_embeds: list[Tensor], negative_image_embeds: object = None) -> None:
        """For callers that do not give them in `joint_attention_kwargs`."""
        self.image_embeds = image_embeds

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: Tensor,
        id_embeddings=None,
        id_weight=None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        skip_first_layer: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        image, text = (stream.to(self.dtype) for stream in (hidden_states, encoder_hidden_states))
        given = self._arguments(
            image, text, temb, image_rotary_emb, controlnet_block_samples, controlnet_single_block_samples
        )
        seen = self._seen(joint_attention_kwargs)
        if self.residual_diff_threshold_multi <= 0 or len(image) > 1:
            streams = self._double_layers(image, text, given, seen, range(self._double))
            return self._returned(self._uncached_single(streams, given), hidden_states.dtype)
        first = self._double_layers(image, text, given, seen, range(1))
        streams = check_and_apply_cache(
            first_residual=first["hidden_states"] - image,
            streams=first,
            threshold=self.residual_diff_threshold_multi,
            mode="multi",
            call_remaining_fn=lambda hidden_states, encoder_hidden_states: self._double_layers(
                hidden_states, encoder_hidden_states, given, seen, range(1, self._double)
            ),
        )
        streams = (self._cached_single if self.use_double_fb_cache else self._uncached_single)(streams, given)
        return self._returned(streams, hidden_states.dtype)

    def _seen(self, joint_attention_kwargs: dict[str, Any] | None) -> Tensor:
        """The tokens of the adapter's image. Taken out of the caller's dictionary."""
        if joint_attention_kwargs is not None and "ip_hidden_states" in joint_attention_kwargs:
            tokens = joint_attention_kwargs.pop("ip_hidden_states")
        elif self.image_embeds is not None:
            tokens = self.image_embeds
        else:
            raise UnboundLocalError("cannot access local variable 'ip_hidden_states': no image was given")
        return tokens[0].to(self.dtype)

    def _double_layers(self, image: Tensor, text: Tensor, given: CoreArguments, seen: Tensor, layers: range) -> Streams:
        for index in layers:
            image, text, query = self.m.forward_layer_ip_adapter(index, image, text, *given.of_layer)
            key, value = self.ip_k_projs[index](seen), self.ip_v_projs[index](seen)
            heads = (part.view(1, -1, self._heads, part.shape[-1] // self._heads) for part in (query, key, value))
            added = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in heads))
            image = image + self.ip_adapter_scale * added.transpose(1, 2).flatten(2)
        return {"hidden_states": image.contiguous(), "encoder_hidden_states": text.contiguous()}

    def _uncached_single(self, streams: Streams, given: CoreArguments) -> Streams:
        text = streams["encoder_hidden_states"]
        joined = torch.cat([text, streams["hidden_states"]], dim=1)
        return self._split(self._single_layers(given, 0)(joined)["hidden_states"], text)


def undo_all_mods_on_transformer(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Give forward and double blocks back, as far as a cache kept them. The single blocks' list stays."""
    if hasattr(transformer, "_original_forward"):
        transformer.forward = transformer._original_forward
        del transformer._original_forward
    if hasattr(transformer, "_original_blocks"):
        transformer.transformer_blocks = transformer._original_blocks
        del transformer._original_blocks
    return transformer
