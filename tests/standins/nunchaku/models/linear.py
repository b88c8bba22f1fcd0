"""Quantized linear layers, in full precision. They have no `weight`: it is `qweight`, packed in nunchaku."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gemv import assert_gemv_samples


class SVDQW4A4Linear(nn.Module):
    """A linear layer on tokens (B, M, D)."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.qweight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "SVDQW4A4Linear":
        return cls(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        return F.linear(x.reshape(batch * tokens, -1), self.qweight, self.bias).view(batch, tokens, -1)


class AWQW4A16Linear(nn.Module):
    """The linear layer of a modulation, on (B, D). Takes at most eight samples.

    With `chunks`, numbers come as (D, chunks) where diffusers has (chunks, D), and those `from_one` are plus one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, chunks: int = 1, from_one: tuple[int, ...] = ()):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.chunks, self.from_one = chunks, from_one
        self.qweight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Linear, **layout) -> "AWQW4A16Linear":
        return cls(linear.weight, linear.bias, **layout)

    def forward(self, x: Tensor) -> Tensor:
        assert_gemv_samples(len(x))
        chunks = list(F.linear(x, self.qweight, self.bias).unflatten(-1, (self.chunks, -1)).unbind(1))
        for index in self.from_one:
            chunks[index] = 1 + chunks[index]
        return torch.stack(chunks, dim=2).flatten(1)
