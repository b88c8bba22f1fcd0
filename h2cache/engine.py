"""The one place with control flow: follows a denoiser call from block to block and skips what its stages allow.

The model's own forward runs unchanged. The engine sees each call of the model and of its blocks from outside
(`interception.py`). The first block of a stage always runs; after it the stage's rule decides for each sample. Skipped
blocks return their input, so that whatever the model adds between blocks (ControlNet) arrives fresh at the stage's last
block, which adds the forecast residual. Samples that miss are computed in a batch of their own.
"""

import math
import threading
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch

from .adapters import Adapter, Denoising
from .call import Call, Method, Place
from .config import CacheConfig
from .decisions import Decision
from .interception import Interception, interception_of
from .memory import Moment, Runs
from .pfs import deviation, relative_l1
from .stages import Stage
from .streams import Streams
from .trace import Row, Trace
from .visit import Visit


class Engine:
    """Attaches a method to one transformer instance. Made and undone by `h2cache.apply` and its handle."""

    def __init__(self, transformer: torch.nn.Module, adapter: Adapter, config: CacheConfig):
        self.transformer = transformer
        self.adapter = adapter
        self.runs = Runs()
        self.trace = Trace()
        self._active = threading.local()
        self._watch(config)

    def _watch(self, config: CacheConfig) -> None:
        """Intercept the calls of the model and of every block that it has now."""
        self._groups = self.adapter.groups(self.transformer)
        blocks = [block for group in self._groups.values() for block in group]
        self.trace.total_blocks = len(blocks)
        self.use(config)
        self._interceptions = [Interception(self.transformer, self._denoise, self)]
        self._interceptions += [Interception(block, partial(self._block, block), self) for block in blocks]
        self._attach()

    def use(self, config: CacheConfig) -> None:
        """Follow `config` from the next call on. Runs in progress go on where what they remember still serves."""
        stages = config.compose()
        places, blocks = {}, {}
        for stage in stages:
            members = [block for group in stage.groups for block in self._groups[group]]
            blocks[stage.name] = len(members)
            for index, block in enumerate(members):
                places[block] = Place(stage, index, len(members) - 1, self.adapter.block_call(block))
        self.trace.stage_blocks.update(blocks)
        self.method = Method(config, places, blocks, tuple(stage.remembers for stage in stages))

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
        """Meet what happened to the transformer since the last call: blocks compiled, wrapped or replaced."""
        if not self.attached:
            return  # removed by another thread while this call was on its way
        if self.adapter.groups(self.transformer) == self._groups:
            self._attach()
        else:
            self.detach()
            self._watch(self.method.config)

    def _denoise(self, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        self._keep_up()
        call = self._open(self.adapter.denoising(self.transformer, args, kwargs))
        outer = getattr(self._active, "call", None)
        try:
            self._active.call = call
            output = proceed(*args, **kwargs)
        except BaseException:
            # Half of this step may be remembered; a caller that tries again must not build on it.
            self.runs.discard(call.run)
            raise
        finally:
            self._active.call = outer
        call.context.step += 1
        return output

    def _open(self, denoising: Denoising) -> Call:
        method, image = self.method, denoising.hidden_states
        key = (tuple(image.shape), image.dtype, image.device)
        run = self.runs.find(denoising.img_ids, key, method.remembers)
        timestep = denoising.timestep.reshape(-1)[:1]
        known = timestep.tolist()[0] if on_host(timestep) else None
        context = run.context(denoising.branch, image, known)
        call = Call(method, denoising, run, context, Moment(timestep, self.adapter.timestep_scale))
        if known is None:
            run.unread.append(call.moment)
        else:
            self._set_time(call, known)
        call.context.note_input(image, known)
        return call

    def _set_time(self, call: Call, timestep: float) -> bool:
        """Tell the call its timestep. True where this shows that its context's memory is of a run before."""
        call.moment.value = timestep
        exact = call.denoising.timestep.dtype in (torch.float32, torch.float64)
        stale = False
        if call.run.starts_over(call.context, timestep, exact):
            # The caller kept its `img_ids` from one run to the next.
            stale, context = call.context.timed, call.context
            call.run = self.runs.begin(call.denoising.img_ids, call.run.shape, call.run.stages)
            if stale:
                call.context = call.run.context(call.denoising.branch, call.denoising.hidden_states, timestep)
            else:  # new with this run, so its memory is of this run, though its first steps went unread
                call.run.contexts.append(context)
        call.run.note_timestep(call.context, timestep)
        return stale

    def _block(self, block: torch.nn.Module, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of a block: enter its stage, go on in it, or have nothing to do with it."""
        call: Call | None = getattr(self._active, "call", None)
        if call is None:
            self._check_watched()
        place = call.method.places.get(block) if call else None
        if place is None:
            return proceed(*args, **kwargs)
        arguments = place.call.bind(args, kwargs)
        if place.index == 0:
            return self._enter(call, place, proceed, arguments)
        visit = call.visits[place.stage.name]
        if not visit.computed and not place.is_last:
            return place.call.untouched(arguments)
        return self._go_on(call, place, visit, proceed, arguments)

    def _check_watched(self) -> None:
        """A block may be called on its own, but not by a model whose calls we no longer see."""
        if interception_of(self.transformer) is None:
            raise RuntimeError(
                "the transformer was compiled as a whole after h2cache.apply, so its cache cannot work: compile its "
                "blocks instead, with transformer.compile_repeated_blocks(), or remove the cache first"
            )

    def _enter(self, call: Call, place: Place, proceed: Callable, arguments: dict[str, Any]) -> Any:
        """Run the stage's first block and decide about the others."""
        before = place.call.read(arguments, call.text_tokens)
        output = proceed(**arguments)
        after = place.call.parse(output, call.text_tokens)
        if call.denoising.adds_between_blocks:
            after = place.call.kept(after)
        visit = self._decide(call, place.stage, before, after)
        call.visits[place.stage.name] = visit
        if place.is_last:
            visit.remember(after, call.context.step)
        return output

    def _go_on(self, call: Call, place: Place, visit: Visit, proceed: Callable, arguments: dict[str, Any]) -> Any:
        """Run a later block for the samples that need it; at the stage's last block, give the others their forecast."""
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
        visit.remember(end, call.context.step)
        if len(visit.computed) == len(visit.decisions):
            return output
        return place.call.result(visit.stand_in(end, call.context.step))

    @torch.no_grad()
    def _decide(self, call: Call, stage: Stage, before: Streams, after: Streams) -> Visit:
        """Hit or compute, for each sample, after at most one read from the device."""
        batch, step = after.hidden_states.shape[0], call.context.step
        memories = call.context.stage(stage.name, batch)
        parent = call.visits.get(stage.parent) if stage.parent else None
        decisions = [
            stage.rule.without_measuring(memory, step, parent is not None and parent.decisions[sample].skips)
            for sample, memory in enumerate(memories)
        ]
        probes = [
            None if decision is Decision.FORCED else stage.probe(before.row(sample), after.row(sample))
            for sample, decision in enumerate(decisions)
        ]
        undecided = [sample for sample, decision in enumerate(decisions) if decision is None]
        compared: dict[int, list[float]] = {}
        if undecided:
            deviations = [deviation(memories[sample].reference, probes[sample]) for sample in undecided]
            measured, stale = self._read(call, deviations)
            if stale:
                return self._decide(call, stage, before, after)
            # What was read may have shown that a reference was not finite, and made its memory forget it.
            pairs = zip(undecided, measured, strict=True)
            compared = {sample: pair for sample, pair in pairs if memories[sample].reference is not None}
        together = list(compared.values()) if call.method.config.decides_together else None
        differences = {sample: relative_l1(together or [pair]) for sample, pair in compared.items()}
        for sample in undecided:
            decisions[sample] = stage.rule.measured(differences.get(sample))
        visit = Visit(stage, memories, decisions, anchor=after, returned=after)
        visit.settle(probes, compared)
        self._record(call, stage, decisions, differences)
        return visit

    def _read(self, call: Call, deviations: list[torch.Tensor]) -> tuple[list[list[float]], bool]:
        """The deviations as floats, and whether the context's memory turns out to be of a run before.

        One transfer brings them together with everything else of the run that nobody has read yet: timesteps, and
        whether unmeasured probes were finite.
        """
        unread, call.run.unread = call.run.unread, []
        doubtful = [memory for memory in call.context.memories() if memory.doubt is not None]
        late = [moment.value.to(deviations[0]) for moment in unread]
        values = iter(torch.cat([*deviations, *(memory.doubt for memory in doubtful), *late]).tolist())
        pairs = [list(islice(values, 2)) for _ in deviations]
        for memory in doubtful:
            memory.doubt = None
            if not math.isfinite(next(values)):
                memory.forget()
        for moment, value in zip(unread, values, strict=True):
            moment.value = value
        is_late = any(moment is call.moment for moment in unread)
        return pairs, is_late and self._set_time(call, call.moment.value)

    def _record(self, call: Call, stage: Stage, decisions: list[Decision], differences: dict[int, float]) -> None:
        rows = self.trace.rows_of(call.run.number)
        for sample, decision in enumerate(decisions):
            blocks = 1 if decision.skips else call.method.blocks[stage.name]
            rows.append(
                Row(
                    call.run.number,
                    call.context.step,
                    call.moment,
                    call.context.name,
                    sample,
                    stage.name,
                    differences.get(sample),
                    stage.rule.threshold,
                    decision,
                    blocks,
                )
            )


def on_host(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be read without waiting for an accelerator."""
    return tensor.device.type == "cpu"
