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
from ..config import CacheConfig
from ..trace import Trace
from .block_stage import run_block
from .collectives import as_split, ranks_of
from .in_place import InPlaceGuard
from .interception import Interception, interception_of
from .layout import Call, InProgress, Layout, lay_out, watched_modules
from .modules import answer, run_block_of_modules
from .rope_cache import answer_once, not_shared
from .run_state import Timestep
from .runs import Run, Runs, TablePlace


class Engine:
    """Attaches a method to one transformer instance. Made and undone by `h2cache.apply` and its handle."""

    def __init__(self, transformer: nn.Module, adapter: Adapter, config: CacheConfig, trace: Trace):
        self.transformer = transformer
        self.adapter = adapter
        self.trace = trace
        self.replaced = False  # by a later `h2cache.apply`
        self.runs = Runs()
        self._guard = InPlaceGuard()
        self._active = InProgress()
        self._interceptions: list[Interception] = []
        self.use(config)

    # Attaching: which modules are watched, and how that is kept up to date.

    def use(self, config: CacheConfig) -> None:
        """Follow `config` from the next call on, on the blocks that the model has now.

        Runs in progress go on where what they remember still serves.
        """
        self._lists = self.adapter.blocks(self.transformer)
        self.layout = lay_out(config, self.adapter, self._lists)
        self._watched_modules = watched_modules(self.layout)
        self.trace.expect(self.layout.blocks)
        self._intercept()

    def _intercept(self) -> None:
        """See the calls of the model, its blocks, and the modules that the method skips or that need run but once."""
        handlers: dict[nn.Module, Callable] = {self.transformer: self._call_model}
        loops = self.adapter.block_loops(self.transformer)
        handlers |= {module: partial(self._call_loop, run) for module, run in loops.items()}
        positions = not_shared(self.adapter.position_modules(self.transformer), self)
        handlers |= {module: partial(answer_once, self._active, module) for module in positions}
        for blocks in self._lists.values():
            handlers |= {block: partial(self._call_block, block) for block in blocks}
        handlers |= {module: partial(self._call_module, module) for module in self.layout.modules}
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

    def detach(self) -> None:
        """Leave the transformer as it was found, and hold nothing of any run."""
        interceptions, self._interceptions = self._interceptions, []
        for interception in interceptions:
            interception.detach()
        self.runs.clear()

    def replace(self) -> None:
        """Detach in favour of another engine."""
        self.detach()
        self.replaced = True

    def check(self, config: CacheConfig) -> None:
        """Raise ValueError where the model cannot have this method."""
        lay_out(config, self.adapter, self._lists)

    @property
    def attached(self) -> bool:
        """Whether this engine is at work: neither removed nor replaced."""
        return bool(self._interceptions)

    def _refresh(self) -> None:
        """Meet what happened to the transformer since the last call: modules compiled, wrapped or replaced."""
        if not self.attached:
            return  # removed by another thread while this call was on its way
        refuse_other_caches(self.transformer)
        if self.adapter.blocks(self.transformer) != self._lists:
            self.detach()
            self.use(self.layout.config)
        elif self._modules_replaced():
            self.use(self.layout.config)
        else:
            self._attach()

    def _modules_replaced(self) -> bool:
        """Whether blocks have others in the place of modules that are watched: PEFT wraps the ones it adapts."""
        return any(children.get(name) is not module for children, name, module in self._watched_modules)

    # One call of the model.

    def _call_model(self, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of the model: identify the run, let it go from block to block, close the step."""
        self._refresh()
        call = self._open(self._read(args, kwargs))
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

    def _read(self, args: tuple, kwargs: dict[str, Any]) -> ModelCall:
        """What a call says. The length of the text is that of this rank's tokens, where ranks share them."""
        read = self.adapter.model_call(self.transformer, args, kwargs)
        if ranks_of(self.transformer) is None:
            return read
        given = arguments_by_name(self.transformer, args, kwargs)
        own = self.adapter.describe(as_split(self.transformer, given))
        return read._replace(text_tokens=own.text_tokens)

    def _open(self, model_call: ModelCall) -> Call:
        """Identify the run, the branch and the step of a call."""
        hidden_states, timestep = model_call.hidden_states, model_call.timestep
        shape = hidden_states.shape, hidden_states.dtype, hidden_states.device, model_call.batch
        place = TablePlace.of(timestep)
        run, layout = self.runs.find(model_call, shape, place), self.layout
        if run is None or run.memory_layout != layout.memory_layout:
            run = self._begin(layout, shape, model_call)
        known = timestep.tolist()[0] if timestep.device.type == "cpu" or self._must_read(run, layout, place) else None
        run.note_place(place)
        context = run.context(model_call.branch, hidden_states, known)
        # All of a batch have the same timestep, of which one is kept.
        exact = timestep.dtype in (torch.float32, torch.float64) or not timestep.is_floating_point()
        noted = Timestep(timestep[:1] if known is None else known, self.adapter.timestep_scale, exact)
        begin = partial(self._begin, layout, shape)
        ranks = ranks_of(self.transformer)
        call = Call(layout, model_call, run, context, noted, begin, self.runs, self._guard, self.trace, ranks)
        if known is None:
            run.unread.append(noted)
        else:
            call.set_time(known)
        call.context.note_input(hidden_states, known)
        self.runs.note_call(model_call, call.run)
        return call

    def _begin(self, layout: Layout, shape: tuple, model_call: ModelCall) -> Run:
        refuse_hooked_caches(self.transformer)
        number = self.trace.begin_run(layout.blocks, sum(map(len, self._lists.values())))
        return self.runs.begin(model_call, number, shape, layout.memory_layout)

    def _must_read(self, run: Run, layout: Layout, place: TablePlace | None) -> bool:
        """Whether only the value of the timestep can tell this run from the next one.

        That is so where the caller may keep what names the run, no place in the scheduler's table tells, and the method
        never reads the device.
        """
        if layout.measures or run.has_own_name or not run.contexts:
            return False
        return run.goes_on_at(place) is not True

    # One call of a block, of a module inside it, of a module that hides blocks.

    def _call_block(self, block: nn.Module, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of a block: what its stage does with it; unchanged where the method has nothing to do with it."""
        call = self._call_in_progress()
        slot = call.layout.slots.get(block) if call else None
        if call is None or slot is None:
            return original_forward(*args, **kwargs)
        arguments = slot.call.bind(args, kwargs) if args else kwargs
        if slot.stage.keeps_residuals:
            return run_block(call, slot, original_forward, arguments)
        return run_block_of_modules(call, slot, block, arguments)

    def _call_module(self, module: nn.Module, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of a module inside a block."""
        call = self._active.call
        slot = call.layout.modules.get(module) if call else None
        if call is None or slot is None:
            return original_forward(*args, **kwargs)
        return answer(call, slot, original_forward, args, kwargs)

    def _call_loop(self, run: RunBlocks, original_forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of a module that hides blocks, led through them."""
        call = self._call_in_progress()
        if call is None:
            return original_forward(*args, **kwargs)
        single_stage = call.layout.single_stage and not call.model_call.adds_between_blocks
        return run(BlockLoop(call.model_call, single_stage, call.context.once), original_forward, args, kwargs)

    def _call_in_progress(self) -> Call | None:
        """The model's call on this thread; None where a block is called on its own.

        RuntimeError where the block is called by a model whose calls we no longer see.
        """
        call = self._active.call
        if call is None and interception_of(self.transformer) is None:
            raise RuntimeError(
                "the transformer was compiled as a whole after h2cache.apply, so its cache cannot work: compile its "
                "blocks instead, with transformer.compile_repeated_blocks(), or remove the cache first"
            )
        return call
