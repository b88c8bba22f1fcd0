"""diffusers' `FluxTransformer2DModel`, and what subclasses or quantizes it without changing its blocks' interface."""

from collections.abc import Sequence
from typing import Any

import torch

from ..stages import Stage
from ..streams import BlockCall, ConcatenatedCall, JointCall, parameter_names, plain
from .base import BlockModules, Denoising, Lead


def onload(block: torch.nn.Module) -> None:
    """Have the weights of a block that diffusers' group offloading keeps elsewhere where the block runs.

    Those that a stream prefetches are waited for: till then they look as if they were there.
    """
    registry = vars(block).get("_diffusers_hook")
    hook = registry.get_hook("group_offloading") if registry is not None else None
    if hook is None:
        return
    group = hook.group
    if any(weight.device == group.offload_device for weight in block.parameters()):
        group.onload_()
    if group.stream is not None:
        group.stream.synchronize()


def as_tuple(sample: torch.Tensor) -> tuple[torch.Tensor]:
    """What a call with return_dict=False returns."""
    return (sample,)


def as_output(sample: torch.Tensor) -> Any:
    """What a call with return_dict=True returns."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


ROTARY = (("diffusers", "FluxPosEmbed"), ("nunchaku", "NunchakuFluxPosEmbed"))  # tables of the position ids alone


class DiffusersFlux:
    """Blocks in `transformer_blocks` (double) and `single_transformer_blocks` (single)."""

    supported = "diffusers' FluxTransformer2DModel"
    timestep_scale = 1000.0

    def supports(self, module: object) -> bool:
        from diffusers import FluxTransformer2DModel

        return isinstance(module, FluxTransformer2DModel)

    def groups(self, transformer: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
        return {"double": list(transformer.transformer_blocks), "single": list(transformer.single_transformer_blocks)}

    def check(self, stages: Sequence[Stage]) -> None:
        """Every method works here."""

    def led(self, transformer: torch.nn.Module) -> dict[torch.nn.Module, Lead]:
        return {}

    def unchanging(self, transformer: torch.nn.Module) -> Sequence[torch.nn.Module]:
        # By class, for there are embeddings that take this one's place and follow the timestep.
        positions = getattr(transformer, "pos_embed", None)
        kind = type(positions)
        return [positions] if (kind.__module__.partition(".")[0], kind.__name__) in ROTARY else []

    def block_call(self, block: torch.nn.Module) -> BlockCall:
        # Single blocks take both streams in today's diffusers, and one concatenated tensor in older and quantized ones.
        call = JointCall if "encoder_hidden_states" in parameter_names(block) else ConcatenatedCall
        return call(block, onload)

    def modules(self, block: torch.nn.Module) -> BlockModules:
        inside = plain(block)
        if hasattr(inside, "ff_context"):
            return BlockModules(
                forecast=(inside.attn, inside.ff, inside.ff_context), image_mlp=inside.ff, text_mlp=inside.ff_context
            )
        # A single block projects attention and MLP together.
        return BlockModules(forecast=(inside.proj_out,), silenced=(inside.attn, inside.proj_mlp))

    def denoising(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Denoising:
        given = dict(zip(parameter_names(transformer), args, strict=False)) | kwargs if args else kwargs
        prompt = given["encoder_hidden_states"]
        return Denoising(
            hidden_states=given["hidden_states"],
            encoder_hidden_states=prompt,
            timestep=given["timestep"],
            img_ids=given["img_ids"],
            txt_ids=given.get("txt_ids"),
            as_returned=as_output if given.get("return_dict", True) else as_tuple,
            branch=(prompt, given["pooled_projections"]),
            adds_between_blocks=given.get("controlnet_block_samples") is not None
            or given.get("controlnet_single_block_samples") is not None,
        )
