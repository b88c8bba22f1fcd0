"""Pooled feature summarization (arXiv 2510.27171, PFS) and the metric that every threshold method compares."""

import torch
import torch.nn.functional as F
from torch import Tensor


def summarize(features: Tensor, target: int | None) -> Tensor:
    """A thumbnail of token features, in float32.

    The (B, tokens, channels) tensor is seen as a one-channel image and average-pooled with a square kernel and equal
    stride `s = max(1, tokens // target)`, floor mode, which gives (B, tokens // s, channels // s). `target=None` does
    not pool. The kernel never exceeds the channels, so that no input, however narrow, pools to nothing.
    """
    features = features.float()
    if target is None:
        return features
    stride = max(1, features.shape[1] // target)
    if stride == 1:
        return features
    return F.avg_pool2d(features.unsqueeze(1), (stride, min(stride, features.shape[2]))).squeeze(1)


def deviation(reference: Tensor, current: Tensor) -> Tensor:
    """`[mean|reference - current|, mean|reference|]`, shape (2,), on the device; relL1 is their quotient."""
    return torch.stack([(reference - current).abs().mean(), reference.abs().mean()])


def relative_l1(deviations: list[list[float]]) -> float:
    """relL1 of one sample, or of several taken as one tensor: the quotient of summed means.

    NaN when it is undefined (zero or non-finite reference, non-finite current), and NaN is below no threshold.
    """
    difference, magnitude = (sum(column) for column in zip(*deviations, strict=True))
    return difference / magnitude if magnitude > 0 else float("nan")
