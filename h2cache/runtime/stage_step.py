"""One stage during one call: which samples are computed, what its blocks add, and what stands in for the rest."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters.block_call import Streams, join_rows, sample_row
from ..policy.forecasts import Features, Forecast, advance_terms, extrapolate, inner_products
from ..policy.rules import Decision
from ..policy.stages import Stage
from .autograd import outside_graph
from .in_place import Watched
from .run_state import SampleMemory


@dataclass(slots=True)
class StageStep:
    """A stage on its way through one call.

    Fields:
        stage_input: the streams before the first block that can be skipped, from which residuals are counted.
        computed: the samples that are computed; `rows` is their index tensor where they are some and not all.
        not_remembered: samples whose probe was not finite; what they compute is not kept.
        products: what forecasts can learn in this call, by sample.
        added: by the model, between blocks, to each stream.
        spoiled: somebody wrote to tensors that the residual is counted from.
    """

    stage: Stage
    memories: list[SampleMemory]
    stage_input: Streams
    decisions: list[Decision | None] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    not_remembered: set[int] = field(default_factory=set)
    rows: Tensor | None = None
    products: dict[int, Tensor] = field(default_factory=dict)
    added: list[Tensor | None] = field(init=False)
    spoiled: bool = False
    _input: Watched = field(init=False)
    _returned: Watched = field(init=False)  # what the last block that ran returned

    def __post_init__(self) -> None:
        self.added = [None] * len(self.stage_input)
        self._input = self._returned = Watched.of(self.stage_input)

    def made(self, sample: int) -> Decision:
        """The decision about a sample, once it is made."""
        decision = self.decisions[sample]
        assert decision is not None
        return decision

    def settle(self, probes: dict[int, Tensor], compared: dict[int, tuple[float, float]]) -> None:
        """Follow the decisions: count the skips, and let the probe of every computed sample become its reference.

        Args:
            probes: by sample, where one was looked at.
            compared: `(mean|reference - probe|, mean|reference|)` of the samples that were compared. Their references
                are finite, so the first number says whether the probe is. One that is not is never remembered.
        """
        for sample, memory in enumerate(self.memories):
            if self.made(sample).skips:
                memory.consecutive_hits += 1
                if self.stage.rule.reference_every_step:
                    memory.reference = probes.get(sample)
                    memory.seal()
                continue
            memory.consecutive_hits, memory.accumulated = 0, 0.0
            self.computed.append(sample)
            if sample not in probes:
                continue
            if sample not in compared:
                memory.remember_unmeasured(probes[sample])
            elif math.isfinite(compared[sample][0]):
                memory.reference = probes[sample]
            else:
                memory.forget()
                self.not_remembered.add(sample)
            memory.seal()
        if 0 < len(self.computed) < len(self.decisions):
            # Not `torch.tensor(..., device=...)`, whose copy waits for the device.
            self.rows = torch.tensor(self.computed).to(self.stage_input[0].device, non_blocking=True)

    def note_additions(self, arrived: Streams) -> None:
        """Keep apart what the model added between two blocks: it is no part of the stage's residual."""
        self.spoiled |= self._returned.written_to()  # then nobody knows what was added
        for i, (now, left) in enumerate(zip(arrived, self._returned.tensors, strict=False)):
            if now is not left:
                addition = now - left
                self.added[i] = addition if self.added[i] is None else self.added[i] + addition

    def note_returned(self, streams: Streams) -> None:
        """Keep what a block returned, to tell what the model adds to it."""
        self._returned = Watched.of(streams)

    @outside_graph
    def remember(self, end: Streams, step: int) -> None:
        """Keep the residual of every computed sample, and with it the differences that forecasts need.

        Where it is `spoiled` there is none to keep.
        """
        for sample in self.computed:
            memory = self.memories[sample]
            elapsed = step - memory.computed_step
            if self.spoiled:
                memory.forget()
            elif self.stage.keeps_residuals and sample not in self.not_remembered:
                residual = self._residual(end, sample)
                self.learn(sample, residual, memory.terms)
                memory.terms = advance_terms(memory.terms, residual, elapsed, self.stage.order_at(step))
                memory.seal()
            if sample in self.products:
                memory.products = self.products[sample], elapsed
            memory.computed_step = step

    def check(self, end: Streams) -> None:
        """Take note whether anybody wrote into the stage's input. `end` left a block."""
        self.spoiled |= self._input.written_to(returned=end)

    def learn(self, sample: int, computed: Features, terms: list[Features]) -> None:
        """Add up what a forecast that fits itself can learn from features which it could have forecast."""
        if self.stage.learns and len(terms) == self.stage.forecast.order + 1:
            products = inner_products([computed, *terms])
            earlier = self.products.get(sample)
            self.products[sample] = products if earlier is None else earlier + products

    def _residual(self, end: Streams, sample: int) -> Streams:
        parts = []
        for last, first, addition in zip(
            sample_row(end, sample), sample_row(self.stage_input, sample), self.added, strict=False
        ):
            part = last - first
            parts.append(part if addition is None else part - addition[sample : sample + 1])
        return tuple(parts)

    def coefficients(self, step: int, sample: int) -> list[float]:
        """Of the forecast at `step`."""
        return self._forecast(sample).coefficients(step - self.memories[sample].computed_step)

    def sigma(self, sample: int) -> float | None:
        """The scale of the forecast's polynomial, fixed or fitted; None where it has none."""
        return getattr(self._forecast(sample), "sigma", None)

    def _forecast(self, sample: int) -> Forecast:
        return self.memories[sample].fitted or self.stage.forecast

    def stand_in(self, end: Streams, step: int, into: Streams | None = None) -> Streams:
        """The end of the stage: as computed, or as arrived plus the forecast residual.

        Args:
            end: the streams at the stage's end, with computed samples in their rows.
            step: of the forecast.
            into: tensors that the result is written into, if they are given.
        """
        rows = []
        for sample, memory in enumerate(self.memories):
            row, place = sample_row(end, sample), None if into is None else sample_row(into, sample)
            if self.made(sample).skips:
                row = extrapolate(memory.terms, self.coefficients(step, sample), base=row, into=place)
            elif place is not None:
                for part, computed in zip(place, row, strict=True):
                    part.copy_(computed)
            rows.append(row)
        return join_rows(rows) if into is None else into
