"""A configuration laid out on a transformer, and one call of that transformer on its way through the blocks."""

from dataclasses import dataclass, field

import torch

from .adapters import Denoising
from .config import CacheConfig
from .memory import Context, Moment, Run
from .stages import Stage
from .streams import BlockCall
from .visit import Visit


@dataclass(frozen=True)
class Place:
    """Where a block stands in its stage, and how it is called."""

    stage: Stage
    index: int
    last: int
    call: BlockCall

    @property
    def is_last(self) -> bool:
        return self.index == self.last


@dataclass(frozen=True)
class Method:
    """A configuration laid out on the blocks of one transformer."""

    config: CacheConfig
    places: dict[torch.nn.Module, Place]
    blocks: dict[str, int]
    remembers: tuple


@dataclass
class Call:
    """One call of the denoiser, as far as it has come."""

    method: Method
    denoising: Denoising
    run: Run
    context: Context
    moment: Moment
    visits: dict[str, Visit] = field(default_factory=dict)

    @property
    def text_tokens(self) -> int:
        return self.denoising.encoder_hidden_states.shape[1]
