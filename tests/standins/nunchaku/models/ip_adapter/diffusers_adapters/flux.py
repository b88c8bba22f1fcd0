"""IP-Adapter on V1, with or without nunchaku's first-block cache."""

import functools
from typing import Any

from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import nn

from ....caching.diffusers_adapters.flux import blocks_replaced, cached_in_each_call
from .. import utils


def apply_IPA_on_transformer(
    transformer: FluxTransformer2DModel, *, ip_adapter_scale: float = 1.0, repo_id: str
) -> FluxTransformer2DModel:
    """Put `IPA_TransformerBlocks` in the front's place, during calls and between them. Leaves `_is_IPA`.

    A cache that has run before is taken over; one that has not is run below, and hides the adapter in its calls.
    """
    front = utils.IPA_TransformerBlocks(
        transformer=transformer,
        ip_adapter_scale=ip_adapter_scale,
        return_hidden_states_first=False,
        device=transformer.device,
    )
    if getattr(transformer, "_is_cached", False):
        front.update_residual_diff_threshold(
            use_double_fb_cache=transformer.use_double_fb_cache,
            residual_diff_threshold_multi=transformer.residual_diff_threshold_multi,
            residual_diff_threshold_single=transformer.residual_diff_threshold_single,
        )
        utils.undo_all_mods_on_transformer(transformer)
        transformer._original_forward = transformer.forward
        transformer._original_blocks = transformer.transformer_blocks
    front.load_ip_adapter_weights_per_layer(repo_id=repo_id)
    blocks, empty = nn.ModuleList([front]), nn.ModuleList()
    transformer.transformer_blocks = blocks
    transformer.single_transformer_blocks = empty
    original_forward = transformer.forward

    @functools.wraps(original_forward)
    def new_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with blocks_replaced(self, blocks, empty):
            return original_forward(*args, **kwargs)

    transformer.forward = new_forward.__get__(transformer)
    transformer._is_IPA = True
    return transformer


def apply_IPA_on_pipe(pipe: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
    """On a cached pipeline, opens a second cache context in every call, inside the first."""
    if getattr(pipe, "_is_cached", False):
        cached_in_each_call(pipe)
    apply_IPA_on_transformer(pipe.transformer, **kwargs)
    return pipe
