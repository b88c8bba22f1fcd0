"""The one place with control flow: follows a denoiser call from block to block and skips what its stages allow.

The model's own forward runs unchanged. The engine sees each call of the model and of its blocks from outside
(`interception.py`). The first block of a stage always runs; after it the stage's rule decides for each sample. Skipped
blocks return their input, so that whatever the model adds between blocks (ControlNet) arrives fresh at the stage's last
block, which adds the forecast residual. Samples that miss are computed in a batch of their own.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .adapters import Adapter, Denoising
from .config import CacheConfig
from .decisions import Decision
from .interception import Interception, interception_of
from .memory import Context, Run, Runs
from .pfs import deviation, relative_l1
from .stages import Stage
from .streams import BlockCall, Streams
from .trace import Row, Trace
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
    timestep: float | torch.Tensor
    visits: dict[str, Visit] = field(default_factory=dict)

    @property
    def text_tokens(self) -> int:
        return self.denoising.encoder_hidden_states.shape[1]


class Engine:
    """Attaches a method to one transformer instance. Made and undone by `h2cache.apply` and its handle."""

    def __init__(self, transformer: torch.nn.Module, adapter: Adapter, config: CacheConfig):
        self.transformer = transformer
        self.adapter = adapter
        self.runs = Runs()
        self._groups = adapter.groups(transformer)
        self._active = threading.local()
        blocks = [block for group in self._groups.values() for block in group]
        self.trace = Trace(total_blocks=len(blocks))
        self.use(config)
        self._interceptions = [Interception(transformer, self._denoise, self)]
        self._interceptions += [Interception(block, partial(self._block, block), self) for block in blocks]
        self.attach()

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

    def attach(self) -> None:
        """Put every interception in its place, around what may have been compiled since the last call."""
        for interception in self._interceptions:
            interception.attach()

    def detach(self) -> None:
        """Leave the transformer as it was found, and hold nothing of any run."""
        for interception in self._interceptions:
            interception.detach()
        self.runs.clear()

    def _denoise(self, proceed: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One call of the model."""
        self.attach()
        call = self._open(self.adapter.denoising(self.transformer, args, kwargs))
        outer = getattr(self._active, "call", None)
        self._active.call = call
        try:
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
        call = Call(method, denoising, run, run.context(denoising.branch), timestep)
        if timestep.device.type == "cpu":
            self._set_time(call, timestep.tolist()[0])
        return call

    def _set_time(self, call: Call, timestep: float) -> bool:
        """Tell the call its timestep. True where this shows that a new run began with the old run's `img_ids`."""
        exact = call.denoising.timestep.dtype in (torch.float32, torch.float64)
        begins = call.run.starts_over(call.context, timestep, exact)
        if begins:
            call.run = self.runs.begin(call.denoising.img_ids, call.run.shape, call.run.stages)
            call.context = call.run.context(call.denoising.branch)
        call.run.note_timestep(timestep)
        call.timestep = timestep * self.adapter.timestep_scale
        return begins

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
        visit = self._decide(call, place.stage, before, after)
        visit.output = output
        call.visits[place.stage.name] = visit
        if place.is_last:
            visit.remember(after, call.context.step)
        return output

    def _go_on(self, call: Call, place: Place, visit: Visit, proceed: Callable, arguments: dict[str, Any]) -> Any:
        """Run a later block for the samples that need it; at the stage's last block, give the others their forecast."""
        arrived = place.call.untouched(arguments)
        streams = place.call.read(arguments, call.text_tokens)
        output, end = arrived, streams
        if visit.computed:
            if not _same(arrived, visit.output):
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
            visit.output, visit.returned = output, end
        if not place.is_last:
            return output
        visit.remember(end, call.context.step)
        if len(visit.computed) == len(visit.decisions):
            return output
        return place.call.result(visit.stand_in(end, call.context.step))

    def _decide(self, call: Call, stage: Stage, before: Streams, after: Streams) -> Visit:
        """Hit or compute, for each sample; the only place that reads from the device, once."""
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
        differences: list[float | None] = [None] * batch
        undecided = [sample for sample, decision in enumerate(decisions) if decision is None]
        if undecided:
            deviations = [deviation(memories[sample].reference, probes[sample]) for sample in undecided]
            measured, begins = self._read(call, deviations)
            if begins:
                return self._decide(call, stage, before, after)
            shared = call.method.config.batch_decision == "mean"
            for sample, single in zip(undecided, measured, strict=True):
                differences[sample] = relative_l1(measured if shared else [single])
                decisions[sample] = stage.rule.measured(differences[sample])
        visit = Visit(stage, memories, decisions, anchor=after, returned=after)
        for sample, (memory, decision) in enumerate(zip(memories, decisions, strict=True)):
            if decision.skips:
                memory.consecutive_hits += 1
                continue
            memory.consecutive_hits = 0
            visit.computed.append(sample)
            if differences[sample] is None or math.isfinite(differences[sample]):
                memory.reference = probes[sample]
            else:
                memory.forget()
                visit.unsound.add(sample)
        if 0 < len(visit.computed) < batch:
            visit.rows = torch.tensor(visit.computed, device=after.hidden_states.device)
        self._record(call, stage, decisions, differences)
        return visit

    def _read(self, call: Call, deviations: list[torch.Tensor]) -> tuple[list[list[float]], bool]:
        """The deviations as floats, in one transfer together with a timestep that is not known yet."""
        if isinstance(call.timestep, float):
            return torch.stack(deviations).tolist(), False
        flat = torch.cat([*deviations, call.timestep.to(deviations[0])]).tolist()
        pairs = [flat[i : i + 2] for i in range(0, len(flat) - 1, 2)]
        return pairs, self._set_time(call, flat[-1])

    def _record(self, call: Call, stage: Stage, decisions: list[Decision], differences: list[float | None]) -> None:
        rows = self.trace.rows_of(call.run.number)
        for sample, (decision, difference) in enumerate(zip(decisions, differences, strict=True)):
            blocks = 1 if decision.skips else call.method.blocks[stage.name]
            rows.append(
                Row(
                    call.run.number,
                    call.context.step,
                    call.timestep,
                    call.context.name,
                    sample,
                    stage.name,
                    difference,
                    stage.rule.threshold,
                    decision,
                    blocks,
                )
            )


def _same(arrived: Any, returned: Any) -> bool:
    """Whether a block was called with the very tensors that the block before it returned."""
    if isinstance(arrived, tuple) and isinstance(returned, tuple):
        return all(a is r for a, r in zip(arrived, returned, strict=True))
    return arrived is returned
