"""What is watched: a cheap signal, before the blocks of a stage run, of how much they would change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .pfs import Shards, observe, worst_piece


class ProbeInput(NamedTuple):
    """What a probe may look at, for one sample of the batch.

    Fields:
        before, after: the streams around the stage's first block, each (1, tokens, D), hidden_states first; `after` is
            None for a probe that does not need that block.
        modulated: computes (1, N, D), the image tokens as the timestep modulates them before the block.
        shards: the other processes that have tokens of the same sample; None where there are none.
    """

    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...] | None
    modulated: Callable[[], Tensor]
    shards: Shards | None = None


class Probe(Protocol):
    """A float32 tensor of one sample, that relL1 compares between steps."""

    after_first_block: bool

    def __call__(self, seen: ProbeInput, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tensor (1, ...), and its deviation from `reference`, an earlier one (`pfs.deviation`; None from None)."""


@dataclass(frozen=True)
class FirstBlockResidual:
    """The probe of first-block methods: what the stage's first block adds to its input.

    Image tokens only, or all streams, text before image ([e; h]); pooled to about `pool` tokens (None: not pooled),
    float32. With several `pieces`, equal ones along the pooled tokens, it deviates as the one that changed most.
    """

    with_text: bool = False
    pool: int | None = None
    pieces: int = 1
    after_first_block = True

    def __call__(self, seen: ProbeInput, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert seen.after is not None  # since it is `after_first_block`
        count = len(seen.after) if self.with_text else 1
        after, before = seen.after[:count][::-1], seen.before[:count][::-1]
        if self.pieces == 1:
            return observe(after, before, self.pool, reference, seen.shards)
        if seen.shards is not None:
            raise ValueError("pieces > 1 needs all tokens of an image in one process: set H2CacheConfig.pieces = 1")
        summary, _ = observe(after, before, self.pool, None)
        return summary, None if reference is None else worst_piece(reference, summary, self.pieces)


@dataclass(frozen=True)
class ModulatedInput:
    """TeaCache's probe (arXiv 2411.19108): the image tokens as the timestep modulates them, before any block runs.

    `fitted_for` is the family of models that the rule's polynomial was fitted for; None: for the model in use.
    """

    fitted_for: str | None = None
    after_first_block = False

    def __call__(self, seen: ProbeInput, reference: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return observe((seen.modulated(),), None, None, reference)
