"""Hit or compute, for each sample of a stage, after at most one read from the device."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters.base import onload
from ..adapters.block_call import Streams, sample_row
from ..policy.forecasts import FittedForecast
from ..policy.pfs import relative_l1
from ..policy.probes import ProbeInput
from ..policy.rules import Decision, MeasuringRule
from ..trace import Row
from .autograd import outside_graph
from .collectives import Ranks
from .layout import BlockSlot, Call
from .run_state import SampleMemory
from .stage_step import StageStep

Measured = dict[int, tuple[float, float]]  # mean|reference - probe| and mean|reference|, by sample


@outside_graph
def decide(call: Call, slot: BlockSlot, arguments: dict[str, Any], before: Streams, after: Streams | None) -> StageStep:
    """The decisions about a stage in this call, recorded in the trace.

    Args:
        slot: of the stage's first block; `arguments` are those of its call, by name.
        before, after: the streams around that block; `after` is None where it has not run.
    """
    stage, batch = slot.stage, before[0].size(0)
    step = StageStep(stage, call.context.stage(stage.name, batch), stage_input=after or before)
    decide_without_measuring(call, step)
    probes: dict[int, Tensor] = {}
    compared: Measured = {}
    numbers: dict[int, float | None] = {}
    if stage.probe is not None:
        probes, deviations = look(call, slot, step, arguments, before, after)
        if deviations:
            compared, stale = read(call, step.memories, deviations)
            if stale:  # a new run began with this call: nothing is remembered, so that nothing is measured
                step.memories, compared = call.context.stage(stage.name, batch), {}
                decide_without_measuring(call, step)
            else:
                numbers = measure(call, step, deviations, compared)
    step.settle(probes, compared)
    if stage.learns:
        fit(step, call.ranks)
    record(call, step, numbers)
    call.steps[stage.name] = step
    return step


def decide_without_measuring(call: Call, step: StageStep) -> None:
    """The decision about each sample, None where it takes a comparison."""
    stage = step.stage
    parent = None if stage.parent is None else call.steps.get(stage.parent)
    step.decisions = []
    for sample, memory in enumerate(step.memories):
        call.guard.check([memory])
        parent_skipped = parent is not None and parent.made(sample).skips
        decision = stage.rule.without_measuring(memory, call.context.step, parent_skipped)
        if decision is not None and decision.skips and not call.context.has_stand_in(stage, memory, call.guard):
            decision = Decision.COMPUTE
        step.decisions.append(decision)


def look(
    call: Call,
    slot: BlockSlot,
    step: StageStep,
    arguments: dict[str, Any],
    before: Streams,
    after: Streams | None,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The probes by sample, where they have a use, and the deviations of those that are yet to be decided about.

    Where ranks share the tokens, the deviations are sums over the rank's part of the probe.
    """
    probe = slot.stage.probe
    assert probe is not None
    probes, deviations = {}, {}
    for sample, (memory, decision) in enumerate(zip(step.memories, step.decisions, strict=True)):
        if decision is Decision.FORCED:
            continue
        seen = ProbeInput(
            sample_row(before, sample),
            None if after is None else sample_row(after, sample),
            partial(modulated, call, slot, arguments, sample, before[0].size(0)),
            call.ranks,
        )
        probes[sample], deviation = probe(seen, memory.reference if decision is None else None)
        call.guard.check([memory])  # for a probe that is made in the same place at every step
        if decision is None:
            deviations[sample] = deviation if call.ranks is None else deviation * probes[sample].numel()
    return probes, deviations


def modulated(call: Call, slot: BlockSlot, arguments: dict[str, Any], sample: int, batch: int) -> Tensor:
    """(1, N, D): one sample's image tokens as the first norm of the network modulates them."""
    if batch > 1:
        arguments = slot.call.select(arguments, slice(sample, sample + 1), batch)
    onload(slot.call.block)  # the norm may be offloaded with it, and it has not been called yet
    return call.guard.keep([slot.modulated(slot.call.block, arguments)])[0]


def read(call: Call, memories: list[SampleMemory], deviations: dict[int, Tensor]) -> tuple[Measured, bool]:
    """The deviations as floats, without those from a reference that was not finite, and whether the context's memory
    turns out to be of a run before.

    One transfer brings them together with everything else of the run that nobody has read yet: timesteps, and whether
    unmeasured probes were finite.
    """
    unread, call.run.unread = call.run.unread, []
    pending = [memory for memory in call.context.memories() if memory.pending_finite_check is not None]
    parts = [*(memory.pending_finite_check for memory in pending), *deviations.values()]
    values = summed(parts, [timestep.value for timestep in unread], call.ranks)
    for memory in pending:
        memory.pending_finite_check = None
        if not math.isfinite(next(values)):
            memory.forget()
    compared = {}
    for sample in deviations:
        pair = next(values), next(values)
        if memories[sample].reference is not None:
            compared[sample] = pair
    for timestep in unread:
        timestep.value = next(values)
    return compared, call.timestep in unread and call.set_time(call.timestep.value)


def summed(parts: list[Tensor], shared: list[Tensor], ranks: Ranks | None) -> Iterator[float]:
    """The numbers in `parts`, each (n,), summed over the ranks, and then those in `shared`, which all ranks have alike.

    One read. All ranks add the same numbers in the same order, so that none decides otherwise by a rounding.
    """
    own = parts[0] if len(parts) == 1 else torch.cat(parts)
    everywhere = [own if ranks is None else ranks.gathered(own), *(values.to(own) for values in shared)]
    read = (everywhere[0] if not shared else torch.cat(everywhere)).tolist()
    count, end = own.numel(), everywhere[0].numel()
    return chain(read[:count] if ranks is None else (sum(read[i:end:count]) for i in range(count)), read[end:])


def measure(call: Call, step: StageStep, undecided: Iterable[int], compared: Measured) -> dict[int, float | None]:
    """Decide about the samples `undecided`. Returns what was compared with the threshold, for the trace."""
    rule = cast(MeasuringRule, step.stage.rule)
    together = list(compared.values()) if call.layout.config.decides_together else None
    numbers = {}
    for sample in undecided:
        difference = relative_l1(together or [compared[sample]]) if sample in compared else None
        decided = rule.measured(step.memories[sample], difference, call.is_last_step)
        step.decisions[sample], numbers[sample] = decided
    return numbers


def fit(step: StageStep, ranks: Ranks | None) -> None:
    """Let the forecasts that are about to be made learn from the last computed step, in one read."""
    learners = [
        (memory, *memory.products)
        for sample, memory in enumerate(step.memories)
        if step.made(sample).skips and memory.products is not None
    ]
    if not learners:
        return
    forecast = cast(FittedForecast, step.stage.forecast)
    values = summed([products.flatten() for _, products, _ in learners], [], ranks)
    for memory, products, elapsed in learners:
        rows = [list(islice(values, len(products))) for _ in range(len(products))]
        memory.fitted = forecast.fitted(rows, elapsed)
        memory.products = None


def record(call: Call, step: StageStep, numbers: dict[int, float | None]) -> None:
    """One row of the trace for each sample."""
    stage, rows = step.stage, call.trace.rows_of(call.run.number)
    for sample in range(len(step.decisions)):
        decision = step.made(sample)
        rows.append(
            Row(
                run=call.run.number,
                step=call.context.step,
                timestep=call.timestep,
                context=call.context.name,
                sample=sample,
                stage=stage.name,
                diff=numbers.get(sample),
                threshold=stage.rule.threshold,
                decision=decision,
                blocks_computed=int(stage.runs_first_block) if decision.skips else call.layout.blocks[stage.name],
                sigma=step.sigma(sample) if decision.skips else None,
            )
        )
