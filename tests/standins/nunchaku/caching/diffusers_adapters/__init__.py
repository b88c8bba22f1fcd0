"""nunchaku's cache on a pipeline, by the name of its class. A Flux with V2 needs `flux_v2` by name."""

from diffusers import DiffusionPipeline

from . import flux, flux_v2

__all__ = ["apply_cache_on_pipe", "flux", "flux_v2"]


def apply_cache_on_pipe(pipe: DiffusionPipeline, *args, **kwargs) -> DiffusionPipeline:
    """Flux alone here; nunchaku also knows Sana and SDXL."""
    if not isinstance(pipe, DiffusionPipeline):
        raise AssertionError(f"{type(pipe).__name__} is no DiffusionPipeline")
    name = type(pipe).__name__
    if not name.startswith("Flux"):
        raise ValueError(f"Unknown pipeline class name: {name}")
    return flux.apply_cache_on_pipe(pipe, *args, **kwargs)
