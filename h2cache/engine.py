"""The one place with control flow: follows a denoiser call from block to block and skips what its stages allow.

The model's own forward runs unchanged. The engine sees each call of the model and of its blocks from outside
(`interception.py`). A stage's rule decides for each sample (`judge.py`), before the stage's first block or, where the
probe needs that block, after it. Skipped blocks return their input, so that whatever the model adds between blocks
(ControlNet) arrives fresh at the stage's last block, which adds the forecast residual. Samples that miss are computed
in a batch of their own. Methods that skip inside blocks let the blocks run and answer for their modules (`modules.py`).
What returns the same at every step of a run is run once (`unchanging.py`).
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .adapters import Adapter, Denoising, Lead, Passage
from .call import Call, Method, Place, module_places
from .conditions import Conditions, conditions_of_call
from .config import CacheConfig
from .interception import Interception, interception_of
from .judge import Judge
from .memory import Moment, Runs, on_host
from .modules import answer, regroup, whereabouts
from .outputs import predict
from .streams import Streams, plain
from .trace import Trace
from .unchanging import answer_once, not_shared
from .visit import Visit


class Engine:
    """Attaches a method to one transformer instance. Made and undone by `h2cache.apply` and its handle."""

    def __init__(self, transformer: torch.nn.Module, adapter: Adapter, config: CacheConfig):
        self.transformer = transformer
        self.adapter = adapter
        self.runs = Runs()
        self.trace = Trace()
        self._judge = Judge(self.runs, self.trace)
        self._active = threading.local()
        self._interceptions: list[Interception] = []
        self._watch(config)

    def _watch(self, config: CacheConfig) -> None:
        """Take the blocks that the model has now as those that the method works on."""
        self._groups = self.adapter.groups(self.transformer)
        self.trace.total_blocks = sum(map(len, self._groups.values()))
        self.use(config)

    def use(self, config: CacheConfig) -> None:
        """Follow `config` from the next call on. Runs in progress go on where what they remember still serves."""
        self.method = self._laid_out(config)
        self._variants: dict[Conditions, Method] = {}
        self._whereabouts = whereabouts(self.method)
        self.trace.stage_blocks.update(self.method.blocks)
        self._intercept()

    def _laid_out(self, config: CacheConfig) -> Method:
        """`config` on the blocks that are watched."""
        stages = config.compose()
        self.adapter.check(stages)
        output, places, modules, blocks = None, {}, {}, {}
        for stage in stages:
            members = [block for group in stage.groups for block in self._groups[group]]
            blocks[stage.name] = len(members)
            if stage.output:
                output = Place(stage, index=0, is_last=True, call=None)
                continue
            inside = [self.adapter.modules(block) for block in members] if stage.modules else []
            modules |= module_places(stage, inside)
            with_mlps = [index for index, parts in enumerate(inside) if parts.image_mlp is not None]
            for index, block in enumerate(members):
                regroups = stage.clusters is not None and index == with_mlps[-1]
                places[block] = Place(stage, index, index == len(members) - 1, self.adapter.block_call(block), regroups)
        undivided = len(stages) == 1 and len(places) == self.trace.total_blocks
        remembers = tuple(stage.remembers for stage in stages)
        return Method(config, places, modules, blocks, remembers, undivided, output)

    def _conditions(self, image_tokens: int) -> Conditions:
        """Of the run that this call begins; nothing is asked for a method that does not depend on them."""
        asked = self.method.config.depends_on_run
        return conditions_of_call(self.transformer, image_tokens) if asked else Conditions()

    def _method_under(self, conditions: Conditions) -> Method:
        """The method as a run under these conditions wants it."""
        if not self.method.config.depends_on_run:
            return self.method
        if conditions not in self._variants:
            adapted = self.method.config.for_run(conditions)
            self._variants[conditions] = self.method if adapted is self.method.config else self._laid_out(adapted)
        return self._variants[conditions]

    def _intercept(self) -> None:
        """See the calls of the model, its blocks, and the modules that the method skips or that need run but once."""
        handlers: dict[torch.nn.Module, Callable] = {self.transformer: self._denoise}
        handlers |= {module: partial(self._lead, lead) for module, lead in self.adapter.led(self.transformer).items()}
        unchanging = not_shared(self.adapter.unchanging(self.transformer), self)
        handlers |= {module: partial(answer_once, self._active, module) for module in unchanging}
        for group in self._groups.values():
            handlers |= {block: partial(self._block, block) for block in group}
        handlers |= {module: partial(self._module, module) for module in self.method.modules}
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

    @property
    def attached(self) -> bool:
        """Whether this engine is at work: neither removed nor replaced."""
        return bool(self._interceptions)

    def _keep_up(self) -> None:
        """Meet what happened to the transformer since the last call: modules compiled, wrapped or replaced."""
        if not self.attached:
            return  # removed by another thread while this call was on its way
        if self.adapter.groups(self.transformer) != self._groups:
            config = self.method.config
            self.detach()
            self._watch(config)
        elif self.method.modules and self._modules_replaced():
            self.use(self.method.config)
        else:
            self._attach()

    def _modules_replaced(self) -> bool:
        """Whether blocks have others in the place of modules that are watched: PEFT wraps the ones it adapts."""
        return any(children.get(name) is not module for children, name, module in self._whereabouts)

    def _denoise(self, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        self._keep_up()
        call = self._open(self.adapter.denoising(self.transformer, args, kwargs))
        outer = getattr(self._active, "call", None)
        try:
            self._active.call = call
            output = self._predict(call, proceed, args, kwargs)
        except BaseException:
            # Half of this step may be remembered; a caller that tries again must not build on it.
            self.runs.discard(call.run)
            raise
        finally:
            self._active.call = outer
        call.context.close(call.moment)
        return output

    def _predict(self, call: Call, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the call of the model returns."""
        place = call.method.output
        if place is None:
            return proceed(*args, **kwargs)
        image, text = call.denoising.hidden_states, call.denoising.encoder_hidden_states
        visit = self._judge.decide(call, place, {}, Streams(image, text), None)
        return predict(call, visit, proceed, args, kwargs)

    def _open(self, denoising: Denoising) -> Call:
        image = denoising.hidden_states
        key = (image.shape, image.dtype, image.device)
        run = self.runs.find(denoising.img_ids, key)
        # Asked once a run: what a pipeline says may change before its run ends.
        conditions = run.conditions if run is not None else self._conditions(image.size(1))
        method = self._method_under(conditions)
        if run is None or run.stages != method.remembers:
            run = self.runs.begin(denoising.img_ids, key, method.remembers, conditions)
        timestep = denoising.timestep.reshape(-1)
        known = timestep.tolist()[0] if on_host(timestep) else None
        context = run.context(denoising.branch, image, known)
        # All of a batch have the same timestep, of which one is kept.
        moment = Moment(timestep[:1] if known is None else known, self.adapter.timestep_scale)
        call = Call(method, denoising, run, context, moment, text_tokens=denoising.encoder_hidden_states.size(1))
        if known is None:
            run.unread.append(moment)
        else:
            call.set_time(known, self.runs)
        call.context.note_input(image, known)
        return call

    def _lead(self, lead: Lead, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of a module that hides blocks, led through them."""
        call: Call | None = getattr(self._active, "call", None)
        if call is None:
            self._check_watched()
        if call is None or not call.method.places:
            return proceed(*args, **kwargs)
        undivided = call.method.undivided and not call.denoising.adds_between_blocks
        return lead(Passage(call.denoising, undivided, call.context.once), proceed, args, kwargs)

    def _block(self, block: torch.nn.Module, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of a block: enter its stage, go on in it, or have nothing to do with it."""
        call: Call | None = getattr(self._active, "call", None)
        if call is None:
            self._check_watched()
        place = call.method.places.get(block) if call else None
        if place is None:
            return proceed(*args, **kwargs)
        arguments = place.call.bind(args, kwargs) if args else kwargs
        if place.stage.modules:
            return self._go_through(call, place, block, arguments)
        if place.index == 0:
            if place.stage.runs_first_block:
                return self._look_behind(call, place, proceed, arguments)
            self._judge.decide(call, place, arguments, place.call.read(arguments, call.text_tokens), None)
        visit = call.visits[place.stage.name]
        if not place.is_last:
            if not visit.computed:
                return place.call.untouched(arguments)
            if visit.rows is None and not call.denoising.adds_between_blocks:
                return proceed(**arguments)
        return self._go_on(call, place, visit, proceed, arguments)

    def _module(self, module: torch.nn.Module, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of a module inside a block."""
        call: Call | None = getattr(self._active, "call", None)
        place = call.method.modules.get(module) if call else None
        return proceed(*args, **kwargs) if place is None else answer(call, place, proceed, args, kwargs)

    def _check_watched(self) -> None:
        """A block may be called on its own, but not by a model whose calls we no longer see."""
        if interception_of(self.transformer) is None:
            raise RuntimeError(
                "the transformer was compiled as a whole after h2cache.apply, so its cache cannot work: compile its "
                "blocks instead, with transformer.compile_repeated_blocks(), or remove the cache first"
            )

    def _look_behind(self, call: Call, place: Place, proceed: Callable, arguments: dict[str, Any]) -> Any:
        """Run the first block of a stage, and decide about the others by what it did."""
        before = place.call.read(arguments, call.text_tokens)
        output = proceed(**arguments)
        after = place.call.parse(output, call.text_tokens)
        if call.denoising.adds_between_blocks:
            after = place.call.kept(after)
        visit = self._judge.decide(call, place, arguments, before, after)
        if place.is_last:
            visit.remember(after, call.context.step)
        return output

    def _go_through(self, call: Call, place: Place, block: torch.nn.Module, arguments: dict[str, Any]) -> Any:
        """Run a block whose modules are skipped, uncompiled: compiled code would not stop at its modules."""
        if place.index == 0:
            streams = place.call.read(arguments, call.text_tokens)
            if place.stage.clusters is not None:
                place.stage.clusters.check(min(tokens.shape[1] for tokens in streams))
            self._judge.decide(call, place, arguments, streams, None)
        visit = call.visits[place.stage.name]
        output = plain(block)._call_impl(**arguments)
        if visit.computed:
            if place.regroups:
                regroup(call, visit, place.call.parse(output, call.text_tokens))
            if place.is_last:
                visit.remember(visit.anchor, call.context.step)
        return output

    def _go_on(self, call: Call, place: Place, visit: Visit, proceed: Callable, arguments: dict[str, Any]) -> Any:
        """Run a block for the samples that need it; at the stage's last block, give the others their forecast."""
        streams = end = place.call.read(arguments, call.text_tokens)
        output = None
        if visit.computed:
            if call.denoising.adds_between_blocks:
                visit.note_additions(streams)
            if visit.rows is None:
                output = proceed(**arguments)
                end = place.call.parse(output, call.text_tokens)
            else:
                batch = streams.hidden_states.shape[0]
                computed = place.call.parse(
                    proceed(**place.call.select(arguments, visit.rows, batch)), call.text_tokens
                )
                end = Streams(*(s.index_copy(0, visit.rows, c) for s, c in zip(streams, computed, strict=True)))
                output = place.call.result(end)
            visit.returned = place.call.kept(end) if call.denoising.adds_between_blocks else end
        if not place.is_last:
            return output
        if visit.computed:
            visit.remember(end, call.context.step)
        if len(visit.computed) == len(visit.decisions):
            return output
        return place.call.result(visit.stand_in(end, call.context.step, into=place.call.room(end)))
