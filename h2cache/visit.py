"""One stage during one call: who is computed, what its blocks add, and what stands in for the rest."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .decisions import Decision
from .forecasts import Features, advance_terms, extrapolate, inner_products
from .graph import outside_graph
from .memory import SampleMemory
from .stages import Stage
from .streams import Streams, join_rows


@dataclass(slots=True)
class Visit:
    """`anchor` are the streams before the first block that can be skipped, from which residuals are counted."""

    stage: Stage
    memories: list[SampleMemory]
    decisions: list[Decision]
    anchor: Streams
    returned: Streams = field(init=False)  # what the last block that ran returned
    computed: list[int] = field(default_factory=list)
    unsound: set[int] = field(default_factory=set)  # computed, but with a probe that was not finite: not remembered
    rows: Tensor | None = None  # index of the computed samples, where they are some and not all
    products: dict[int, Tensor] = field(default_factory=dict)  # see `learn`
    added: list[Tensor | None] = field(default_factory=lambda: [None, None])  # by the model, between blocks

    def __post_init__(self) -> None:
        self.returned = self.anchor

    def settle(self, probes: dict[int, Tensor], compared: dict[int, tuple[float, float]]) -> None:
        """Follow the decisions: count the skips, and let the probe of every computed sample become its reference.

        `compared` holds mean|reference - probe| and mean|reference| of the samples that were compared. Their references
        are finite, so the first number says whether the probe is; one that is not is never remembered.
        """
        for sample, (memory, decision) in enumerate(zip(self.memories, self.decisions, strict=True)):
            if decision.skips:
                memory.consecutive_hits += 1
                if self.stage.rule.follows:
                    memory.reference = probes.get(sample)
                continue
            memory.consecutive_hits, memory.accumulated = 0, 0.0
            self.computed.append(sample)
            if sample not in probes:
                continue
            if sample not in compared:
                memory.remember_unseen(probes[sample])
            elif math.isfinite(compared[sample][0]):
                memory.reference = probes[sample]
            else:
                memory.forget()
                self.unsound.add(sample)
        if 0 < len(self.computed) < len(self.decisions):
            # Not `torch.tensor(..., device=...)`, whose copy waits for the device.
            device = self.anchor.hidden_states.device
            self.rows = torch.tensor(self.computed).to(device, non_blocking=True)

    def note_additions(self, arrived: Streams) -> None:
        """Keep apart what the model added between two blocks: it is no part of the stage's residual."""
        for i, (now, left) in enumerate(zip(arrived, self.returned, strict=True)):
            if now is not left:
                addition = now - left
                self.added[i] = addition if self.added[i] is None else self.added[i] + addition

    @outside_graph
    def remember(self, end: Streams, step: int) -> None:
        """Keep the residual of every computed sample, and with it the differences that forecasts need."""
        for sample in self.computed:
            memory = self.memories[sample]
            elapsed = step - memory.computed_step
            if self.stage.keeps_residuals and sample not in self.unsound:
                residual = self._residual(end, sample)
                self.learn(sample, residual, memory.terms)
                memory.terms = advance_terms(memory.terms, residual, elapsed, self.stage.order_at(step))
            if sample in self.products:
                memory.products = self.products[sample], elapsed
            memory.computed_step = step

    def learn(self, sample: int, computed: Features, terms: list[Features]) -> None:
        """Add up what a forecast that fits itself can learn from features which it could have forecast."""
        if self.stage.fits and len(terms) == self.stage.forecast.order + 1:
            products = inner_products([computed, *terms])
            earlier = self.products.get(sample)
            self.products[sample] = products if earlier is None else earlier + products

    def _residual(self, end: Streams, sample: int) -> Streams:
        parts = []
        for last, first, addition in zip(end.row(sample), self.anchor.row(sample), self.added, strict=True):
            part = last - first
            parts.append(part if addition is None else part - addition[sample : sample + 1])
        return Streams(*parts)

    def coefficients(self, step: int, sample: int) -> list[float]:
        """Of the forecast at `step`."""
        memory = self.memories[sample]
        return (memory.fitted or self.stage.forecast).coefficients(step - memory.computed_step)

    def stand_in(self, end: Streams, step: int, into: Streams | None = None) -> Streams:
        """The end of the stage: as computed, or as arrived plus the forecast residual. Written `into` a place, if one
        is given."""
        rows = []
        for sample, (memory, decision) in enumerate(zip(self.memories, self.decisions, strict=True)):
            row, place = end.row(sample), None if into is None else into.row(sample)
            if decision.skips:
                row = Streams(*extrapolate(memory.terms, self.coefficients(step, sample), base=row, into=place))
            elif place is not None:
                for part, computed in zip(place, row, strict=True):
                    part.copy_(computed)
            rows.append(row)
        return join_rows(rows) if into is None else into
