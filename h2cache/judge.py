"""Hit or compute, for each sample of a stage, after at most one read from the device."""

import math
from functools import partial
from itertools import islice
from typing import Any

import torch

from .call import Call, Place
from .decisions import Decision
from .memory import Runs
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

    @torch.no_grad()
    def decide(
        self, call: Call, place: Place, arguments: dict[str, Any], before: Streams, after: Streams | None
    ) -> Visit:
        """`before` and `after` (None: it has not run) are the streams around the stage's first block."""
        stage = place.stage
        batch, step = before.hidden_states.shape[0], call.context.step
        memories = call.context.stage(stage.name, batch)
        parent = call.visits.get(stage.parent) if stage.parent else None
        decisions = [
            stage.rule.without_measuring(memory, step, parent is not None and parent.decisions[sample].skips)
            for sample, memory in enumerate(memories)
        ]
        undecided = [sample for sample, decision in enumerate(decisions) if decision is None]
        probes, deviations = [None] * batch, [None] * batch
        if stage.probe is not None:
            for sample, decision in enumerate(decisions):
                if decision is not Decision.FORCED:
                    seen_after = None if after is None else after.row(sample)
                    modulated = partial(place.call.modulated, arguments, sample)
                    reference = memories[sample].reference if decision is None else None
                    probes[sample], deviations[sample] = stage.probe(
                        Glimpse(before.row(sample), seen_after, modulated), reference
                    )
        compared: dict[int, list[float]] = {}
        if undecided:
            measured, stale = self._read(call, [deviations[sample] for sample in undecided])
            if stale:
                return self.decide(call, place, arguments, before, after)
            # What was read may have shown that a reference was not finite, and made its memory forget it.
            pairs = zip(undecided, measured, strict=True)
            compared = {sample: pair for sample, pair in pairs if memories[sample].reference is not None}
        together = list(compared.values()) if call.method.config.decides_together else None
        numbers: dict[int, float | None] = {}
        for sample in undecided:
            difference = relative_l1(together or [compared[sample]]) if sample in compared else None
            decisions[sample], numbers[sample] = stage.rule.measured(
                memories[sample], difference, call.context, call.moment
            )
        visit = Visit(stage, memories, decisions, anchor=after or before)
        visit.settle(probes, compared)
        if stage.fits:
            self._fit(visit)
        self._record(call, visit, numbers)
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
        return pairs, is_late and call.set_time(call.moment.value, self.runs)

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
