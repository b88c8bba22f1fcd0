"""First-block cache on V1, once put on not to be taken off."""

import functools
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch import nn

from .. import utils
from ..fbcache import cache_context, create_cache_context, get_current_cache_context


def apply_cache_on_transformer(
    transformer: FluxTransformer2DModel,
    *,
    use_double_fb_cache: bool = False,
    residual_diff_threshold: float = 0.12,
    residual_diff_threshold_multi: float | None = None,
    residual_diff_threshold_single: float | None = None,
) -> FluxTransformer2DModel:
    """Replace the transformer's forward. Within a cache context, and only during a call, the front is replaced too.

    Leaves `_original_forward`, `_original_blocks` and three settings; the first cached call leaves `_is_cached`,
    `cached_transformer_blocks` and other `single_transformer_blocks`.
    """
    if not hasattr(transformer, "_original_forward"):
        transformer._original_forward = transformer.forward
    if not hasattr(transformer, "_original_blocks"):
        transformer._original_blocks = transformer.transformer_blocks
    multi = residual_diff_threshold if residual_diff_threshold_multi is None else residual_diff_threshold_multi
    if getattr(transformer, "_is_cached", False):
        transformer.cached_transformer_blocks[0].update_residual_diff_threshold(
            use_double_fb_cache, multi, residual_diff_threshold_single
        )
        return transformer
    front = utils.FluxCachedTransformerBlocks(
        transformer=transformer,
        use_double_fb_cache=use_double_fb_cache,
        residual_diff_threshold_multi=multi,
        residual_diff_threshold_single=residual_diff_threshold_single,
        return_hidden_states_first=False,
    )
    cached, empty, original_forward = nn.ModuleList([front]), nn.ModuleList(), transformer.forward

    @functools.wraps(original_forward)
    def new_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if get_current_cache_context() is None:
            return original_forward(*args, **kwargs)
        with blocks_replaced(self, cached, empty):
            transformer._is_cached = True
            transformer.cached_transformer_blocks = cached
            return original_forward(*args, **kwargs)

    transformer.forward = new_forward.__get__(transformer)
    transformer.use_double_fb_cache = use_double_fb_cache
    transformer.residual_diff_threshold_multi = multi
    transformer.residual_diff_threshold_single = residual_diff_threshold_single
    return transformer


def blocks_replaced(transformer: nn.Module, double: nn.ModuleList, single: nn.ModuleList) -> AbstractContextManager:
    """While open, other blocks. Both lists end up behind the other modules, as after any assignment."""
    return mock.patch.multiple(transformer, transformer_blocks=double, single_transformer_blocks=single)


def cached_in_each_call(pipe: DiffusionPipeline) -> None:
    """Open a new cache context in every call of every pipeline of this class, for ever."""
    original_call = type(pipe).__call__

    @functools.wraps(original_call)
    def new_call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        with cache_context(create_cache_context()):
            return original_call(self, *args, **kwargs)

    type(pipe).__call__ = new_call
    type(pipe)._is_cached = True


def apply_cache_on_pipe(pipe: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
    """Changes the pipeline's class: a test that calls this has to restore `__call__` and `_is_cached` there."""
    if not getattr(pipe, "_is_cached", False):
        cached_in_each_call(pipe)
    apply_cache_on_transformer(pipe.transformer, **kwargs)
    return pipe
