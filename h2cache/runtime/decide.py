"""Hit or compute, for each sample of a stage, after at most one read from the device."""

import math
from collections.abc import Iterator
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
from ..policy.stages import Stage
from ..trace import Row
from .autograd import outside_graph
from .collectives import Ranks
from .layout import BlockSlot, Call
from .stage_step import SampleStep, StageStep


@outside_graph
def decide(call: Call, slot: BlockSlot, arguments: dict[str, Any], before: Streams, after: Streams | None) -> StageStep:
    """The decisions about a stage in this call, recorded in the trace.

    Args:
        slot: of the stage's first block; `arguments` are those of its call, by name.
        before, after: the streams around that block; `after` is None where it has not run.
    """
    stage, batch = slot.stage, before[0].shape[0]
    samples = [SampleStep(memory) for memory in call.context.stage(stage.name, batch)]
    step = call.steps[stage.name] = StageStep(stage, after or before, samples)
    decide_without_measuring(call, step)
    if stage.probe is not None:
        look(call, slot, step, arguments, before, after)
        undecided = [sample for sample in samples if sample.decision is None]
        if undecided and not read(call, undecided):
            measure(call, stage, undecided)
        elif undecided:  # a new run began with this call: nothing is remembered, so that nothing is measured
            memories = call.context.stage(stage.name, batch)
            step.samples = [SampleStep(memory, probe=old.probe) for memory, old in zip(memories, samples, strict=True)]
            decide_without_measuring(call, step)
    if stage.learns:
        fit(step, call.ranks)
    follow(call, step)
    return step


def decide_without_measuring(call: Call, step: StageStep) -> None:
    """The decision about each sample, None where it takes a comparison."""
    stage, parent = step.stage, call.steps.get(step.stage.parent or "")
    for number, sample in enumerate(step.samples):
        call.guard.check([sample.memory])
        parent_skipped = parent is not None and parent.samples[number].skips
        decision = stage.rule.without_measuring(sample.memory, call.context.step, parent_skipped)
        if decision is not None and decision.skips and not call.context.has_stand_in(stage, sample.memory, call.guard):
            decision = Decision.COMPUTE
        sample.decision = decision


def look(
    call: Call, slot: BlockSlot, step: StageStep, arguments: dict[str, Any], before: Streams, after: Streams | None
) -> None:
    """Probe the samples for which a probe has a use, and compare those that are yet to be decided about.

    Where ranks share the tokens, the deviations are sums over the rank's part of the probe.
    """
    probe = slot.stage.probe
    assert probe is not None
    for number, sample in enumerate(step.samples):
        if sample.decision is Decision.FORCED:
            continue
        seen = ProbeInput(
            sample_row(before, number),
            None if after is None else sample_row(after, number),
            partial(modulated, call, slot, arguments, number, before[0].shape[0]),
            call.ranks,
        )
        sample.probe, deviation = probe(seen, sample.memory.reference if sample.decision is None else None)
        call.guard.check([sample.memory])  # for a probe that is made in the same place at every step
        if deviation is not None:
            sample.deviation = deviation if call.ranks is None else deviation * sample.probe.numel()


def modulated(call: Call, slot: BlockSlot, arguments: dict[str, Any], number: int, batch: int) -> Tensor:
    """(1, N, D): one sample's image tokens as the first norm of the network modulates them."""
    if batch > 1:
        arguments = slot.call.select(arguments, slice(number, number + 1), batch)
    onload(slot.call.block)  # the norm may be offloaded with it, and it has not been called yet
    return call.guard.keep([slot.modulated(slot.call.block, arguments)])[0]


def read(call: Call, undecided: list[SampleStep]) -> bool:
    """Read the deviations. Returns whether the context's memory turns out to be of a run before.

    One transfer brings them together with everything else of the run that nobody has read yet: timesteps, and whether
    unmeasured probes were finite.
    """
    unread, call.run.unread = call.run.unread, []
    pending = [memory for memory in call.context.memories() if memory.pending_finite_check is not None]
    deviations = [sample.deviation for sample in undecided if sample.deviation is not None]
    parts = [*(memory.pending_finite_check for memory in pending), *deviations]
    values = summed(parts, [timestep.value for timestep in unread], call.ranks)
    for memory in pending:
        memory.pending_finite_check = None
        if not math.isfinite(next(values)):
            memory.forget()
    for sample in undecided:
        compared = next(values), next(values)
        sample.compared = None if sample.memory.reference is None else compared
    for timestep in unread:
        timestep.value = next(values)
    return call.timestep in unread and call.set_time(call.timestep.value)


def summed(parts: list[Tensor], shared: list[Tensor], ranks: Ranks | None) -> Iterator[float]:
    """The numbers in `parts`, each (n,), summed over the ranks, and then those in `shared`, which all ranks have alike.

    One read. All ranks add the same numbers in the same order, so that none decides otherwise by a rounding.
    """
    own = parts[0] if len(parts) == 1 else torch.cat(parts)
    everywhere = [own if ranks is None else ranks.gathered(own), *(values.to(own) for values in shared)]
    read = (everywhere[0] if not shared else torch.cat(everywhere)).tolist()
    count, end = own.numel(), everywhere[0].numel()
    return chain(read[:count] if ranks is None else (sum(read[i:end:count]) for i in range(count)), read[end:])


def measure(call: Call, stage: Stage, undecided: list[SampleStep]) -> None:
    """Decide about samples by what was compared."""
    rule, compared = cast(MeasuringRule, stage.rule), [s.compared for s in undecided if s.compared is not None]
    for sample in undecided:
        difference = None
        if sample.compared is not None:
            difference = relative_l1(compared if call.layout.config.decides_together else [sample.compared])
        sample.decision, sample.difference = rule.measured(sample.memory, difference, call.is_last_step)


def fit(step: StageStep, ranks: Ranks | None) -> None:
    """Let the forecasts that are about to be made learn from the last computed step, in one read."""
    skipped = [sample.memory for sample in step.samples if sample.skips]
    learners = [(memory, *memory.products) for memory in skipped if memory.products is not None]
    if not learners:
        return
    forecast = cast(FittedForecast, step.stage.forecast)
    values = summed([products.flatten() for _, products, _ in learners], [], ranks)
    for memory, products, elapsed in learners:
        rows = [list(islice(values, len(products))) for _ in range(len(products))]
        memory.fitted = forecast.fitted(rows, elapsed)
        memory.products = None


def follow(call: Call, step: StageStep) -> None:
    """Follow the decisions: settle the memory, note which samples are computed, and write the rows of the trace."""
    stage, run, rows = step.stage, call.run.number, call.trace.rows_of(call.run.number)
    for number, sample in enumerate(step.samples):
        settle(sample, stage)
        sigma, blocks_computed = None, call.layout.blocks[stage.name]
        if sample.skips:
            forecast = sample.memory.fitted or stage.forecast
            sample.coefficients = forecast.coefficients(call.context.step - sample.memory.computed_step)
            sigma, blocks_computed = getattr(forecast, "sigma", None), int(stage.runs_first_block)
        else:
            step.computed.append(number)
        rows.append(
            Row(
                run=run,
                step=call.context.step,
                timestep=call.timestep,
                context=call.context.name,
                sample=number,
                stage=stage.name,
                diff=sample.difference,
                threshold=stage.rule.threshold,
                decision=cast(Decision, sample.decision),
                blocks_computed=blocks_computed,
                sigma=sigma,
            )
        )
    if 0 < len(step.computed) < len(step.samples):
        # Not `torch.tensor(..., device=...)`, whose copy waits for the device.
        step.rows = torch.tensor(step.computed).to(step.stage_input[0].device, non_blocking=True)


def settle(sample: SampleStep, stage: Stage) -> None:
    """Count a skip, or let the probe of a computed sample become its reference: never one that is not finite."""
    memory = sample.memory
    if sample.skips:
        memory.consecutive_hits += 1
        if stage.rule.reference_every_step:
            memory.reference = sample.probe
            memory.seal()
        return
    memory.consecutive_hits, memory.accumulated = 0, 0.0
    if sample.probe is None:
        return
    if sample.compared is None:
        memory.remember_unmeasured(sample.probe)
    elif math.isfinite(sample.compared[0]):
        memory.reference = sample.probe
    else:
        memory.forget()
        sample.remembered = False
    memory.seal()
