"""A configuration laid out on a transformer, and one call of that transformer on its way through the blocks."""

from dataclasses import dataclass, field

import torch

from .adapters import Denoising
from .config import CacheConfig
from .memory import Context, Moment, Run, Runs
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
    regroups: bool = False  # what the block returns is clustered anew

    @property
    def is_last(self) -> bool:
        return self.index == self.last


@dataclass(frozen=True)
class ModulePlace:
    """Where a module inside a block stands: its key in the memory, and what may be done with it."""

    stage: Stage
    key: int
    silenced: bool = False  # feeds a forecast module, and is not remembered itself
    refreshed: bool = False  # an MLP whose forecast clusters keep fresh
    is_text: bool = False


@dataclass(frozen=True)
class Method:
    """A configuration laid out on the blocks of one transformer."""

    config: CacheConfig
    places: dict[torch.nn.Module, Place]
    modules: dict[torch.nn.Module, ModulePlace]
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

    def set_time(self, timestep: float, runs: Runs) -> bool:
        """Take note of the call's timestep. True where it shows that the context's memory is of a run before."""
        self.moment.value = timestep
        exact = self.denoising.timestep.dtype in (torch.float32, torch.float64)
        stale = False
        if self.run.starts_over(self.context, timestep, exact):
            # The caller kept its `img_ids` from one run to the next.
            stale, context = self.context.timed, self.context
            self.run = runs.begin(self.denoising.img_ids, self.run.shape, self.run.stages)
            if stale:
                self.context = self.run.context(self.denoising.branch, self.denoising.hidden_states, timestep)
            else:  # new with this run, so its memory is of this run, though its first steps went unread
                self.run.contexts.append(context)
        self.run.note_timestep(self.context, timestep)
        return stale
