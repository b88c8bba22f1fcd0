"""Pooled feature summarization (arXiv 2510.27171, PFS) and the metric that every threshold method compares."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Shards(Protocol):
    """Processes that have each a contiguous piece of every part of a token sequence."""

    def lengths(self, parts: Sequence[Tensor]) -> list[list[int]]:
        """By part, the tokens in each process; `parts`, each (1, tokens, C), are those of this process."""

    def joined(self, parts: Sequence[Tensor], lengths: list[list[int]]) -> Tensor:
        """(1, tokens, C): the whole sequence, in every process."""


def strides(tokens: int, channels: int, target: int | None) -> tuple[int, int]:
    """The tokens and the channels that one value of the thumbnail stands for.

    Both are `max(1, tokens // target)`; the second never exceeds the channels, so that no input, however narrow, pools
    to nothing. `target=None` does not pool.
    """
    stride = 1 if target is None else max(1, tokens // target)
    return stride, min(stride, channels)


def summarize(features: Tensor, target: int | None) -> Tensor:
    """A thumbnail of token features, in float32.

    The (B, tokens, channels) tensor is seen as a one-channel image and average-pooled with a square kernel and equal
    stride s (`strides`), floor mode, which gives (B, tokens // s, channels // s).
    """
    _, tokens, channels = features.shape
    return pooled(features, strides(tokens, channels, target))


def pooled(features: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Float32 means over windows of so many tokens and channels, side by side; what fills no window is left out."""
    features = features.float()
    return features if kernel == (1, 1) else F.avg_pool2d(features.unsqueeze(1), kernel).squeeze(1)


def deviation(reference: Tensor, current: Tensor) -> Tensor:
    """`[mean|reference - current|, mean|reference|]`, shape (2,), on the device; relL1 is their quotient."""
    return torch.stack([(reference - current).abs_().mean(), reference.abs().mean()])


def worst_piece(reference: Tensor, current: Tensor, pieces: int) -> Tensor:
    """The deviation of the one of so many equal pieces along the tokens whose relL1 is largest, shape (2,).

    A piece without magnitude has no relL1, and is taken before all others, so that nothing hits.
    """
    pairs = zip(reference.tensor_split(pieces, dim=1), current.tensor_split(pieces, dim=1), strict=True)
    deviations = torch.stack([deviation(*pair) for pair in pairs if pair[0].numel()])
    ratios = deviations[:, 0] / deviations[:, 1]
    return deviations[torch.where(deviations[:, 1] > 0, ratios, torch.inf).argmax()]


def observe(
    after: Sequence[Tensor],
    before: Sequence[Tensor] | None,
    target: int | None,
    reference: Tensor | None,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The thumbnail of one sample's features, and its deviation from `reference` (None: from nothing).

    `after` are the parts of the token sequence in order, each (1, tokens, D); with `before`, of the same shapes, it is
    what was added to these that is summarized. On CUDA one fused pass does it all (`pfs_triton.py`).

    With `shards` the windows are those of the whole sequence. The thumbnail is of the tokens in this process where all
    windows lie within one piece, else of the whole sequence, in every process.
    """
    lengths = [] if shards is None or target is None else shards.lengths(after)
    tokens = sum(map(sum, lengths)) or sum(part.shape[1] for part in after)
    kernel = strides(tokens, after[0].shape[2], target)
    apart = all(tokens % kernel[0] == 0 for part in lengths for tokens in part)
    fused = _fused() if apart and after[0].is_cuda and len(after) <= 2 and _alike(after, before or after) else None
    if fused is not None:
        return fused(after, before, kernel, reference)
    changes = after if before is None else [a - b for a, b in zip(after, before, strict=True)]
    if shards is None or apart:
        summary = pooled(changes[0] if len(changes) == 1 else torch.cat(changes, dim=1), kernel)
    else:
        narrow = [pooled(part, (1, kernel[1])) for part in changes]
        summary = pooled(shards.joined(narrow, lengths), (kernel[0], 1))
    return summary, None if reference is None else deviation(reference, summary)


@cache
def _fused() -> Callable | None:
    """The fused `observe`; None where Triton is not installed."""
    try:
        from .pfs_triton import observe
    except ImportError:
        return None
    return observe


def _alike(after: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether tokens lie in both as the fused pass reads them: equally far apart, their channels side by side."""
    return all(
        a.stride(2) == b.stride(2) == 1 and a.stride(1) == b.stride(1) for a, b in zip(after, before, strict=True)
    )


def relative_l1(deviations: Sequence[Sequence[float]]) -> float:
    """relL1 of one sample, or of several taken as one tensor: the quotient of summed means.

    NaN when it is undefined (zero or non-finite reference, non-finite current), and NaN is below no threshold.
    """
    difference, magnitude = map(sum, zip(*deviations, strict=True))
    return difference / magnitude if magnitude > 0 else float("nan")
