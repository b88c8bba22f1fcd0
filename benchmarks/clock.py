"""Times of calls that take turns in one process."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

Timed = Callable[[], float]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, from an idle device to an idle device."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def interleaved(cases: list[Timed], repeats: int) -> list[float]:
    """Median seconds of each, the calls taken in turns so that noise of the machine meets all alike."""
    for case in cases:
        for _ in range(5):
            case()
    samples = [[case() for case in cases] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]
