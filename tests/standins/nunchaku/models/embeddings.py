"""Rotary embeddings: nunchaku's table, its packing for the kernels, and the way back."""

import torch
from torch import Tensor, nn

TILE = 256


class NunchakuFluxPosEmbed(nn.Module):
    """V2's module of rotary embeddings."""

    def __init__(self, dim: int, theta: int, axes_dim: list[int]):
        super().__init__()
        self.dim, self.theta, self.axes_dim = dim, theta, axes_dim

    def forward(self, ids: Tensor) -> Tensor:
        return rotary_table(ids, self.theta, self.axes_dim)


def rotary_table(ids: Tensor, theta: int, axes_dim: list[int]) -> Tensor:
    """Position ids (tokens, axes) to a table (1, 1, tokens, head_dim / 2, 1, 2) of sine and cosine, float32."""
    angles = []
    for axis, width in enumerate(axes_dim):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(torch.outer(ids[:, axis].double(), 1.0 / theta**exponents))
    angle = torch.cat(angles, dim=1)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).float()[None, None, :, :, None]


def pack_rotemb(rotemb: Tensor) -> Tensor:
    """(B, M, D/2, 1, 2) float32 to (B, M, D), in the order in which the threads of a 16 x 8 tile read it."""
    batch, tokens, half, one, two = rotemb.shape
    if rotemb.dtype is not torch.float32:
        raise AssertionError(f"rotary embeddings are packed in float32, got {rotemb.dtype}")
    if (one, two) != (1, 2) or tokens % 16 or half % 4:
        raise AssertionError(f"cannot pack rotary embeddings of shape {tuple(rotemb.shape)}")
    tiles = rotemb.reshape(batch, tokens // 16, 2, 8, half // 4, 4, 2)
    return tiles.permute(0, 1, 4, 3, 5, 2, 6).reshape(batch, tokens, 2 * half)


def unpack_rotemb(packed: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Packed embeddings of `tokens` tokens, padded, to diffusers' cosines and sines, each (tokens, D).

    Stands for what the kernels read, and refuses what they would misread.
    """
    if packed.dtype is not torch.float32 or not packed.is_contiguous():
        raise ValueError("packed rotary embeddings must be float32 and contiguous")
    if packed.ndim != 3 or packed.shape[0] != 1 or packed.shape[1] != -(-tokens // TILE) * TILE:
        raise ValueError(
            f"rotary embeddings {tuple(packed.shape)} are not {tokens} tokens, padded to a multiple of 256"
        )
    width = packed.shape[2]
    tiles = packed.reshape(packed.shape[1] // 16, width // 8, 8, 4, 2, 2)
    table = tiles.permute(0, 4, 2, 1, 3, 5).reshape(packed.shape[1], width // 2, 2)[:tokens]
    sine, cosine = table.repeat_interleave(2, dim=1).unbind(-1)
    return cosine, sine
