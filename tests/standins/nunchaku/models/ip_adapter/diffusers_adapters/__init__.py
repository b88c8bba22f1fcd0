"""nunchaku's IP-Adapter on a pipeline, by the name of its class."""

from diffusers import DiffusionPipeline

from . import flux

__all__ = ["apply_IPA_on_pipe", "flux"]


def apply_IPA_on_pipe(pipe: DiffusionPipeline, *args, **kwargs) -> DiffusionPipeline:
    if not isinstance(pipe, DiffusionPipeline):
        raise AssertionError(f"{type(pipe).__name__} is no DiffusionPipeline")
    name = type(pipe).__name__
    if not name.startswith(("Flux", "PuLID", "IPAFlux")):
        raise ValueError(f"Unknown pipeline class name: {name}")
    return flux.apply_IPA_on_pipe(pipe, *args, **kwargs)
