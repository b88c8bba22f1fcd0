"""What is watched: a cheap signal, before the blocks of a stage run, of how much they would change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .pfs import summarize
from .streams import Streams


@dataclass(frozen=True)
class Glimpse:
    """What a probe may look at, for one sample of the batch.

    `before` and `after` are the streams around the stage's first block; `after` is None for a probe that does not need
    that block. `modulated` computes the first output of the block's first norm, (1, N, D).
    """

    before: Streams
    after: Streams | None
    modulated: Callable[[], Tensor]


class Probe(Protocol):
    """A float32 tensor with one sample, that relL1 compares between steps."""

    after_first_block: bool

    def __call__(self, glimpse: Glimpse) -> Tensor:
        """(1, ...)"""


@dataclass(frozen=True)
class FirstBlockResidual:
    """The probe of first-block methods: what the stage's first block adds to its input.

    Image tokens only, or text and image tokens in the order of the sequence ([e; h]); pooled to about `pool` tokens
    (None: not pooled), float32.
    """

    with_text: bool = False
    pool: int | None = None
    after_first_block = True

    def __call__(self, glimpse: Glimpse) -> Tensor:
        before, after = glimpse.before, glimpse.after
        residual = after.hidden_states - before.hidden_states
        if self.with_text:
            text = after.encoder_hidden_states - before.encoder_hidden_states
            residual = torch.cat([text, residual], dim=1)
        return summarize(residual, self.pool)


@dataclass(frozen=True)
class ModulatedInput:
    """TeaCache's probe (arXiv 2411.19108): the image tokens as the timestep modulates them, before any block runs."""

    after_first_block = False

    def __call__(self, glimpse: Glimpse) -> Tensor:
        return summarize(glimpse.modulated(), None)
