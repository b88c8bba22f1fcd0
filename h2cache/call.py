"""A configuration laid out on a transformer, and one call of that transformer on its way through the blocks."""

from dataclasses import dataclass, field

import torch

from .adapters import BlockModules, Denoising
from .config import CacheConfig
from .memory import Context, Moment, Run, Runs
from .stages import Stage
from .streams import BlockCall
from .visit import Visit


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block stands in its stage, and how it is called."""

    stage: Stage
    index: int
    is_last: bool
    call: BlockCall | None  # None: the place is no block's, but the model's
    regroups: bool = False  # what the block returns is clustered anew


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """Where a module inside a block stands: its key in the memory, and what may be done with it."""

    stage: Stage
    key: int
    silenced: bool = False  # feeds a forecast module, and is not remembered itself
    refreshed: bool = False  # an MLP whose forecast clusters keep fresh
    is_text: bool = False


def module_places(stage: Stage, inside: list[BlockModules]) -> dict[torch.nn.Module, ModulePlace]:
    """Where the modules inside the blocks of a stage stand, numbered in the order of the network."""
    places: dict[torch.nn.Module, ModulePlace] = {}
    for parts in inside:
        for module in parts.forecast:
            mlp = stage.clusters is not None and module in (parts.image_mlp, parts.text_mlp)
            places[module] = ModulePlace(stage, len(places), refreshed=mlp, is_text=module is parts.text_mlp)
        for module in parts.silenced:
            places[module] = ModulePlace(stage, len(places), silenced=True)
    return places


@dataclass(frozen=True)
class Method:
    """A configuration laid out on the blocks of one transformer."""

    config: CacheConfig
    places: dict[torch.nn.Module, Place]
    modules: dict[torch.nn.Module, ModulePlace]
    blocks: dict[str, int]
    remembers: tuple
    undivided: bool  # one stage takes all blocks
    output: Place | None = None  # of the stage that is the whole call, if there is one


@dataclass(slots=True)
class Call:
    """One call of the denoiser, as far as it has come."""

    method: Method
    denoising: Denoising
    run: Run
    context: Context
    moment: Moment
    text_tokens: int
    visits: dict[str, Visit] = field(default_factory=dict)

    def set_time(self, timestep: float, runs: Runs) -> bool:
        """Take note of the call's timestep. True where it shows that the context's memory is of a run before."""
        self.moment.value = timestep
        exact = self.denoising.timestep.dtype in (torch.float32, torch.float64)
        stale = False
        if self.run.starts_over(self.context, timestep, exact):
            # The caller kept its `img_ids` from one run to the next.
            stale, context, run = self.context.timed, self.context, self.run
            self.run = runs.begin(self.denoising.img_ids, run.shape, run.stages, run.conditions)
            if stale:
                self.context = self.run.context(self.denoising.branch, self.denoising.hidden_states, timestep)
            else:  # new with this run, so its memory is of this run, though its first steps went unread
                self.run.contexts.append(context)
        self.run.note_timestep(self.context, timestep)
        return stale
