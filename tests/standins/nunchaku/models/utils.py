"""Padding, weights of four bits, linear layers in one, and offloading block by block."""

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


def fuse_linears(linears: list[nn.Linear]) -> nn.Linear:
    """Layers with the same input as one, their outputs one behind the other. nunchaku leaves the weights empty."""
    biased = all(linear.bias is not None for linear in linears)
    width, dtype = linears[0].in_features, linears[0].weight.dtype
    fused = nn.Linear(width, sum(linear.out_features for linear in linears), bias=biased, dtype=dtype)
    fused.weight.data = torch.cat([linear.weight.data for linear in linears])
    if biased:
        fused.bias.data = torch.cat([linear.bias.data for linear in linears])
    return fused


class CPUOffloadManager:
    """Runs blocks in two buffers, copies of the first block that take the weights of each block in turn.

    Only the first `num_blocks_on_gpu` are run themselves: hooks on the others are not called, and hooks that the first
    block has when this is made are copied. Devices and streams are left out.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        use_pin_memory: bool = True,
        on_gpu_modules: tuple[nn.Module, ...] = (),
        num_blocks_on_gpu: int = 1,
    ):
        if num_blocks_on_gpu < 1:
            raise AssertionError("num_blocks_on_gpu > 0")
        self.blocks, self.num_blocks_on_gpu = blocks, num_blocks_on_gpu
        self.buffer_blocks = [copy.deepcopy(blocks[0]), copy.deepcopy(blocks[0])]

    def get_block(self, block_idx: int) -> nn.Module:
        if block_idx < self.num_blocks_on_gpu:
            return self.blocks[block_idx]
        buffer = self.buffer_blocks[block_idx % 2]
        buffer.load_state_dict(self.blocks[block_idx].state_dict())
        return buffer
