"""Padding, and weights of four bits."""

import copy

import torch
from torch import Tensor, nn

GROUP = 64


def pad_tensor(tensor: Tensor, multiples: int, dim: int, fill: float = 0) -> Tensor:
    """`tensor`, filled up along `dim` to a multiple of `multiples`."""
    missing = -tensor.shape[dim] % multiples
    shape = [*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :]]
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim=dim) if missing else tensor


def rounded(weight: Tensor) -> Tensor:
    """A matrix (out, in) as 4-bit numbers give it: per row and group of 64 columns, 15 equal steps about zero."""
    parts = []
    for group in weight.float().split(GROUP, dim=1):
        step = group.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 7
        parts.append((group / step).round().clamp(-8, 7) * step)
    return torch.cat(parts, dim=1).to(weight.dtype)


def quantized(transformer: nn.Module) -> nn.Module:
    """A copy of a diffusers Flux whose blocks have weights of four bits; what is around the blocks stays."""
    made = copy.deepcopy(transformer)
    for block in [*made.transformer_blocks, *made.single_transformer_blocks]:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(rounded(module.weight.data))
    return made
