"""A configuration laid out on the blocks of one transformer, and one call of that transformer."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from ..adapters.base import Adapter, BlockModules, ModelCall, Role
from ..adapters.block_call import BlockCall, plain
from ..config import CacheConfig
from ..policy.stages import DETAIL, STRUCTURE, ModuleStage, Stage
from ..trace import Trace
from .collectives import Ranks
from .in_place import InPlaceGuard
from .run_state import Context, Timestep
from .runs import Run, Runs

if TYPE_CHECKING:
    from .stage_step import StageStep


@dataclass(frozen=True, slots=True)
class BlockSlot:
    """Where a block stands in its stage, and how it is called."""

    stage: Stage
    index: int
    is_last: bool
    call: BlockCall
    modulated: Callable  # TeaCache's probe, by the block's arguments
    reclusters: bool = False  # what the block returns is clustered anew


@dataclass(frozen=True, slots=True)
class ModuleSlot:
    """Where a module inside a block stands: its key in the memory, and what may be done with it."""

    stage: Stage
    key: int
    upstream_only: bool = False  # feeds a forecast module, and is not remembered itself
    refreshed: bool = False  # an MLP whose forecast clusters keep fresh
    is_text: bool = False


@dataclass(frozen=True)
class Layout:
    """A configuration laid out on the blocks of one transformer.

    Fields:
        config: what was asked for.
        lists: the model's block lists.
        slots, modules: where each block and each module stands.
        watched: the modules that are skipped inside blocks: the block's children, the name there, the module.
        blocks: number of blocks of each stage.
        memory_layout: all that shapes the memory of a run.
        single_stage: one stage takes all blocks.
        measures: a probe is looked at, which reads the device.
    """

    config: CacheConfig
    lists: dict[Role, list[nn.Module]]
    slots: dict[nn.Module, BlockSlot]
    modules: dict[nn.Module, ModuleSlot]
    watched: list[tuple[dict[str, nn.Module | None], str, nn.Module]]
    blocks: dict[str, int]
    memory_layout: tuple
    single_stage: bool
    measures: bool


@dataclass(slots=True)
class Call:
    """One call of the model, as far as it has come. `begin_run` begins a new run with it.

    Fields that the engine hands on: `runs`, `guard`, `trace`; `ranks`, which share the tokens; None where none do.
    """

    layout: Layout
    model_call: ModelCall
    run: Run
    context: Context
    timestep: Timestep
    begin_run: Callable[[ModelCall], Run]
    runs: Runs
    guard: InPlaceGuard
    trace: Trace
    ranks: Ranks | None
    steps: dict[str, "StageStep"] = field(default_factory=dict)

    def is_last_step(self) -> bool:
        """Whether this step is known to be the last of its run."""
        return self.run.at_end_of_table or self.context.is_last_step(self.timestep)

    def set_time(self, timestep: float) -> bool:
        """Take note of the call's timestep. True where it shows that the context's memory is of a run before."""
        self.timestep.value = timestep
        self.runs.note_timestep(self.run, timestep)
        stale = False
        if self.run.is_over(self.context, timestep, self.timestep.exact):
            # The caller kept what names the run from one run to the next.
            stale, context = self.context.timed, self.context
            self.run = self.begin_run(self.model_call)
            if stale:
                self.context = self.run.context(self.model_call.branch, self.model_call.hidden_states, timestep)
            else:  # new with this run, so its memory is of this run, though its first steps went unread
                self.run.contexts.append(context)
        self.run.note_timestep(self.context, timestep)
        return stale


class InProgress(threading.local):
    """The call of the model that is in progress on this thread, if there is one."""

    call: Call | None = None


def split_blocks(lists: dict[Role, list[nn.Module]], split: float) -> dict[str, list[nn.Module]]:
    """The blocks by the role that stages name: structure and detail.

    Args:
        lists: the model's block lists. A lone list (`Role.ALL`) is split in two.
        split: the fraction of a lone list that is structure; each part has one block at least, if there are two.
    """
    if Role.ALL not in lists:
        return {str(role): blocks for role, blocks in lists.items()}
    blocks = lists[Role.ALL]
    first = min(max(round(split * len(blocks)), 1), max(len(blocks) - 1, 1))
    return {STRUCTURE: blocks[:first], DETAIL: blocks[first:]}


def lay_out(config: CacheConfig, adapter: Adapter, transformer: nn.Module) -> Layout:
    """`config` on the blocks that the model has now. ValueError where the model cannot have the method's stages."""
    lists, stages = adapter.blocks(transformer), config.compose()
    adapter.check(stages)
    role_of = {block: role for role, blocks in lists.items() for block in blocks}
    by_role = split_blocks(lists, config.split_fraction)
    slots: dict[nn.Module, BlockSlot] = {}
    modules: dict[nn.Module, ModuleSlot] = {}
    blocks: dict[str, int] = {}
    for stage in stages:
        members = [block for role in stage.roles for block in by_role.get(role, ())]
        blocks[stage.name] = len(members)
        if not members:
            raise ValueError(
                f"{adapter.family} has no blocks for the stage {stage.name!r} of {type(config).__name__}: use a method "
                "with one stage, such as BlockCacheConfig"
            )
        calls = {block: adapter.block_call(role_of[block], block) for block in members}
        reclusters = None
        if isinstance(stage, ModuleStage):
            inside = {block: adapter.modules(plain(block)) for block in members}
            refuse_missing_modules(stage, adapter, list(inside.values()))
            modules |= module_slots(stage, list(inside.values()))
            if stage.clusters is not None:
                with_tokens = [b for b in members if inside[b].image_mlp is not None and calls[b].returns_all]
                reclusters = with_tokens[-1]
        for index, block in enumerate(members):
            last = index == len(members) - 1
            slots[block] = BlockSlot(stage, index, last, calls[block], adapter.modulated, block is reclusters)
    children = [plain(block)._modules for block in slots]
    return Layout(
        config=config,
        lists=lists,
        slots=slots,
        modules=modules,
        watched=[(parts, name, part) for parts in children for name, part in parts.items() if part in modules],
        blocks=blocks,
        memory_layout=(*(stage.memory_layout for stage in stages), tuple(blocks.items())),
        single_stage=len(stages) == 1 and len(slots) == len(role_of),
        measures=any(stage.probe is not None for stage in stages),
    )


def refuse_missing_modules(stage: ModuleStage, adapter: Adapter, inside: list[BlockModules]) -> None:
    """Raise ValueError, naming the alternative, where the blocks do not have the modules that the stage needs."""
    if not any(parts.forecast for parts in inside):
        raise ValueError(
            f"{adapter.family} has no modules inside its blocks that could be skipped one by one: use "
            'granularity="stage"'
        )
    if stage.clusters is not None and not any(parts.image_mlp is not None for parts in inside):
        raise ValueError(
            f"{adapter.family} has no MLP on image tokens alone that clusters could refresh (ClusCa): use "
            "TaylorSeerConfig or HiCacheConfig"
        )


def module_slots(stage: ModuleStage, inside: list[BlockModules]) -> dict[nn.Module, ModuleSlot]:
    """Where the modules inside the blocks of a stage stand, numbered in the order of the network."""
    slots: dict[nn.Module, ModuleSlot] = {}
    for parts in inside:
        for module in parts.forecast:
            mlp = stage.clusters is not None and module in (parts.image_mlp, parts.text_mlp)
            slots[module] = ModuleSlot(stage, len(slots), refreshed=mlp, is_text=module is parts.text_mlp)
        for module in parts.upstream_only:
            slots[module] = ModuleSlot(stage, len(slots), upstream_only=True)
    return slots
