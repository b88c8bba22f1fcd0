"""One call of the model, in order: identify the run, go from block to block, close the step. Read this first.

The model's own forward runs unchanged. The engine sees each call of the model and of its blocks from outside
(`interception.py`). Which run, branch and step a call belongs to is told by `run_state.py`; what happens at a block by
`block_stage.py`; hit or compute by `decide.py`. Methods that skip inside blocks let the blocks run and answer for their
modules (`modules.py`). What returns the same at every step of a run is run once (`rope_cache.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters.base import Adapter, BlockLoop, ModelCall, RunBlocks
from ..adapters.block_call import arguments_by_name
from ..adapters.other_caches import refuse_hooked_caches, refuse_other_caches
from ..trace import Trace
from .block_stage import run_block
from .collectives import as_split, ranks_of
from .in_place import InPlaceGuard
from .interception import Interception, interception_of
from .layout import Call, InProgress, Layout, lay_out
from .modules import answer
from .rope_cache import answer_once
from .run_state import Timestep
from .runs import Run, Runs, TablePlace

PartCall = Callable[[Call, Callable, tuple, dict[str, Any]], Any]  # what is done in place of a call of a part


class Engine:
    """Attaches a method to one transformer instance. Made and undone by `h2cache.apply` and its handle."""

    def __init__(self, transformer: nn.Module, adapter: Adapter, layout: Layout, trace: Trace):
        self.transformer = transformer
        self.adapter = adapter
        self.trace = trace
        self.replaced = False  # by a later `h2cache.apply`
        self.runs = Runs()
        self._guard = InPlaceGuard()
        self._active = InProgress()
        self._interceptions: list[Interception] = []
        self.use(layout)

    # Attaching: which modules are watched, and how that is kept up to date.

    def use(self, layout: Layout) -> None:
        """Follow `layout` from the next call on. Runs in progress go on where what they remember still serves.

        Sees the calls of the model, its blocks, and the modules that the method skips or that need run but once.
        """
        self.layout = layout
        self.trace.expect(layout.blocks)
        loops = self.adapter.block_loops(self.transformer)
        parts: dict[nn.Module, PartCall] = {module: partial(run_loop, run) for module, run in loops.items()}
        for module in self.adapter.position_modules(self.transformer):
            # Not one that it shares with another transformer which has a cache: whose call it sees is not known there.
            if getattr(interception_of(module), "owner", self) is self:
                parts[module] = partial(answer_once, module)
        for blocks in layout.lists.values():
            parts |= {block: partial(run_block, block) for block in blocks}
        parts |= {module: partial(answer, module) for module in layout.modules}
        handlers: dict[nn.Module, Callable] = {self.transformer: self._call_model}
        handlers |= {module: partial(self._call_part, part_call) for module, part_call in parts.items()}
        known = {interception.module: interception for interception in self._interceptions}
        for module in known.keys() - handlers.keys():
            known[module].detach()
        self._interceptions = [
            known[module] if module in known else Interception(module, handler, self)
            for module, handler in handlers.items()
        ]
        self._attach()

    def _attach(self) -> None:
        """Put every interception in its place, around what may have been compiled since the last call."""
        for interception in self._interceptions:
            interception.attach()

    def detach(self, replaced: bool = False) -> None:
        """Leave the transformer as it was found, and hold nothing of any run. Another engine may have `replaced` it."""
        self.replaced |= replaced
        interceptions, self._interceptions = self._interceptions, []
        for interception in interceptions:
            interception.detach()
        self.runs.clear()

    @property
    def attached(self) -> bool:
        """Whether this engine is at work: neither removed nor replaced."""
        return bool(self._interceptions)

    def _refresh(self) -> None:
        """Meet what happened to the transformer since the last call: modules compiled, wrapped or replaced."""
        if not self.attached:
            return  # removed by another thread while this call was on its way
        refuse_other_caches(self.transformer)
        other_blocks = self.adapter.blocks(self.transformer) != self.layout.lists
        if other_blocks:
            self.detach()
        # Of modules inside blocks, PEFT wraps the ones that it adapts.
        if other_blocks or any(children.get(name) is not module for children, name, module in self.layout.watched):
            self.use(lay_out(self.layout.config, self.adapter, self.transformer))
        else:
            self._attach()

    # One call of the model.

    def _call_model(self, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of the model: identify the run, let it go from block to block, close the step."""
        self._refresh()
        call = self._open(args, kwargs)
        outer = self._active.call
        try:
            self._active.call = call
            output = original_forward(*args, **kwargs)
        except BaseException:
            # Half of this step may be remembered; a caller that tries again must not build on it.
            self.runs.discard(call.run)
            raise
        finally:
            self._active.call = outer
        call.context.close(call.timestep)
        if call.run.at_end_of_table:
            call.context.clear()  # also where the caller keeps the embeddings that name the run
        return output

    def _open(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """Identify the run, the branch and the step of a call."""
        model_call, ranks = self.adapter.model_call(self.transformer, args, kwargs), ranks_of(self.transformer)
        if ranks is not None:  # they share the tokens of the text, too
            split = as_split(self.transformer, arguments_by_name(self.transformer, args, kwargs))
            model_call = model_call._replace(text_tokens=self.adapter.describe(split).text_tokens)
        hidden_states, timestep = model_call.hidden_states, model_call.timestep
        layout, place = self.layout, TablePlace.of(timestep)
        kind = hidden_states.shape, hidden_states.dtype, hidden_states.device, model_call.batch, layout.memory_layout
        begin = partial(self._begin, layout, kind)
        run = self.runs.find(model_call, kind, place) or begin(model_call)
        # Only the value of the timestep can tell this run from the next one where the caller may keep what names the
        # run and no place in the scheduler's table tells. A method that measures reads it with the first probe.
        must_read = not (layout.measures or run.has_own_name or not run.contexts) and run.goes_on_at(place) is not True
        known = timestep.tolist()[0] if must_read or timestep.device.type == "cpu" else None
        run.note_place(place)
        context = run.context(model_call.branch, hidden_states, known)
        # All of a batch have the same timestep, of which one is kept.
        exact = timestep.dtype in (torch.float32, torch.float64) or not timestep.is_floating_point()
        noted = Timestep(timestep[:1] if known is None else known, self.adapter.timestep_scale, exact)
        call = Call(layout, model_call, run, context, noted, begin, self.runs, self._guard, self.trace, ranks)
        if known is None:
            run.unread.append(noted)
        else:
            call.set_time(known)
        call.context.note_input(hidden_states, known)
        self.runs.note_call(model_call, call.run)
        return call

    def _begin(self, layout: Layout, kind: tuple, model_call: ModelCall) -> Run:
        refuse_hooked_caches(self.transformer)
        number = self.trace.begin_run(layout.blocks, sum(map(len, layout.lists.values())))
        return self.runs.begin(model_call, number, kind)

    def _call_part(self, part_call: PartCall, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of a part of the model: `part_call` during a call of the model, unchanged on its own.

        RuntimeError where the part is called by a model whose calls we no longer see.
        """
        call = self._active.call
        if call is not None:
            return part_call(call, original_forward, args, kwargs)
        if interception_of(self.transformer) is None:
            raise RuntimeError(
                "the transformer was compiled as a whole after h2cache.apply, so its cache cannot work: compile its "
                "blocks instead, with transformer.compile_repeated_blocks(), or remove the cache first"
            )
        return original_forward(*args, **kwargs)


def run_loop(run: RunBlocks, call: Call, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One call of a module that hides blocks, led through them."""
    single_stage = call.layout.single_stage and not call.model_call.adds_between_blocks
    return run(BlockLoop(call.model_call, single_stage, call.context.once), original_forward, args, kwargs)
