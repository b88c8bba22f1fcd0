"""The fused kernels: the MLP of two layers, and the rows of rotary embeddings that the QKV projection reads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.embeddings import TILE, unpack_rotemb
from ..models.linear import SVDQW4A4Linear

ASSERTION = "rotary_emb.shape[0] * rotary_emb.shape[1] == M"


def fused_gelu_mlp(x: Tensor, fc1: SVDQW4A4Linear, fc2: SVDQW4A4Linear) -> Tensor:
    """Both layers in one kernel, which reads their weights: the modules themselves are not called."""
    rows = x.view(-1, x.shape[-1])
    hidden = F.gelu(F.linear(rows, fc1.qweight, fc1.bias), approximate="tanh")
    return F.linear(hidden, fc2.qweight, fc2.bias).view(*x.shape[:-1], -1)


def assert_rotary_rows(rotary: Tensor, batch: int, tokens: int) -> None:
    """Packed rotary embeddings have a row for each of `batch * tokens` rows of the projection, in the same order.

    The projection flattens batch and tokens and pads their product to M, a multiple of 256; tables are padded image by
    image. The real kernel compares only the two numbers, and aborts the process. Where they agree by padding alone,
    it goes on with wrong rows behind the first image; here that is refused too.
    """
    if rotary.dtype is not torch.float32:
        raise AssertionError(f"Assertion failed: rotary_emb.scalar_type() == Tensor::FP32, got {rotary.dtype}")
    if rotary.ndim != 3:
        raise AssertionError(f"Assertion failed: rotary_emb.ndims() == 3, got shape {tuple(rotary.shape)}")
    rows, wanted = rotary.shape[0] * rotary.shape[1], -(-batch * tokens // TILE) * TILE
    if rows != wanted:
        raise AssertionError(f"Assertion failed: {ASSERTION} ({rows} != {wanted})")
    if batch > 1 and (rotary.shape[0] != batch or tokens % TILE):
        raise AssertionError(f"{ASSERTION} holds by padding alone: images behind the first get rows of others")


def rotary_tables(rotary: Tensor, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(cosines, sines), each (B, tokens, D), of embeddings that the projection reads."""
    assert_rotary_rows(rotary, batch, tokens)
    tables = [unpack_rotemb(image.contiguous(), tokens) for image in rotary.split(1)]
    cosines, sines = zip(*tables, strict=True)
    return torch.stack(cosines), torch.stack(sines)
