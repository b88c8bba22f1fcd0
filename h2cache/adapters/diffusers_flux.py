"""diffusers' `FluxTransformer2DModel`, and what subclasses or quantizes it without changing its blocks' interface."""

import inspect
from typing import Any

import torch

from ..streams import BlockCall, ConcatenatedCall, JointCall
from .base import Denoising


class DiffusersFlux:
    """Blocks in `transformer_blocks` (double) and `single_transformer_blocks` (single)."""

    supported = "diffusers' FluxTransformer2DModel"
    timestep_scale = 1000.0

    def supports(self, module: object) -> bool:
        from diffusers import FluxTransformer2DModel

        return isinstance(module, FluxTransformer2DModel)

    def groups(self, transformer: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
        return {"double": list(transformer.transformer_blocks), "single": list(transformer.single_transformer_blocks)}

    def block_call(self, block: torch.nn.Module) -> BlockCall:
        # Single blocks take both streams in today's diffusers, and one concatenated tensor in older and quantized ones.
        joint = "encoder_hidden_states" in inspect.signature(type(block).forward).parameters
        return JointCall(block) if joint else ConcatenatedCall(block)

    def denoising(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Denoising:
        names = tuple(inspect.signature(type(transformer).forward).parameters)[1:] if args else ()
        given = dict(zip(names, args, strict=False)) | kwargs
        prompt = given["encoder_hidden_states"]
        return Denoising(
            hidden_states=given["hidden_states"],
            encoder_hidden_states=prompt,
            timestep=given["timestep"],
            img_ids=given["img_ids"],
            branch=(prompt, given["pooled_projections"]),
        )
