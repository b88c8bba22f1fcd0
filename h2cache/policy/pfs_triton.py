"""The probe of `pfs.observe` in one pass, for CUDA: subtract, pool, compare and reduce, reading each feature once.

Op by op the same takes six passes over tensors of the features' size, half of them in float32. Sums are taken in
another order, so that a metric may differ in its last float32 digits; they do not depend on the order in which the
programs of the kernel run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # features that a program holds at a time: all that is pooled into its columns, of one token


@triton.jit
def _tile(after, before, token, token_stride, at, inside, HAS_BEFORE: tl.constexpr):
    """One token's features of a tile, less what they were before the block, rounded as a subtraction of its own is."""
    features = tl.load(after + token * token_stride + at, mask=inside, other=0.0)
    if HAS_BEFORE:
        earlier = tl.load(before + token * token_stride + at, mask=inside, other=0.0)
        features = (features.to(tl.float32) - earlier.to(tl.float32)).to(features.dtype)
    return features.to(tl.float32)


@triton.jit
def _observe(
    text_after,
    text_before,
    image_after,
    image_before,
    reference,
    summary,
    sums,
    text_tokens,
    text_stride,
    image_stride,
    columns,
    POOL_TOKENS: tl.constexpr,
    POOL_CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
):
    """One row of the thumbnail, `COLUMNS` of its columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.arange(0, PADDED)
    at = column[:, None] * POOL_CHANNELS + channel[None, :]
    inside = (column < columns)[:, None] & (channel < POOL_CHANNELS)[None, :]
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in range(POOL_TOKENS):
        token = row * POOL_TOKENS + i
        if token < text_tokens:
            total += tl.sum(_tile(text_after, text_before, token, text_stride, at, inside, HAS_BEFORE), 1)
        else:
            token -= text_tokens
            total += tl.sum(_tile(image_after, image_before, token, image_stride, at, inside, HAS_BEFORE), 1)
    mean = total / (POOL_TOKENS * POOL_CHANNELS)
    place = row * columns + column
    tl.store(summary + place, mean, mask=column < columns)
    if HAS_REFERENCE:
        known = tl.load(reference + place, mask=column < columns, other=0.0)
        program = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(sums + 2 * program, tl.sum(tl.abs(known - tl.where(column < columns, mean, 0.0)), 0))
        tl.store(sums + 2 * program + 1, tl.sum(tl.abs(known), 0))


def observe(
    after: Sequence[Tensor], before: Sequence[Tensor] | None, strides: tuple[int, int], reference: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What `pfs.observe` returns, `strides` being the tokens and channels that one value of the thumbnail pools."""
    image, text = after[-1], after[0] if len(after) > 1 else None
    earlier = after if before is None else before
    text_tokens = 0 if text is None else text.shape[1]
    rows, columns = (text_tokens + image.shape[1]) // strides[0], image.shape[2] // strides[1]
    padded = triton.next_power_of_2(strides[1])
    width = max(1, TILE // padded)
    grid = (rows, triton.cdiv(columns, width))
    summary = torch.empty((1, rows, columns), dtype=torch.float32, device=image.device)
    sums = torch.empty((grid[0] * grid[1], 2), dtype=torch.float32, device=image.device)
    _observe[grid](
        image if text is None else text,
        earlier[0],
        image,
        earlier[-1],
        summary if reference is None else reference.contiguous(),
        summary,
        sums,
        text_tokens,
        0 if text is None else text.stride(1),
        image.stride(1),
        columns,
        POOL_TOKENS=strides[0],
        POOL_CHANNELS=strides[1],
        PADDED=padded,
        COLUMNS=width,
        HAS_BEFORE=before is not None,
        HAS_REFERENCE=reference is not None,
    )
    return summary, None if reference is None else sums.sum(dim=0) / (rows * columns)
