"""A method, as data: which runs of blocks can be skipped, what is watched, what decides, what stands in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .decisions import Threshold
from .forecasts import Forecast
from .pfs import summarize
from .streams import Streams


@dataclass(frozen=True)
class FirstBlockResidual:
    """The probe of first-block methods: what the stage's first block adds to its input.

    Image tokens only, or text and image tokens in the order of the sequence ([e; h]); pooled to about `pool` tokens
    (None: not pooled), float32.
    """

    with_text: bool = False
    pool: int | None = None

    def __call__(self, before: Streams, after: Streams) -> Tensor:
        residual = after.hidden_states - before.hidden_states
        if self.with_text:
            text = after.encoder_hidden_states - before.encoder_hidden_states
            residual = torch.cat([text, residual], dim=1)
        return summarize(residual, self.pool)


@dataclass(frozen=True)
class Stage:
    """A contiguous run of blocks that is skipped as a unit, all but its first block.

    `groups` are names of the adapter's block lists, in order. `parent` names an earlier stage whose skip forces this
    one.
    """

    name: str
    groups: tuple[str, ...]
    probe: FirstBlockResidual
    rule: Threshold
    forecast: Forecast
    parent: str | None = None

    @property
    def remembers(self) -> tuple:
        """All that shapes the memory: while it stays equal, a changed threshold may go on with what is remembered."""
        return self.name, self.groups, self.probe, self.forecast
