"""First-block cache on V2, once put on not to be taken off."""

from typing import Any

from diffusers import DiffusionPipeline

from ...models.transformers.transformer_flux_v2 import NunchakuFluxTransformer2DModelV2
from ..utils_v2 import cached_forward_v2
from .flux import cached_in_each_call


def apply_cache_on_transformer(
    transformer: NunchakuFluxTransformer2DModelV2,
    *,
    use_double_fb_cache: bool = False,
    residual_diff_threshold: float = 0.12,
    residual_diff_threshold_multi: float | None = None,
    residual_diff_threshold_single: float | None = None,
) -> NunchakuFluxTransformer2DModelV2:
    """Replace the transformer's forward. Leaves `_is_cached`, `_original_forward`, `verbose` and three settings.

    A single threshold of None is -1 at the first call and stays None at the next: nunchaku's too.
    """
    multi = residual_diff_threshold if residual_diff_threshold_multi is None else residual_diff_threshold_multi
    single = residual_diff_threshold_single
    if not getattr(transformer, "_is_cached", False):
        transformer._original_forward = transformer.forward
        transformer.verbose = False
        transformer.forward = cached_forward_v2.__get__(transformer, type(transformer))
        transformer._is_cached = True
        single = -1.0 if single is None else single
    transformer.use_double_fb_cache = use_double_fb_cache
    transformer.residual_diff_threshold_multi = multi
    transformer.residual_diff_threshold_single = single
    return transformer


def apply_cache_on_pipe(pipe: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
    """Changes the pipeline's class: a test that calls this has to restore `__call__` and `_is_cached` there."""
    if not getattr(pipe, "_is_cached", False):
        cached_in_each_call(pipe)
    apply_cache_on_transformer(pipe.transformer, **kwargs)
    return pipe
