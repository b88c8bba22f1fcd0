"""What is watched: a cheap signal, before the blocks of a stage run, of how much they would change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .pfs import observe
from .streams import Streams


class Glimpse(NamedTuple):
    """What a probe may look at, for one sample of the batch.

    `before` and `after` are the streams around the stage's first block; `after` is None for a probe that does not need
    that block. `modulated` computes the first output of the block's first norm, (1, N, D).
    """

    before: Streams
    after: Streams | None
    modulated: Callable[[], Tensor]


class Probe(Protocol):
    """A float32 tensor of one sample, that relL1 compares between steps."""

    after_first_block: bool

    def __call__(self, glimpse: Glimpse, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tensor (1, ...), and its deviation from `reference`, an earlier one (`pfs.deviation`; None from None)."""


@dataclass(frozen=True)
class FirstBlockResidual:
    """The probe of first-block methods: what the stage's first block adds to its input.

    Image tokens only, or text and image tokens in the order of the sequence ([e; h]); pooled to about `pool` tokens
    (None: not pooled), float32.
    """

    with_text: bool = False
    pool: int | None = None
    after_first_block = True

    def __call__(self, glimpse: Glimpse, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        after, before = (
            (streams.encoder_hidden_states, streams.hidden_states) if self.with_text else (streams.hidden_states,)
            for streams in (glimpse.after, glimpse.before)
        )
        return observe(after, before, self.pool, reference)


@dataclass(frozen=True)
class ModulatedInput:
    """TeaCache's probe (arXiv 2411.19108): the image tokens as the timestep modulates them, before any block runs."""

    after_first_block = False

    def __call__(self, glimpse: Glimpse, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return observe((glimpse.modulated(),), None, None, reference)
