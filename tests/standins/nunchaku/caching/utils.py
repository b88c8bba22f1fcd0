"""First-block cache of V1: a module that stands in front of the core while a cached pipeline runs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.embeddings import pack_rotemb
from ..models.transformers.transformer_flux import rotary_parts, stacked
from .fbcache import Streams, check_and_apply_cache


class CoreArguments(NamedTuple):
    """What the core takes behind the streams, in its order."""

    temb: Tensor
    rotary_image: Tensor
    rotary_text: Tensor
    rotary_single: Tensor
    double_samples: Tensor | None
    single_samples: Tensor | None

    @property
    def of_layer(self) -> tuple[Tensor | None, ...]:
        """What a double layer takes."""
        return self.temb, self.rotary_image, self.rotary_text, self.double_samples, self.single_samples


class FluxCachedTransformerBlocks(nn.Module):
    """Runs the core and skips what is behind its first layer, or behind the first of each kind (double FB cache).

    Takes no `id_embeddings`, has no `norm1`, and adds no ControlNet samples of single layers with a double FB cache:
    nunchaku's neither. nunchaku counts 19 and 38 layers, here the config says.
    """

    def __init__(
        self,
        *,
        transformer: nn.Module,
        use_double_fb_cache: bool = True,
        residual_diff_threshold_multi: float,
        residual_diff_threshold_single: float,
        return_hidden_states_first: bool = True,
        return_hidden_states_only: bool = False,
        verbose: bool = False,
    ):
        super().__init__()
        self.transformer_blocks = transformer.transformer_blocks
        self.single_transformer_blocks = transformer.single_transformer_blocks
        self.update_residual_diff_threshold(
            use_double_fb_cache, residual_diff_threshold_multi, residual_diff_threshold_single
        )
        self.return_hidden_states_first = return_hidden_states_first
        self.return_hidden_states_only = return_hidden_states_only
        self.verbose = verbose
        self.m = self.transformer_blocks[0].m
        self.dtype = torch.bfloat16 if self.m.isBF16() else torch.float16
        self.device = transformer.device
        self._double, self._single = transformer.config.num_layers, transformer.config.num_single_layers

    pack_rotemb = staticmethod(pack_rotemb)

    def update_residual_diff_threshold(
        self,
        use_double_fb_cache: bool = True,
        residual_diff_threshold_multi: float = 0.12,
        residual_diff_threshold_single: float = 0.09,
    ) -> None:
        self.use_double_fb_cache = use_double_fb_cache
        self.residual_diff_threshold_multi = residual_diff_threshold_multi
        self.residual_diff_threshold_single = residual_diff_threshold_single

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        skip_first_layer: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        image, text = (stream.to(self.dtype) for stream in (hidden_states, encoder_hidden_states))
        given = self._arguments(
            image, text, temb, image_rotary_emb, controlnet_block_samples, controlnet_single_block_samples
        )
        if self.residual_diff_threshold_multi < 0:
            streams = self._split(self.m.forward(image, text, *given, skip_first_layer), text)
        else:
            first, text = self.m.forward_layer(0, image, text, *given.of_layer)
            streams = check_and_apply_cache(
                first_residual=first - image,
                streams={"hidden_states": first, "encoder_hidden_states": text},
                threshold=self.residual_diff_threshold_multi,
                mode="multi",
                call_remaining_fn=self._rest_of_double(given) if self.use_double_fb_cache else self._rest(given),
            )
            if self.use_double_fb_cache:
                streams = self._cached_single(streams, given)
        return self._returned(streams, hidden_states.dtype)

    def _arguments(
        self, image: Tensor, text: Tensor, temb: Tensor, table: Tensor, double: list | None, single: list | None
    ) -> CoreArguments:
        packed = [self.pack_rotemb(part) for part in rotary_parts(table, text.shape[1], image.shape[1])]
        return CoreArguments(temb.to(self.dtype), *packed, stacked(double, temb.device), stacked(single, temb.device))

    def _rest(self, given: CoreArguments):
        """Every layer behind the first, in one call."""

        def run(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Streams:
            joined = self.m.forward(hidden_states, encoder_hidden_states, *given, True)
            return self._split(joined, encoder_hidden_states)

        return run

    def _rest_of_double(self, given: CoreArguments):
        """Every double layer behind the first, one by one."""

        def run(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Streams:
            image, text = hidden_states, encoder_hidden_states
            for index in range(1, self._double):
                image, text = self.m.forward_layer(index, image, text, *given.of_layer)
            return {"hidden_states": image, "encoder_hidden_states": text}

        return run

    def _single_layers(self, given: CoreArguments, start: int):
        """Every single layer from `start` on, one by one."""

        def run(hidden_states: Tensor) -> Streams:
            for index in range(start, self._single):
                hidden_states = self.m.forward_single_layer(index, hidden_states, given.temb, given.rotary_single)
            return {"hidden_states": hidden_states}

        return run

    def _cached_single(self, streams: Streams, given: CoreArguments) -> Streams:
        text = streams["encoder_hidden_states"]
        joined = torch.cat([text, streams["hidden_states"]], dim=1)
        first = self.m.forward_single_layer(0, joined, given.temb, given.rotary_single)
        joined = check_and_apply_cache(
            first_residual=first - joined,
            streams={"hidden_states": first},
            threshold=self.residual_diff_threshold_single,
            mode="single",
            call_remaining_fn=self._single_layers(given, 1),
        )["hidden_states"]
        return self._split(joined, text)

    @staticmethod
    def _split(joined: Tensor, text: Tensor) -> Streams:
        tokens = text.shape[1]
        return {
            "hidden_states": joined[:, tokens:].contiguous(),
            "encoder_hidden_states": joined[:, :tokens].contiguous(),
        }

    def _returned(self, streams: Streams, dtype: torch.dtype) -> Tensor | tuple[Tensor, Tensor]:
        image, text = (streams[name].to(dtype) for name in ("hidden_states", "encoder_hidden_states"))
        if self.return_hidden_states_only:
            return image
        return (image, text) if self.return_hidden_states_first else (text, image)
