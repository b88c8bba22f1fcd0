"""Hit or compute, for each sample of a stage, after at most one read from the device."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .call import Call, Place
from .decisions import Decision
from .graph import outside_graph
from .memory import Runs, SampleMemory
from .pfs import relative_l1
from .probes import Glimpse
from .streams import Streams
from .trace import Row, Trace
from .visit import Visit


class Judge:
    """Applies a stage's rule to what its probe shows, and records the decision."""

    def __init__(self, runs: Runs, trace: Trace):
        self.runs = runs
        self.trace = trace

    @outside_graph
    def decide(
        self, call: Call, place: Place, arguments: dict[str, Any], before: Streams, after: Streams | None
    ) -> Visit:
        """Begin the call's visit to the stage of `place`. `before` and `after` (None: it has not run) are the streams
        around the stage's first block."""
        stage, step = place.stage, call.context.step
        memories = call.context.stage(stage.name, before.hidden_states.size(0))
        parent = call.visits.get(stage.parent)
        decisions = []
        for sample, memory in enumerate(memories):
            forced = parent is not None and parent.decisions[sample].skips
            decisions.append(stage.rule.without_measuring(memory, step, forced))
        visit = Visit(stage, memories, decisions, anchor=after or before)
        probes, compared, numbers = {}, {}, {}
        if stage.probe is not None:
            probes, deviations = self._look(place, arguments, before, after, visit)
            if deviations:
                compared, stale = self._read(call, memories, deviations)
                if stale:
                    return self.decide(call, place, arguments, before, after)
                numbers = self._measure(call, visit, deviations, compared)
        visit.settle(probes, compared)
        if stage.fits:
            self._fit(visit)
        self._record(call, visit, numbers)
        call.visits[stage.name] = visit
        return visit

    def _look(
        self, place: Place, arguments: dict[str, Any], before: Streams, after: Streams | None, visit: Visit
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The probes by sample, where they have a use, and the deviations of those that are yet to be decided about."""
        probes, deviations = {}, {}
        for sample, decision in enumerate(visit.decisions):
            if decision is Decision.FORCED:
                continue
            glimpse = Glimpse(
                before.row(sample),
                None if after is None else after.row(sample),
                partial(place.call.modulated, arguments, sample),
            )
            if decision is None:
                probes[sample], deviations[sample] = visit.stage.probe(glimpse, visit.memories[sample].reference)
            else:
                probes[sample], _ = visit.stage.probe(glimpse, None)
        return probes, deviations

    def _read(
        self, call: Call, memories: list[SampleMemory], deviations: dict[int, Tensor]
    ) -> tuple[dict[int, tuple[float, float]], bool]:
        """The deviations as floats, without those from a reference that was not finite, and whether the context's
        memory turns out to be of a run before.

        One transfer brings them together with everything else of the run that nobody has read yet: timesteps, and
        whether unmeasured probes were finite.
        """
        unread, call.run.unread = call.run.unread, []
        doubtful = [memory for memory in call.context.memories() if memory.doubt is not None]
        parts = [*(memory.doubt for memory in doubtful), *deviations.values()]
        parts += [moment.value.to(parts[0]) for moment in unread]
        values = iter((parts[0] if len(parts) == 1 else torch.cat(parts)).tolist())
        for memory in doubtful:
            memory.doubt = None
            if not math.isfinite(next(values)):
                memory.forget()
        compared = {}
        for sample in deviations:
            pair = next(values), next(values)
            if memories[sample].reference is not None:
                compared[sample] = pair
        for moment in unread:
            moment.value = next(values)
        return compared, call.moment in unread and call.set_time(call.moment.value, self.runs)

    def _measure(
        self, call: Call, visit: Visit, undecided: Iterable[int], compared: dict[int, tuple[float, float]]
    ) -> dict[int, float | None]:
        """Decide about the samples `undecided`. Returns what was compared with the threshold, for the trace."""
        together = list(compared.values()) if call.method.config.decides_together else None
        numbers = {}
        for sample in undecided:
            difference = relative_l1(together or [compared[sample]]) if sample in compared else None
            visit.decisions[sample], numbers[sample] = visit.stage.rule.measured(
                visit.memories[sample], difference, call.context, call.moment
            )
        return numbers

    def _fit(self, visit: Visit) -> None:
        """Let the forecasts that are about to be made learn from the last computed step, in one read."""
        learners = [
            memory
            for memory, decision in zip(visit.memories, visit.decisions, strict=True)
            if decision.skips and memory.products is not None
        ]
        if not learners:
            return
        all_products = torch.stack([memory.products[0] for memory in learners]).tolist()
        for memory, products in zip(learners, all_products, strict=True):
            memory.fitted = visit.stage.forecast.fitted(products, memory.products[1])
            memory.products = None

    def _record(self, call: Call, visit: Visit, numbers: dict[int, float | None]) -> None:
        stage, rows = visit.stage, self.trace.rows_of(call.run.number)
        for sample, decision in enumerate(visit.decisions):
            blocks = int(stage.runs_first_block) if decision.skips else call.method.blocks[stage.name]
            rows.append(
                Row(
                    call.run.number,
                    call.context.step,
                    call.moment,
                    call.context.name,
                    sample,
                    stage.name,
                    numbers.get(sample),
                    stage.rule.threshold,
                    decision,
                    blocks,
                )
            )
